"""SmolLM3: some layers, by default every fourth, have no rotary positions."""

import dataclasses
from typing import Any, no_type_check

from jaxgen.errors import JaxgenError
from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.config import DecoderConfig
from jaxgen.models.fields import MOST_LAYERS, POSITIVE_INT
from jaxgen.models.gguf import Gguf


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class SmolLM3Config(DecoderConfig):
    """The shape of a `SmolLM3ForCausalLM`, with transformers 5's defaults, all layers with full attention.

    `no_rope_layers` has a 0 for each layer without rotary positions, in spite of its name; None stands for one in
    `no_rope_layer_interval`. `rope_scaling` as for `LlamaConfig`. Raises `JaxgenError` for sizes that do not fit
    together. Source: transformers `SmolLM3Config`.

    >>> SmolLM3Config(num_hidden_layers=5).no_rope_layers
    (1, 1, 1, 0, 1)
    """

    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 11008
    num_hidden_layers: int = 36
    num_attention_heads: int = 16
    num_key_value_heads: int | None = 4
    max_position_embeddings: int = 32768
    rope_theta: float = 2000000.0
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 128000
    eos_token_id: int | tuple[int, ...] | None = 128001
    pad_token_id: int | None = 128004
    attention_bias: bool = False
    mlp_bias: bool = False
    rope_scaling: Any = None
    no_rope_layers: tuple[int, ...] | None = None
    no_rope_layer_interval: int = 4

    model_type = "smollm3"
    architecture = "SmolLM3ForCausalLM"
    rope_types = ("default", "linear", "llama3", "yarn")
    fixed_fields = {"use_sliding_window": (False,)}  # noqa: RUF012
    ignored_fields = frozenset({"sliding_window", "max_window_layers", "pretraining_tp"})  # without effect
    layered_fields = ("no_rope_layers",)
    field_checks = {  # noqa: RUF012
        "no_rope_layer_interval": POSITIVE_INT,
        "no_rope_layers": (
            lambda value: (
                isinstance(value, tuple) and all(type(rotates) is int and rotates in (0, 1) for rotates in value)
            ),
            "a 0 or a 1 for each layer",
        ),
    }

    def __post_init__(self):
        if self.no_rope_layers is None and POSITIVE_INT[0](self.no_rope_layer_interval):
            every = self.no_rope_layer_interval
            layers = self.num_hidden_layers if POSITIVE_INT[0](self.num_hidden_layers) else 0
            if layers > MOST_LAYERS:
                raise JaxgenError(f"num_hidden_layers={layers} is more than {MOST_LAYERS}")
            object.__setattr__(self, "no_rope_layers", tuple(int((layer + 1) % every != 0) for layer in range(layers)))
        super().__post_init__()

    def _wrong_layers(self) -> list[str]:
        given, layers = len(self.no_rope_layers or ()), self.num_hidden_layers
        return [f"no_rope_layers names {given} layers, num_hidden_layers={layers}"] if given < layers else []

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.attention_bias

    o_bias = qkv_bias

    @property
    def ropes(self) -> list[tuple[float, Any] | None]:
        """As `DecoderConfig.ropes`."""
        layers = zip(super().ropes, self.no_rope_layers or (), strict=False)
        return [rope if rotates else None for rope, rotates in layers]


class SmolLM3ForCausalLM(DecoderForCausalLM):
    """A SmolLM3 language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = SmolLM3Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                        num_attention_heads=2, num_key_value_heads=1, no_rope_layers=(0,))
    >>> SmolLM3ForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 50)
    """

    config_class = SmolLM3Config
    gguf = Gguf("smollm3", rotates_neighbours=True)
