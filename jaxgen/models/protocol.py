"""All that generation uses of a model: whoever writes one outside of `jaxgen.models` needs no more."""

from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from jaxgen.cache import KVCache, Slots


@runtime_checkable
class ModelConfig(Protocol):
    """The sizes of a model; hashable."""

    @property
    def vocab_size(self) -> int:
        """V."""
        ...

    @property
    def max_position_embeddings(self) -> int:
        """The longest row, in tokens."""
        ...

    @property
    def num_hidden_layers(self) -> int:
        """L; this and what follows tell how much memory a call takes."""
        ...

    @property
    def num_attention_heads(self) -> int:
        """N, of queries."""
        ...

    @property
    def num_key_value_heads(self) -> int:
        """K."""
        ...

    @property
    def head_size(self) -> int:
        """H."""
        ...

    @property
    def hidden_size(self) -> int:
        """D."""
        ...

    @property
    def intermediate_size(self) -> int:
        """The width of the feed-forward."""
        ...

    def cache_slots(self, total_length: int, ahead: int = 0) -> Slots:
        """Key-value slots that a row of at most `total_length` tokens needs, processing `ahead` at a time.

        One number for all layers, or one for each where they differ.
        """
        ...

    def to_hf(self) -> dict[str, Any]:
        """The config.json, which records of reproducibility name the model by."""
        ...


@runtime_checkable
class DecodingModel(Protocol):
    """What the compiled loop calls, and all that an assistant needs."""

    def prefill(
        self, tokens: Int[Array, "B T"], lengths: Int[Array, " B"], slots: Slots, int8: bool = False
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Process right-padded prompts: float32 logits after each row's last token, and a cache of `slots` slots."""
        ...

    def step(
        self, tokens: Int[Array, " B"], positions: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B V"], KVCache]:
        """Process one token per row at `positions`: float32 logits for the next one, and the cache that holds it."""
        ...

    def extend(
        self, tokens: Int[Array, "B T"], starts: Int[Array, " B"], counts: Int[Array, " B"], cache: KVCache
    ) -> tuple[Float[Array, "B T D"], KVCache]:
        """Process up to T tokens per row from `starts` on: hidden states, which `logits` turns into logits."""
        ...

    def logits(self, hidden: Float[Array, "B T D"]) -> Float[Array, "B T V"]:
        """What the head makes of hidden states, in float32."""
        ...

    def empty_cache(self, rows: int, slots: Slots, int8: bool = False) -> KVCache:
        """A cache that holds nothing yet."""
        ...


@runtime_checkable
class CausalLM(DecodingModel, Protocol):
    """A model that `jaxgen.generate` can drive; a Flax NNX module."""

    config: Any  # a `ModelConfig`
    generation_config: Any  # a `GenerationConfig`: what holds where a call says nothing

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of activations and cache."""
        ...

    @property
    def device(self) -> Any:
        """Where the weights are."""
        ...

    @property
    def decodes_with_kernels(self) -> bool:
        """Whether `step` has a form made of `jaxgen.kernels`, where the model is."""
        ...

    def hidden(self, input_ids: Any, attention_mask: Any = None) -> Float[Array, "B T D"]:
        """The hidden states of whole texts."""
        ...

    def activations(self, tokens: Any, real: Any, with_attentions: bool) -> Any:
        """An iterator over each layer's hidden states and attentions, for `output_hidden_states`."""
        ...
