"""Granite 3, dense: four multipliers, of embeddings, scores, what a layer adds, and logits."""

import dataclasses
from typing import Any, no_type_check

from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.config import DecoderConfig
from jaxgen.models.fields import POSITIVE_NUMBER
from jaxgen.models.gguf import Gguf


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class GraniteConfig(DecoderConfig):
    """The shape of a `GraniteForCausalLM`, with transformers 5's defaults.

    Embeddings are multiplied by `embedding_multiplier`, scores by `attention_multiplier` (and not by
    1 / sqrt(head_dim)), what attention and feed-forward add by `residual_multiplier`; logits are divided by
    `logits_scaling`. `rope_scaling` as for `LlamaConfig`. Raises `JaxgenError` for sizes that do not fit together.
    Source: transformers `GraniteConfig`.

    >>> GraniteConfig(residual_multiplier=0.22).residual_multiplier
    0.22
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: Any = None
    embedding_multiplier: float = 1.0
    logits_scaling: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float = 1.0

    model_type = "granite"
    architecture = "GraniteForCausalLM"
    rope_types = ("default", "linear", "llama3", "yarn")
    field_checks = dict.fromkeys(
        ("embedding_multiplier", "logits_scaling", "residual_multiplier", "attention_multiplier"), POSITIVE_NUMBER
    )

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.attention_bias

    o_bias = qkv_bias


class GraniteForCausalLM(DecoderForCausalLM):
    """A Granite language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = GraniteConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                        num_attention_heads=2, logits_scaling=8)
    >>> GraniteForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 50)
    """

    config_class = GraniteConfig
    gguf = Gguf(
        "granite",
        rotates_neighbours=True,
        fields={
            "embedding_scale": "embedding_multiplier",
            "residual_scale": "residual_multiplier",
            "attention.scale": "attention_multiplier",
            "logit_scale": "logits_scaling",
        },
    )
