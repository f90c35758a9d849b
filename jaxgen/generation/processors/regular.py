"""The processor of `constraint`: what a regular expression, or a grammar, does not allow to come next is removed."""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int

from jaxgen.generation.choosing.constrained import Automata
from jaxgen.generation.processors.constraint import restrict
from jaxgen.generation.processors.processor import Call, Logits, Processor, static
from jaxgen.generation.prompts.rows import Rows


class Asked(NamedTuple):
    """What a call is constrained by: what runs in the compiled loop, and what the host says before each token."""

    automata: Automata | None
    bits: Int[np.ndarray, "N W"] | None = None  # of each prompt's first token


def where(processors: tuple[Processor, ...], bits: Any) -> tuple[Processor, ...]:
    """The same processors where these tokens may come next, by what the host says: a row of bits for each row."""
    return tuple(dataclasses.replace(each, bits=bits) if isinstance(each, Constrained) else each for each in processors)


def automata_of(processors: tuple[Processor, ...]) -> Automata | None:
    """What rows are constrained by in the compiled loop."""
    return next((processor.automata for processor in processors if isinstance(processor, Constrained)), None)


class Constrained(Processor):
    """Remove what must not come next, and what would leave too few tokens for an end.

    A row of which the processors before have removed all that may come chooses evenly among that: the constraint holds
    whatever else is asked. Source: Willard and Louf 2023 (arXiv 2307.09702).
    """

    automata: Automata | None
    bits: Int[Array | np.ndarray, "R W"] | None  # bit j of word w: whether token 32 w + j may come; of grammars
    beams: bool = static()

    @classmethod
    def of(cls, value: Asked, call: Call) -> "Constrained":
        return cls(value.automata, value.bits, call.beams)

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        if self.automata is not None:
            assert rows.constrained is not None
            left = rows.max_lengths - rows.lengths - 1
            logits = restrict(logits, rows, self.automata.allowed(rows.constrained, rows.prompts, left), self.beams)
        if self.bits is not None:
            said = jnp.asarray(self.bits)[:, :, None] >> jnp.arange(32) & 1
            allowed = said.reshape(len(said), -1)[:, : logits.shape[1]] != 0
            logits = restrict(logits, rows, allowed, self.beams)
        return logits
