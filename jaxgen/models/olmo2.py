"""OLMo 2: norms after attention and feed-forward, and over all heads' queries and keys together."""

import dataclasses
from typing import Any, no_type_check

from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.config import DecoderConfig
from jaxgen.models.gguf import Gguf


class OlmoBlock:
    """Beside a `DecoderConfig`: what OLMo 2 and 3 switch on in the shared block."""

    norms = "after"
    norms_in_float32 = True
    rotates_in_float32 = True
    qk_norm = "whole"

    attention_bias: bool

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.attention_bias

    o_bias = qkv_bias


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class Olmo2Config(OlmoBlock, DecoderConfig):
    """The shape of an `Olmo2ForCausalLM`, with transformers 5's defaults.

    `rope_scaling` as for `LlamaConfig`. Raises `JaxgenError` for sizes that do not fit together. Source: transformers
    `Olmo2Config`.

    >>> Olmo2Config(hidden_size=64, num_attention_heads=4).head_dim
    16
    """

    vocab_size: int = 50304
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = 50279
    pad_token_id: int | None = 1
    attention_bias: bool = False
    rope_scaling: Any = None

    model_type = "olmo2"
    architecture = "Olmo2ForCausalLM"
    rope_types = ("default", "linear", "llama3", "yarn")


class Olmo2ForCausalLM(DecoderForCausalLM):
    """An OLMo 2 language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = Olmo2Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> Olmo2ForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 50)
    """

    config_class = Olmo2Config
    gguf = Gguf("olmo2", rotates_neighbours=False)
