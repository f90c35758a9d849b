"""Qwen3, dense: queries and keys are normed per head, and the heads' size is apart from hidden / heads."""

import dataclasses
from typing import no_type_check

from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.gguf import Gguf
from jaxgen.models.qwen import QwenConfig


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class Qwen3Config(QwenConfig):
    """The shape of a `Qwen3ForCausalLM`, with transformers 5's defaults; windows as in `QwenConfig`.

    `rope_scaling` as for `LlamaConfig`. Raises `JaxgenError` for sizes that do not fit together. Source: transformers
    `Qwen3Config`.

    >>> Qwen3Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2).head_dim
    128
    """

    head_dim: int | None = 128
    attention_bias: bool = False

    model_type = "qwen3"
    architecture = "Qwen3ForCausalLM"
    qk_norm = "head"

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.attention_bias

    o_bias = qkv_bias


class Qwen3ForCausalLM(DecoderForCausalLM):
    """A Qwen3 language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = Qwen3Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    >>> Qwen3ForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 50)
    """

    config_class = Qwen3Config
    gguf = Gguf("qwen3", rotates_neighbours=False)
