"""What only the caller knows: which tokens may come next, and processors of the user's own."""

import contextlib
import dataclasses
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxgen.errors import JaxgenError
from jaxgen.generation.processors.processor import Call, Logits, Processor, static
from jaxgen.generation.prompts.rows import Rows


@no_type_check  # its own check says what is wrong
@dataclasses.dataclass(frozen=True)
class AllowedTokens:
    """A `prefix_allowed_tokens_fn` that runs inside the compiled loop.

    `function(tokens [S], length) -> bool [V]` sees one row: its tokens, of which the first `length` count, and says
    for each token of the vocabulary whether it may come next. It is traced, so it is written in jax.numpy; numbers
    that change from call to call go into a `jax.tree_util.Partial`. Where it allows nothing the row is broken.

    >>> AllowedTokens(lambda tokens, length: jax.numpy.arange(8) != tokens[length - 1])  # doctest: +ELLIPSIS
    AllowedTokens(function=<function ...>)
    """

    function: Callable[..., Any]

    def __post_init__(self):
        as_pytree(self.function, "AllowedTokens")


def as_pytree(function: object, name: str) -> Any:
    """`function` as something that jit takes as an argument: static, unless it is a pytree of its own numbers.

    Raises `JaxgenError` for what cannot be called, or not be compared with the function of the next call.
    """
    if not callable(function):
        raise JaxgenError(f"{name}={function!r} must be a function")
    if not jax.tree_util.all_leaves([function]):
        return function
    try:
        hash(function)
    except TypeError as error:
        raise JaxgenError(f"{name}={function!r} cannot be hashed; pass a plain function") from error
    return jax.tree_util.Partial(function)


class UserProcessors(Processor):
    """Processors of the user's, one after the other: `function(tokens [R, S], lengths [R], logits [R, V]) -> logits`.

    Raises `JaxgenError`, while tracing, where one returns another shape.
    """

    functions: tuple[Any, ...]

    @classmethod
    def of(cls, value: object, call: Call) -> "UserProcessors":
        if callable(value) or not isinstance(value, Iterable):
            raise JaxgenError(f"logits_processor={value!r} must be a list of functions")
        return cls(tuple(as_pytree(function, f"logits_processor[{i}]") for i, function in enumerate(value)))

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        for function in self.functions:
            result = jnp.asarray(function(rows.tokens, rows.lengths, logits))
            if result.shape != logits.shape:
                raise JaxgenError(f"a logits processor returned shape {result.shape}; expected {logits.shape}")
            logits = result.astype(logits.dtype)
        return logits


class AllowedPrefixes(Processor):
    """Remove what HF's `function(batch_id, ids) -> list[int]` does not allow, asking it on the host.

    `batch_id` is the prompt's index in the call, `ids` an int32 numpy array of the row's tokens; only rows that run
    are asked. What it raises ends the computation: `host_errors` says how. Source: De Cao et al. 2020
    (arXiv 2010.00904); transformers `PrefixConstrainedLogitsProcessor`.
    """

    function: Any
    beams: bool = static()

    @classmethod
    def of(cls, value: object, call: Call) -> "AllowedPrefixes":
        kind = _AllowedByTrace if isinstance(value, AllowedTokens) else AllowedPrefixes
        function = value.function if isinstance(value, AllowedTokens) else value
        return kind(as_pytree(function, "prefix_allowed_tokens_fn"), call.beams)

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        number, vocab_size = logits.shape

        def ask(function: Any, *row_arrays: object) -> np.ndarray:
            tokens, lengths, prompts, running = (np.asarray(array) for array in row_arrays)
            allowed = np.ones((number, vocab_size), bool)
            try:
                for row in np.flatnonzero(running):
                    prompt, ids = int(prompts[row]), tokens[row, : lengths[row]].copy()
                    allowed[row] = _listed(function(prompt, ids), prompt, vocab_size)
            except Exception as error:
                raise RuntimeError(_remember(error)) from error
            return allowed

        shape = jax.ShapeDtypeStruct(logits.shape, bool)
        told = (rows.tokens, rows.lengths, rows.prompts, rows.running)
        return restrict(logits, rows, jax.pure_callback(ask, shape, self.function, *told), self.beams)


class _AllowedByTrace(AllowedPrefixes):
    """Remove what an `AllowedTokens` function does not allow. Raises `JaxgenError` for a result of another form."""

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        allowed = jnp.asarray(jax.vmap(self.function)(rows.tokens, rows.lengths))
        if allowed.shape != logits.shape or allowed.dtype != bool:
            raise JaxgenError(
                f"AllowedTokens returned {allowed.dtype} {list(allowed.shape[1:])} for a row; "
                f"expected bool [{logits.shape[1]}], one entry per token of the vocabulary"
            )
        return restrict(logits, rows, allowed, self.beams)


def _listed(tokens: object, prompt: int, vocab_size: int) -> Bool[np.ndarray, " V"]:
    ids = np.asarray(tokens)
    if ids.size == 0:
        raise JaxgenError(f"prefix_allowed_tokens_fn allowed no token for row {prompt}: the constraint cannot be met")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise JaxgenError(
            f"prefix_allowed_tokens_fn returned {tokens!r} for row {prompt}; expected a list of token ids"
        )
    if (outside := ids[(ids < 0) | (ids >= vocab_size)]).size:
        raise JaxgenError(
            f"prefix_allowed_tokens_fn allowed token {outside[0]} for row {prompt}, "
            f"outside the model's vocabulary of {vocab_size} tokens"
        )
    allowed = np.zeros(vocab_size, bool)
    allowed[ids] = True
    return allowed


def restrict(logits: Logits, rows: Rows, allowed: Bool[Array, "R V"], beams: bool) -> Logits:
    """-inf where not allowed. A row with nothing left but -inf chooses evenly among what is allowed.

    With beams this takes all beams of a prompt to have nothing left: one alone simply dies.
    """
    only = jnp.where(allowed, 0.0, -jnp.inf)
    scores = logits + only
    dead = jnp.isneginf(scores.max(axis=1))
    if beams:
        siblings = rows.prompts[:, None] == rows.prompts
        dead = ~(siblings & ~dead).any(axis=1)
    return jnp.where(dead[:, None], only, scores)


# JAX reports an exception from a callback as text in an error of its own. The original waits here for `host_errors`.
_MARK = "jaxgen host error "
_KEPT = 16  # nobody may ever come for one
_errors: dict[int, Exception] = {}
_numbers = itertools.count()
_lock = threading.Lock()


def _remember(error: Exception) -> str:
    with _lock:
        number = next(_numbers)
        _errors[number] = error
        for old in sorted(_errors)[:-_KEPT]:
            del _errors[old]
    return f"{_MARK}{number}: {error}"


@contextlib.contextmanager
def host_errors() -> Iterator[None]:
    """Let an exception from a host function appear as itself, when the result is waited for in here."""
    try:
        yield
    except Exception as error:
        found = re.search(rf"{_MARK}(\d+)", str(error))
        with _lock:
            original = _errors.pop(int(found[1]), None) if found else None
        if original is None:
            raise
        raise original from None
