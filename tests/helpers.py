"""What several test files use: counting compilations, laying out rows, and small ways into the library."""

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.tree_util import Partial

from jaxgen.generation.choosing.stop_strings import StopStrings
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.processors.chain import chain_of
from jaxgen.generation.prompts.rows import Rows
from jaxgen.models.mistral import MistralForCausalLM

# A test at its full size, of which a smaller one is among the others: `.ci/run --only soak`.
SOAK = (pytest.mark.slow, pytest.mark.soak)


def some_slow(
    values: Iterable[Any],
    slow: Callable[[Any], bool] = lambda value: False,
    soak: Callable[[Any], bool] = lambda value: False,
) -> list[Any]:
    """Values of a parameter, or tuples of several; those that are `slow` are not among the default tests.

    Those that are for a `soak` are not among the slow ones that CI runs either.
    """
    return [
        pytest.param(
            *(value if isinstance(value, tuple) else (value,)),
            marks=SOAK if soak(value) else pytest.mark.slow if slow(value) else (),
        )
        for value in values
    ]


# Compilations, whoever asks for them.

EVENT = "/jax/core/compile/backend_compile_duration"
_compilations: list[str] = []


def _note(event: str, duration_secs: float, **_: Any) -> None:
    if event == EVENT:
        _compilations.append(event)


jax.monitoring.register_event_duration_secs_listener(_note)


@contextlib.contextmanager
def counted() -> Iterator[list[str]]:
    """The compilations inside the block, whoever asked for them."""
    start, inside = len(_compilations), []
    yield inside
    inside += _compilations[start:]


# Rows of tokens.


def padded(rows: list[list[int]], side: str, extra: int, filler: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Rows as a table and its mask: padded left or right, or with holes in front of every token while they last."""
    width = max(map(len, rows)) + extra
    ids, mask = np.full((len(rows), width), filler), np.zeros((len(rows), width), int)
    for row, tokens in enumerate(rows):
        space = width - len(tokens)
        columns = {
            "left": np.arange(space, width),
            "right": np.arange(len(tokens)),
            "holes": np.minimum(2 * np.arange(len(tokens)) + 1, np.arange(len(tokens)) + space),
        }[side]
        ids[row, columns], mask[row, columns] = tokens, 1
    return ids, mask


# A model's logits and gradients.

Models = Callable[[str], MistralForCausalLM]


@nnx.jit
def forward(model: MistralForCausalLM, ids: jax.Array, mask: jax.Array) -> jax.Array:
    return model(ids, mask).logits


def real_logits(model: MistralForCausalLM, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Each row's logits at its real tokens."""
    logits = np.asarray(forward(model, jnp.asarray(ids), jnp.asarray(mask)))
    return [row[real == 1] for row, real in zip(logits, mask, strict=True)]


@functools.partial(jax.jit, static_argnums=0)
def _loss_and_gradients(structure: nnx.GraphDef, weights: nnx.State, ids: jax.Array, mask: jax.Array):
    def loss(weights: nnx.State) -> jax.Array:
        log_probs = jax.nn.log_softmax(nnx.merge(structure, weights)(ids, mask).logits)
        chosen = jnp.take_along_axis(log_probs[:, :-1], ids[:, 1:, None], axis=-1)[..., 0]
        pairs = mask[:, :-1] * mask[:, 1:]  # of neighbouring real tokens
        return -(chosen * pairs).sum() / pairs.sum()

    return jax.value_and_grad(loss)(weights)


def loss_and_gradients(model: MistralForCausalLM, ids: np.ndarray, mask: np.ndarray) -> tuple[float, dict]:
    """Mean next-token loss over real tokens, and its gradient for every parameter."""
    structure, weights = nnx.split(model)
    value, gradients = _loss_and_gradients(structure, weights, jnp.asarray(ids), jnp.asarray(mask))
    leaves = jax.tree_util.tree_leaves_with_path(gradients)
    return float(value), {jax.tree_util.keystr(path): np.asarray(leaf) for path, leaf in leaves}


# Processors, alone.

traces = []  # one entry per compilation of `run`


@jax.jit
def run(chain: tuple[Partial, ...], logits: jax.Array, rows: Rows) -> jax.Array:
    traces.append(len(chain))
    for entry in chain:
        logits = entry(logits, rows)
    return logits


def rows_of(
    histories: Sequence[Sequence[int]],
    new_tokens: Sequence[int] | None = None,
    max_lengths: Sequence[int] | None = None,
    slots: int = 8,
    garbage: int = 0,
) -> Rows:
    """Rows that hold `histories`; what stands behind their end is `garbage`, which nothing may look at."""
    tokens = np.full((len(histories), slots), garbage, np.int32)
    for row, history in enumerate(histories):
        tokens[row, : len(history)] = history
    lengths = np.array([len(history) for history in histories], np.int32)
    return Rows(
        tokens=jnp.asarray(tokens),
        lengths=jnp.asarray(lengths),
        prompt_lengths=jnp.asarray(lengths - np.array(new_tokens or [0] * len(histories), np.int32)),
        max_lengths=jnp.asarray(np.array(max_lengths or [100] * len(histories), np.int32)),
        prompts=jnp.arange(len(histories), dtype=jnp.int32),
        running=jnp.ones(len(histories), bool),
    )


def processed(
    options: dict[str, Any], logits: Any, rows: Rows | None = None, **chain_options: Any
) -> list[list[float]]:
    """What the chain of these options makes of the logits; top_k is off unless it is given."""
    logits = jnp.asarray(np.array(logits, np.float32))
    rows = rows_of([[0]] * len(logits)) if rows is None else rows
    config = GenerationConfig(**{"top_k": 0, **options})
    return np.asarray(run(chain_of(config, logits.shape[1], **chain_options), logits, rows)).tolist()


def floats(values: Any) -> np.ndarray:
    return np.asarray(values, np.float32)


def assert_same(actual: np.ndarray, expected: np.ndarray, ties: bool, rtol: float = 1e-5) -> None:
    """The same entries are removed; what stays has the same value.

    `ties`: where equal logits are cut apart, which ones go is up to torch's sort, so only the values are compared.
    """
    both = ~np.isneginf(actual) & ~np.isneginf(expected)
    np.testing.assert_allclose(actual[both], expected[both], rtol=rtol, atol=1e-6)
    if ties:
        np.testing.assert_allclose(np.sort(actual), np.sort(expected), rtol=rtol, atol=1e-6)
    else:
        np.testing.assert_array_equal(np.isneginf(actual), np.isneginf(expected))


# Stop strings, alone.

SLOTS = 24


@jax.jit
def decide(stop: StopStrings, tokens: jax.Array, prompts: jax.Array) -> jax.Array:
    """For rows [R, SLOTS] whose first `prompts` tokens are the prompt: did a stop string end in the token, per slot.

    False in the prompt: nothing is asked there.
    """

    def step(state, slot):
        after, ended = stop.advance(state, tokens[:, slot])
        given = slot < prompts
        return jnp.where(given, state, after), ended & ~given

    start = stop.start(tokens, prompts)
    return jax.lax.scan(step, start, jnp.arange(SLOTS))[1].T


def decisions(stop: StopStrings, ids: list[int], prompt: int) -> list[bool]:
    """Those of one row, for each token after the prompt."""
    row = np.zeros((1, SLOTS), np.int32)
    row[0, : len(ids)] = ids
    return np.asarray(decide(stop, jnp.asarray(row), jnp.array([prompt])))[0, prompt : len(ids)].tolist()
