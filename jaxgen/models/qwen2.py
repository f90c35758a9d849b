"""Qwen2 and Qwen2.5, dense: queries, keys and values have biases. Also DeepSeek-R1-Distill-Qwen."""

import dataclasses
from typing import Any, no_type_check

from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.config import DecoderConfig
from jaxgen.models.gguf import Gguf


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class Qwen2Config(DecoderConfig):
    """The shape of a `Qwen2ForCausalLM`, with transformers 5's defaults, all layers with full attention.

    `rope_scaling` as for `LlamaConfig`. Raises `JaxgenError` for sizes that do not fit together. Source: transformers
    `Qwen2Config`.

    >>> Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2).head_dim
    16
    """

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    rope_scaling: Any = None

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    rope_types = ("default", "linear", "llama3", "yarn")
    fixed_fields = {"use_sliding_window": (False,), "use_mrope": (False,)}  # noqa: RUF012
    ignored_fields = frozenset({"sliding_window", "max_window_layers"})  # without effect, then
    qkv_bias = True


class Qwen2ForCausalLM(DecoderForCausalLM):
    """A Qwen2 language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = Qwen2Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=2, num_key_value_heads=1)
    >>> Qwen2ForCausalLM(config, rngs=nnx.Rngs(0)).num_parameters()
    3984
    """

    config_class = Qwen2Config
    gguf = Gguf("qwen2", rotates_neighbours=False)
