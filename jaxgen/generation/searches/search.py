"""The ways to choose a row's tokens, behind one protocol: one after the other, with drafts, or among beams.

A search is chosen once, from the options, and is static under jit.
"""

from typing import Any, Protocol, runtime_checkable

from jaxtyping import Array, Key

from jaxgen.generation.loop import DecodeState, PlainSearch
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.options.table import Extras
from jaxgen.generation.programs.inputs import BatchLayout, StaticOptions, TracedOptions
from jaxgen.generation.prompts.prefill import Count, Prompts
from jaxgen.generation.results.step_outputs import Found
from jaxgen.generation.searches.beam import BeamSearch
from jaxgen.generation.searches.speculate import Speculation


@runtime_checkable
class Search(Protocol):
    """How the tokens of a call are chosen; hashable, and equal to every other of its kind."""

    @property
    def append_only(self) -> bool:
        """Whether a row keeps what it was given: then it can be streamed, continued, and run once more."""
        ...

    def check(self, model: Any, config: GenerationConfig, extras: Extras) -> None:
        """Raise `JaxgenError` for what this search cannot do."""
        ...

    def rows_per_prompt(self, config: GenerationConfig) -> int:
        """How many rows of the batch a prompt takes."""
        ...

    def prefill(
        self, models: Any, prompts: Prompts, key: Key[Array, "*rows"], traced: TracedOptions, layout: BatchLayout, /
    ) -> DecodeState:
        """The state with every row's first token; `models` is a model, or a `Pair` with an assistant."""
        ...

    def decode(
        self, models: Any, state: Any, until: Count, traced: TracedOptions, static: StaticOptions, /
    ) -> DecodeState:
        """The state when every row has ended, or has `until` new tokens."""
        ...

    def collect(
        self, state: Any, prompts: int, returned: int, traced: TracedOptions, layout: BatchLayout, details: bool
    ) -> Found:
        """The sequences of a finished state, on the host: `returned` of each of the first `prompts` prompts.

        Without `details` only the tokens and how they ended are fetched.
        Raises `NonFiniteLogitsError` if one of them met NaN.
        """
        ...


def search_for(static: StaticOptions) -> Search:
    """The search that the options ask for."""
    if static.num_beams > 1:
        return BeamSearch(static.num_beams)
    return Speculation() if static.drafts else PlainSearch()
