"""What the device does for rows that come and go: a few small programs beside the `decode` of every call.

One state of fixed shape, donated from program to program. A row is free, or being read, or running; free rows and
those being read are IDLE to `decode`, which feeds them their newest token again: it lands in the slot that it belongs
to, and is overwritten when the row is read on.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt32

from jaxgen.generation.choosing.sample import row_key
from jaxgen.generation.choosing.stop import IDLE, RUNNING, TIME
from jaxgen.generation.loop import DecodeState, PlainSearch
from jaxgen.generation.programs.inputs import BatchLayout, TracedOptions
from jaxgen.generation.programs.stages import Stage, stages_for
from jaxgen.generation.programs.strict import DETERMINISTIC_OPTIONS
from jaxgen.generation.programs.structure import references, same_arrays, split
from jaxgen.generation.prompts.prefill import read_piece
from jaxgen.generation.results.step_outputs import StepOutputs
from jaxgen.pytree import pytree

Count = Int[Array | np.ndarray, ""]


class Entry(NamedTuple):
    """What a request brings into a row, for the device in one array: of each array that is sent the host has work."""

    row: Any
    length: Any  # of the prompt
    max_length: Any  # at which the row ends
    held: Any  # how many tokens the row's cache holds already
    sample: Any  # which of its samples
    constrained: Any  # where it is in its constraint, if there is room for any
    key: UInt32[Array | np.ndarray, " 2"]  # of the call, two words
    row_id: UInt32[Array | np.ndarray, " 2"]  # two words, see `sample.row_id_words`
    tokens: Int[Array | np.ndarray, " S"]  # the prompt, then anything

    def packed(self) -> UInt32[np.ndarray, " E"]:
        """All of it, behind each other."""
        numbers = np.array(self[:6], np.uint32)
        return np.concatenate([numbers, self.key, self.row_id, np.asarray(self.tokens, np.uint32)])

    @classmethod
    def unpacked(cls, packed: UInt32[Array, " E"]) -> "Entry":
        """The same on the device."""
        numbers, key, row_id, tokens = jnp.split(packed, (6, 8, 10))
        return cls(*numbers.astype(jnp.int32), key=key, row_id=row_id, tokens=tokens.astype(jnp.int32))


class Piece(NamedTuple):
    """`count` tokens of a row's prompt, from position `start` on; in one array."""

    row: Any
    start: Any
    count: Any
    tokens: Int[Array | np.ndarray, " T"]  # and then anything

    def packed(self) -> Int[np.ndarray, " P"]:
        """All of it, behind each other."""
        return np.concatenate([np.array(self[:3], np.int32), self.tokens])


@pytree
@dataclasses.dataclass
class News:
    """What rows have got since the host looked last: W tokens at most, of which `lengths` says how many."""

    tokens: Int[Array, "R W"]
    logprobs: Float[Array, "R W"]
    model_logprobs: Float[Array, "R W"]
    lengths: Int[Array, " R"]  # new tokens since the prompt, those of earlier looks included
    status: Int[Array, " R"]
    top_logprobs: Float[Array, "R W n"] | None
    top_ids: Int[Array, "R W n"] | None


def opened(structure: Any, weights: Any, rows: int, layout: BatchLayout, free: int | None) -> DecodeState:
    """A state without a request; `free` is where rows without a constraint are."""
    model = structure.module(weights)
    cache = model.empty_cache(rows, layout.slots, layout.int8_cache)
    ones = jnp.ones(rows, jnp.int32)
    logits, _ = jax.eval_shape(model.step, ones, ones, cache)
    tables = (rows, layout.total)
    return DecodeState(
        tokens=jnp.zeros(tables, jnp.int32),
        lengths=ones,
        prompt_lengths=ones,
        prompts=jnp.arange(rows),
        max_lengths=2 * ones,
        status=jnp.full(rows, IDLE, jnp.int8),
        logprobs=jnp.zeros(tables, jnp.float32),
        model_logprobs=jnp.zeros(tables, jnp.float32),
        row_keys=jax.random.wrap_key_data(jnp.zeros((rows, 2), jnp.uint32), impl="threefry2x32"),
        cache=cache,
        matched=None,
        constrained=None if free is None else free * ones,
        negative_shift=None,
        given=jnp.full(tables, -1, jnp.int32),  # nobody is told anything: as in a strict call
        step_outputs=StepOutputs.empty(layout.static, rows, logits.shape[1]),
    )


def insert(state: DecodeState, packed: UInt32[Array, " E"]) -> DecodeState:
    """Put a request into a row: an `Entry`."""
    entry = Entry.unpacked(packed)
    row = entry.row

    def put(table: Array, value: Any) -> Array:
        return jax.lax.dynamic_update_index_in_dim(table, jnp.asarray(value, table.dtype), row, 0)

    key = jax.random.wrap_key_data(jnp.asarray(entry.key), impl="threefry2x32")
    key = row_key(key, jnp.asarray(entry.row_id), entry.sample)
    state = dataclasses.replace(
        state,
        tokens=put(state.tokens, entry.tokens),
        prompt_lengths=put(state.prompt_lengths, entry.length),
        max_lengths=put(state.max_lengths, entry.max_length),
        row_keys=state.row_keys.at[row].set(key),
        constrained=None if state.constrained is None else put(state.constrained, entry.constrained),
    )
    return _holding(state, row, entry.held)


def read(structure: Any, weights: Any, state: DecodeState, packed: Int[Array, " P"]) -> DecodeState:
    """Read a `Piece` of a prompt; before its last token, the row runs."""
    row, start, count = packed[:3]
    cache = read_piece(structure.module(weights), state.cache, row, packed[3:], start, count)
    return _holding(dataclasses.replace(state, cache=cache), row, start + count)


def _holding(state: DecodeState, row: Count, held: Count) -> DecodeState:
    """The state where a row's cache holds so many tokens of its prompt."""
    runs = held + 1 >= state.prompt_lengths[row]
    return dataclasses.replace(
        state,
        lengths=state.lengths.at[row].set(held + 1),
        status=state.status.at[row].set(jnp.where(runs, RUNNING, IDLE).astype(jnp.int8)),
    )


def copy(state: DecodeState, source: Count, row: Count, held: Count) -> DecodeState:
    """Give a row the keys and values of another one, whose first `held` tokens are those of the row's prompt."""

    def put(x: Array) -> Array:
        return jax.lax.dynamic_update_slice_in_dim(x, jax.lax.dynamic_slice_in_dim(x, source, 1), row, axis=0)

    return _holding(dataclasses.replace(state, cache=jax.tree.map(put, state.cache)), row, held)


def evict(state: DecodeState, rows: Bool[Array, " R"]) -> DecodeState:
    """End some rows."""
    return dataclasses.replace(state, status=jnp.where(rows, jnp.int8(TIME), state.status))


def look(state: DecodeState, since: Int[Array, " R"], width: int) -> News:
    """What rows have got after their first `since` new tokens."""
    column = since[:, None] + jnp.arange(width)
    slot = jnp.minimum(state.prompt_lengths[:, None] + column, state.tokens.shape[1] - 1)

    def at(table: Array, index: Array) -> Array:
        index = index.reshape(*index.shape, *(1,) * (table.ndim - 2))
        return jnp.take_along_axis(table, index, axis=1)

    def recorded(table: Array | None) -> Array | None:
        return None if table is None else at(table, jnp.minimum(column, table.shape[1] - 1))

    return News(
        tokens=at(state.tokens, slot),
        logprobs=at(state.logprobs, slot),
        model_logprobs=at(state.model_logprobs, slot),
        lengths=state.lengths - state.prompt_lengths,
        status=state.status,
        top_logprobs=recorded(state.step_outputs.top_logprobs),
        top_ids=recorded(state.step_outputs.top_ids),
    )


@dataclasses.dataclass(frozen=True, eq=False)
class Weights:
    """A model's weights as they were at some time."""

    structure: Any
    arrays: list[Any]

    @classmethod
    def of(cls, model: Any) -> "Weights":
        """As they are now."""
        return cls(*split(model))

    def references(self) -> tuple[Any, ...]:
        """Which arrays they are, without keeping them."""
        return references(self.arrays)

    def same(self, other: "Weights | None") -> bool:
        """Whether others are the same arrays in the same module."""
        if other is None or self.structure != other.structure:
            return False
        return same_arrays(other.references(), self.arrays)


class Programs(NamedTuple):
    """The programs of an engine; each but the first and last uses up the state that it is given."""

    opened: Callable[[Any], DecodeState]
    insert: Callable[[DecodeState, Any], DecodeState]
    read: Callable[[Any, DecodeState, Any], DecodeState]
    copy: Callable[[DecodeState, Any, Any, Any], DecodeState]
    evict: Callable[[DecodeState, Any], DecodeState]
    decode: Callable[[Any, DecodeState, Any, TracedOptions], DecodeState]
    look: Callable[[DecodeState, Any], News]


def _named(name: str) -> Callable[..., str]:
    return lambda *args: f"engine: {name}"


_OPENED = Stage(opened, _named("state"), static_argnums=(0, 2, 3, 4))
_INSERT = Stage(insert, _named("insert"), donate_argnums=0)
_READ = Stage(read, _named("read"), static_argnums=0, donate_argnums=2)
_READ_ON_GPU = Stage(read, _named("read"), static_argnums=0, donate_argnums=2, compiler_options=DETERMINISTIC_OPTIONS)
_COPY = Stage(copy, _named("copy"), donate_argnums=0)
_EVICT = Stage(evict, _named("evict"), donate_argnums=0)
_LOOK = Stage(look, _named("look"), static_argnums=2)


def programs_for(model: Any, rows: int, layout: BatchLayout, steps: int, free: int | None) -> Programs:
    """The programs for models of a kind, in one shape; at most `steps` tokens per row between two looks.

    `free` is the state of rows without a constraint; None: there is no room for any.
    """
    _, decode = stages_for(model, split(model)[1], strict=True)
    reading = _READ_ON_GPU if model.device.platform == "gpu" else _READ
    place = getattr(model, "everywhere", model.device)

    def opening(weights: Weights) -> DecodeState:
        # Put where the weights are by name, or the first state would be of another kind to jit than those that follow.
        state = _OPENED(weights.structure, weights.arrays, rows, layout, free)
        # On a mesh the cache lies where its heads are.
        cache = jax.device_put(state.cache, place) if isinstance(place, jax.Device) else state.cache
        return dataclasses.replace(jax.device_put(dataclasses.replace(state, cache=[]), place), cache=cache)

    def decoding(weights: Weights, state: DecodeState, until: Any, traced: TracedOptions) -> DecodeState:
        models = (PlainSearch(), weights.structure, weights.arrays, None, None)
        return decode(*models, state, until, traced, layout.static)

    return Programs(
        opened=opening,
        insert=_INSERT,
        read=lambda weights, state, piece: reading(weights.structure, weights.arrays, state, piece),
        copy=_COPY,
        evict=_EVICT,
        decode=decoding,
        look=lambda state, since: _LOOK(state, since, steps),
    )
