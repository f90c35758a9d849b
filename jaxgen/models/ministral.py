"""Ministral 8B: Mistral with full layers and layers with a window side by side."""

import dataclasses
from typing import no_type_check

from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.mistral import MistralConfig


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class MinistralConfig(MistralConfig):
    """The shape of a `MinistralForCausalLM`, with transformers 5's defaults.

    `layer_types` says of each layer whether it is "full_attention" or "sliding_attention"; None: all have the window,
    if there is one. Raises `JaxgenError` for sizes that do not fit together. Source: transformers `MinistralConfig`.

    >>> kinds = ["full_attention", "sliding_attention"]
    >>> MinistralConfig(num_hidden_layers=2, sliding_window=1024, layer_types=kinds).layer_windows
    (None, 1024)
    """

    layer_types: tuple[str, ...] | None = None

    model_type = "ministral"
    architecture = "MinistralForCausalLM"


class MinistralForCausalLM(DecoderForCausalLM):
    """A Ministral language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = MinistralConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                          num_attention_heads=2, num_key_value_heads=1)
    >>> MinistralForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 50)
    """

    config_class = MinistralConfig
