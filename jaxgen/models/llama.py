"""Llama 1 to 3.3, and what is built like it: SmolLM2, TinyLlama, DeepSeek-R1-Distill-Llama."""

import dataclasses
from typing import Any, no_type_check

from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.config import DecoderConfig
from jaxgen.models.gguf import Gguf


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class LlamaConfig(DecoderConfig):
    """The shape of a `LlamaForCausalLM`, with transformers 5's defaults.

    `rope_scaling` stretches the rotary positions: a mapping as HF's, of `rope_type` "linear", "llama3" or "yarn".
    `num_key_value_heads=None` becomes `num_attention_heads`. Raises `JaxgenError` for sizes that do not fit together.
    Source: transformers `LlamaConfig`.

    >>> config = LlamaConfig(rope_scaling={"rope_type": "linear", "factor": 2})
    >>> config.rope_parameters
    {'rope_type': 'linear', 'factor': 2, 'rope_theta': 10000.0}
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

    model_type = "llama"
    architecture = "LlamaForCausalLM"
    rope_types = ("default", "linear", "llama3", "yarn")
    fixed_fields = {"rope_interleaved": (False,)}  # noqa: RUF012
    ignored_fields = frozenset({"is_llama_config", "transformers.js_config"})

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.attention_bias

    o_bias = qkv_bias


class LlamaForCausalLM(DecoderForCausalLM):
    """A Llama language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> LlamaForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 50)
    """

    config_class = LlamaConfig
    gguf = Gguf("llama", rotates_neighbours=True)
