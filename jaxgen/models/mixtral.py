"""Mixtral 8x7B and 8x22B: Mistral's block, with experts in the place of each feed-forward."""

import dataclasses
from typing import no_type_check

from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.config import DecoderConfig
from jaxgen.models.experts import Routing
from jaxgen.models.fields import POSITIVE_INT
from jaxgen.models.gguf import Gguf


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class MixtralConfig(DecoderConfig):
    """The shape of a `MixtralForCausalLM`, with transformers 5's defaults.

    `num_experts_per_tok` of `num_local_experts` read each token. Raises `JaxgenError` for sizes that do not fit
    together. Source: transformers `MixtralConfig`.

    >>> MixtralConfig(num_local_experts=4).routing(0).experts
    4
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    sliding_window: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    num_local_experts: int = 8
    num_experts_per_tok: int = 2

    model_type = "mixtral"
    architecture = "MixtralForCausalLM"
    field_checks = {"num_local_experts": POSITIVE_INT, "num_experts_per_tok": POSITIVE_INT}  # noqa: RUF012
    fixed_fields = {"output_router_logits": (False,)}  # noqa: RUF012
    ignored_fields = frozenset({"router_aux_loss_coef", "router_jitter_noise"})  # of training in transformers
    experts_field = "num_local_experts"

    def routing(self, layer: int) -> Routing:
        """Experts in every layer."""
        tensors = tuple(f"block_sparse_moe.experts.{{}}.{name}" for name in ("w1", "w3", "w2"))
        sizes = self.num_local_experts, self.num_experts_per_tok, self.intermediate_size
        return Routing(*sizes, normalized=True, router="block_sparse_moe.gate", tensors=tensors)


class MixtralForCausalLM(DecoderForCausalLM):
    """A Mixtral language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = MixtralConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                        num_attention_heads=2, num_key_value_heads=1, num_local_experts=4)
    >>> MixtralForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 50)
    """

    config_class = MixtralConfig
    gguf = Gguf(
        "llama",
        rotates_neighbours=True,
        told_by="expert_count",
        fields={"expert_count": "num_local_experts", "expert_used_count": "num_experts_per_tok"},
    )
