"""What the configs of Qwen2 and Qwen3 share: their sizes, and windows in the layers from one on."""

import dataclasses
from typing import Any, no_type_check

from jaxgen.models.config import DecoderConfig
from jaxgen.models.fields import all_full


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class QwenConfig(DecoderConfig):
    """Qwen's sizes, with transformers 5's defaults.

    With `use_sliding_window`, the layers that `layer_types` calls "sliding_attention" look `sliding_window` tokens
    back; without `layer_types` those from number `max_window_layers` on. Source: transformers `Qwen2Config`.
    """

    vocab_size: int = 151936
    hidden_size: int = 4096
    intermediate_size: int = 22016
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = 32
    max_position_embeddings: int = 32768
    rope_scaling: Any = None
    use_sliding_window: bool = False
    sliding_window: int | None = 4096
    max_window_layers: int = 28
    layer_types: tuple[str, ...] | None = None

    rope_types = ("default", "linear", "llama3", "yarn")

    def __post_init__(self):
        if not self.use_sliding_window:  # which switches off what files say all the same
            object.__setattr__(self, "sliding_window", None)
            if all_full(self.layer_types):
                object.__setattr__(self, "layer_types", None)
        super().__post_init__()

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """How far back each layer looks, a token itself included; None for all the way."""
        if self.layer_types is not None:
            return super().layer_windows
        full = self.max_window_layers
        return tuple(None if index < full else self.sliding_window for index in range(self.num_hidden_layers))
