"""Qwen3-MoE (30B-A3B, 235B-A22B, Coder): Qwen3's attention, and experts in all layers or some."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Self, no_type_check

from jaxgen.errors import JaxgenError
from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.config import DecoderConfig, read_config
from jaxgen.models.experts import Routing
from jaxgen.models.fields import POSITIVE_INT, TRUE_OR_FALSE, is_int
from jaxgen.models.gguf import Gguf

_LAYERS = (
    lambda value: isinstance(value, tuple) and all(is_int(layer, 0) for layer in value),
    "a list of layers, counted from 0",
)


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class Qwen3MoeConfig(DecoderConfig):
    """The shape of a `Qwen3MoeForCausalLM`, with transformers 5's defaults, all layers with full attention.

    Every `decoder_sparse_step`-th layer has experts, of `moe_intermediate_size` units each, unless `mlp_only_layers`
    names it; the others have a feed-forward of `intermediate_size`. Raises `JaxgenError` for sizes that do not fit
    together. Source: transformers `Qwen3MoeConfig`.

    >>> config = Qwen3MoeConfig(mlp_only_layers=[0])
    >>> config.routing(0), config.routing(1).chosen
    (None, 8)
    """

    vocab_size: int = 151936
    hidden_size: int = 2048
    intermediate_size: int = 6144
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    attention_bias: bool = False
    rope_scaling: Any = None
    decoder_sparse_step: int = 1
    moe_intermediate_size: int = 768
    num_experts_per_tok: int = 8
    num_experts: int = 128
    norm_topk_prob: bool = False
    mlp_only_layers: tuple[int, ...] = ()

    model_type = "qwen3_moe"
    architecture = "Qwen3MoeForCausalLM"
    rope_types = ("default", "linear", "llama3", "yarn")
    field_checks = {  # noqa: RUF012
        **dict.fromkeys(
            ("decoder_sparse_step", "moe_intermediate_size", "num_experts_per_tok", "num_experts"), POSITIVE_INT
        ),
        "norm_topk_prob": TRUE_OR_FALSE,
        "mlp_only_layers": _LAYERS,
    }
    fixed_fields = {"use_sliding_window": (False,), "output_router_logits": (False,)}  # noqa: RUF012
    # Without effect where there is no window; of training in transformers.
    ignored_fields = frozenset({"sliding_window", "max_window_layers", "router_aux_loss_coef"})
    experts_field = "num_experts"
    qk_norm = "head"

    def __post_init__(self):
        given = () if self.mlp_only_layers is None else self.mlp_only_layers
        object.__setattr__(self, "mlp_only_layers", tuple(given) if isinstance(given, list) else given)
        super().__post_init__()

    @classmethod
    def from_hf(cls, source: "str | os.PathLike[str] | Mapping[str, Any]") -> Self:
        """As that of every config; transformers 5 writes `num_experts` as `num_local_experts`."""
        fields = read_config(source)
        count = fields.pop("num_local_experts", None)
        if count is not None and fields.setdefault("num_experts", count) != count:
            raise JaxgenError(f"config: num_experts={fields['num_experts']!r:.80}, but num_local_experts={count!r:.80}")
        return super().from_hf(fields)

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.attention_bias

    o_bias = qkv_bias

    def routing(self, layer: int) -> Routing | None:
        """Experts, or None."""
        if layer in self.mlp_only_layers or (layer + 1) % self.decoder_sparse_step:
            return None
        tensors = tuple(f"mlp.experts.{{}}.{name}_proj" for name in ("gate", "up", "down"))
        sizes = self.num_experts, self.num_experts_per_tok, self.moe_intermediate_size
        return Routing(*sizes, normalized=self.norm_topk_prob, router="mlp.gate", tensors=tensors)


class Qwen3MoeForCausalLM(DecoderForCausalLM):
    """A Qwen3-MoE language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = Qwen3MoeConfig(vocab_size=50, hidden_size=16, moe_intermediate_size=8, num_hidden_layers=1,
    ...                         num_attention_heads=2, num_key_value_heads=1, num_experts=16, num_experts_per_tok=2)
    >>> Qwen3MoeForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 50)
    """

    config_class = Qwen3MoeConfig
    gguf = Gguf(
        "qwen3moe",
        rotates_neighbours=False,
        fields={
            "expert_count": "num_experts",
            "expert_used_count": "num_experts_per_tok",
            "expert_feed_forward_length": "moe_intermediate_size",
        },
        derived=lambda fields: fields | {"norm_topk_prob": True},
    )
