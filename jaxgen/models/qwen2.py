"""Qwen2 and Qwen2.5, dense: queries, keys and values have biases. Also DeepSeek-R1-Distill-Qwen."""

import dataclasses
from typing import no_type_check

from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.gguf import Gguf
from jaxgen.models.qwen import QwenConfig


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class Qwen2Config(QwenConfig):
    """The shape of a `Qwen2ForCausalLM`, with transformers 5's defaults; windows as in `QwenConfig`.

    `rope_scaling` as for `LlamaConfig`. Raises `JaxgenError` for sizes that do not fit together. Source: transformers
    `Qwen2Config`.

    >>> Qwen2Config(hidden_size=64, num_attention_heads=4, num_key_value_heads=2).head_dim
    16
    """

    model_type = "qwen2"
    architecture = "Qwen2ForCausalLM"
    fixed_fields = {"use_mrope": (False,)}  # noqa: RUF012
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
