"""Room for the constraints of an engine's rows: one automaton each, in one table on the device.

    the states of row 0, those of row 1, ..., and behind them one in which everything may come

A request's automaton is written into the room of its row, so that nothing is compiled for it. Rows without one are in
the last state, and while all are, the device skips it.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int

from jaxgen.constraints.grammars import Grammar
from jaxgen.errors import JaxgenError, UnsupportedError, shown
from jaxgen.generation.choosing.constrained import FREE, NO_WAY, Automata, Automaton, automaton_of, checked
from jaxgen.generation.options.checks import integer
from jaxgen.generation.processors.processor import Count, Logits
from jaxgen.generation.processors.regular import Constrained
from jaxgen.generation.programs.stages import Stage
from jaxgen.generation.prompts.layout import bucket, pad_to
from jaxgen.generation.prompts.rows import Rows


class ConstrainedRows(Constrained):
    """The same where rows may be free."""

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        """The logits, of some rows changed."""
        assert self.automata is not None and rows.constrained is not None
        asked = rows.constrained != len(self.automata.distance) - 1

        def restricted() -> Logits:
            return jnp.where(asked[:, None], super(ConstrainedRows, self).__call__(logits, rows), logits)

        return jax.lax.cond((asked & rows.running).any(), restricted, lambda: logits)


class Room:
    """The room of all rows, each for `states` states and `classes` classes of tokens."""

    def __init__(self, rows: int, vocab_size: int, size: tuple[int, int], device: Any):
        self.states, self.classes = (
            bucket(integer(1)(f"constraints[{place}]", count)) for place, count in enumerate(size)
        )
        self._rows, self._vocab_size, self._device = rows, vocab_size, device
        self.free = rows * self.states  # the state of a row without a constraint
        self._automata: Automata | None = None

    @property
    def automata(self) -> Automata:
        """All of it, on the device."""
        automata = jax.device_put(self._empty(), self._device) if self._automata is None else self._automata
        self._automata = automata
        return automata

    @property
    def bytes(self) -> int:
        """What all of it takes on the device."""
        states = self.free + 1
        return 4 * states * self.classes + 5 * states + self._rows * (2 * self._vocab_size + 8)

    def _empty(self) -> Automata:
        table = np.full((self.free + 1, self.classes), NO_WAY, np.int32)
        distance = np.zeros(self.free + 1, np.int32)
        table[self.free], distance[self.free] = self.free, FREE
        return Automata(
            classes=np.zeros((self._rows, self._vocab_size), np.int16),
            table=table,
            distance=distance,
            ends=np.zeros(self.free + 1, bool),
            starts=np.full(self._rows, self.free, np.int32),
            which=np.arange(self._rows, dtype=np.int32),
        )

    def automaton(self, given: object, tokenizer: Any, eos: tuple[int, ...]) -> Automaton | None:
        """That of a request, or None. Raises `JaxgenError` for what cannot be met, or is larger than the room."""
        [constraint] = checked(given, 1)
        if isinstance(constraint, Grammar):
            raise UnsupportedError(
                f"constraint={shown(constraint)}: a grammar, which the host reads between tokens, and an engine looks "
                "only every few; use regex, choice or json_schema, or model.generate"
            )
        if constraint is None:
            return None
        automaton = automaton_of(constraint, tokenizer, self._vocab_size, eos)
        states, classes = automaton.table.shape
        if states > self.states or classes > self.classes:
            raise JaxgenError(
                f"constraint: {shown(constraint)} has {states} states and {classes} classes of tokens, and a row has "
                f"room for {self.states} and {self.classes}; Engine(constraints=) says how much"
            )
        return automaton

    def put(self, row: int, automaton: Automaton | None) -> int:
        """Write an automaton into a row's room; the state in which the row begins."""
        if automaton is None:
            return self.free
        table = np.full((self.states, self.classes), NO_WAY, np.int32)
        table[: automaton.table.shape[0], : automaton.table.shape[1]] = automaton.table
        distance, ends = (pad_to(x, (self.states,)) for x in (automaton.distance, automaton.ends))
        self._automata, before = None, self.automata  # it is donated, and lost if that fails
        self._automata = _WRITE(before, np.int32(row), automaton.classes, table, distance, ends)
        return row * self.states

    def forget(self) -> None:
        """No row has any more, and what is on the device may be lost."""
        self._automata = None

    def warmup(self) -> None:
        """Compile what writes."""
        nothing = Automaton(
            np.zeros(self._vocab_size, np.int16),
            np.full((1, 1), NO_WAY, np.int32),
            np.zeros(1, np.int32),
            np.ones(1, bool),
        )
        self.put(0, nothing)


def _write(
    automata: Automata,
    row: Count,
    classes: Int[Array, " V"],
    table: Int[Array, "S C"],
    distance: Int[Array, " S"],
    ends: Bool[Array, " S"],
) -> Automata:
    first = row * len(table)

    def put(whole: Any, part: Any, at: Any) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(whole, part, at, axis=0)

    return Automata(
        classes=put(automata.classes, classes[None], row),
        table=put(automata.table, jnp.where(table == NO_WAY, NO_WAY, table + first), first),
        distance=put(automata.distance, distance, first),
        ends=put(automata.ends, ends, first),
        starts=automata.starts,
        which=automata.which,
    )


_WRITE = Stage(_write, lambda *_: "engine: constraint", donate_argnums=0)
