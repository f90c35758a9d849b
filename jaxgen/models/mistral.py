"""Mistral 7B (v0.1 to v0.3), Nemo, Small: full attention, or one sliding window for all layers."""

import dataclasses
from typing import no_type_check

from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.config import DecoderConfig
from jaxgen.models.gguf import Gguf


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class MistralConfig(DecoderConfig):
    """The shape of a `MistralForCausalLM`, with transformers 5's defaults; `sliding_window=None` is full attention.

    Raises `JaxgenError` for sizes that do not fit together. Source: transformers `MistralConfig`.

    >>> MistralConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2).head_dim
    16
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    max_position_embeddings: int = 131072
    sliding_window: int | None = 4096  # where config.json says nothing; null there means full attention
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2

    model_type = "mistral"
    architecture = "MistralForCausalLM"
    ignored_fields = frozenset({"use_sliding_window"})  # of Qwen2: what counts is sliding_window


class MistralForCausalLM(DecoderForCausalLM):
    """A Mistral language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = MistralConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                        num_attention_heads=2, num_key_value_heads=1)
    >>> MistralForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 50)
    """

    config_class = MistralConfig
    # llama.cpp has no name of its own for Mistral: the file's name says it, as for transformers. Small 3.1 has one.
    gguf = Gguf("llama", rotates_neighbours=True, named="mistral", also="mistral3")
