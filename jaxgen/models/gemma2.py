"""Gemma 2: windows in every other layer, and limits of scores and logits; the block is Gemma's."""

import dataclasses
from typing import Any, no_type_check

from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.config import DecoderConfig
from jaxgen.models.gemma import GemmaBlock, scaled_by
from jaxgen.models.gguf import Gguf
from jaxgen.models.two_ropes import pattern


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class Gemma2Config(GemmaBlock, DecoderConfig):
    """The shape of a `Gemma2ForCausalLM`, with transformers 5's defaults.

    `layer_types=None`: the first layer and every other one have a sliding window, the others full attention. Scores
    and logits stay within the softcappings. `rope_scaling` as for `LlamaConfig`. Raises `JaxgenError` for sizes that
    do not fit together. Source: transformers `Gemma2Config`.

    >>> Gemma2Config(num_hidden_layers=2).layer_types
    ('sliding_attention', 'full_attention')
    """

    vocab_size: int = 256000
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int | None = 256
    max_position_embeddings: int = 8192
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = 0
    attention_bias: bool = False
    rope_scaling: Any = None
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    layer_types: tuple[str, ...] | None = None
    final_logit_softcapping: float | None = 30.0
    attn_logit_softcapping: float | None = 50.0

    model_type = "gemma2"
    architecture = "Gemma2ForCausalLM"
    rope_types = ("default", "linear", "llama3", "yarn")

    def __post_init__(self):
        if self.layer_types is None and isinstance(self.num_hidden_layers, int):
            object.__setattr__(self, "layer_types", pattern(2, self.num_hidden_layers))
        super().__post_init__()


class Gemma2ForCausalLM(DecoderForCausalLM):
    """A Gemma 2 language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = Gemma2Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                       num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    >>> Gemma2ForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 50)
    """

    config_class = Gemma2Config
    gguf = Gguf(
        "gemma2",
        rotates_neighbours=False,
        fields={
            "attention.sliding_window": "sliding_window",
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        defaults={"rope.freq_base": 10000.0},
        windows_by_layer=True,
        derived=scaled_by(largest=46),
    )
