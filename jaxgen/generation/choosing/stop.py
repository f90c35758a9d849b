"""When a row ends, and why: one small number per row."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from jaxgen.errors import JaxgenError, NonFiniteLogitsError

RUNNING, EOS, STOP_STRING, CRITERION, LENGTH, BROKEN, IDLE, TIME, COMPLETE = range(9)
# What a user reads. Broken rows raise, and idle ones only fill up a bucket.
FINISH_REASON = {
    EOS: "eos",
    STOP_STRING: "stop_string",
    CRITERION: "criterion",
    LENGTH: "length",
    TIME: "time",
    COMPLETE: "complete",
}
Completes = tuple[Bool[Array, " R"], Bool[Array, " R"]]


def status_after(
    *,
    is_eos: Bool[Array, " R"],
    hits_stop_string: Bool[Array, " R"],
    meets_criterion: Bool[Array, " R"],
    reaches_limit: Bool[Array, " R"],
    completes: Completes | None = None,
) -> Int[Array, " R"]:
    """The status of rows that have just been given a token; of several reasons to end, the first counts.

    With a constraint, `completes` says of each row whether its text is whole, and whether nothing may follow.
    """
    reasons = [(LENGTH, reaches_limit), (CRITERION, meets_criterion), (STOP_STRING, hits_stop_string), (EOS, is_eos)]
    if completes is not None:
        whole, ends = completes
        reasons.insert(1, (COMPLETE, ends | reaches_limit & whole))
    status = jnp.zeros(is_eos.shape, jnp.int8)
    for code, applies in reasons:
        status = jnp.where(applies, jnp.int8(code), status)
    return status


def meets_any(
    criteria: tuple[Any, ...], tokens: Int[Array, "R S"], lengths: Int[Array, " R"], scores: Float[Array, "R V"]
) -> Bool[Array, " R"]:
    """Which rows one of the user's criteria `f(tokens, lengths, scores) -> bool [R]` ends.

    Raises `JaxgenError`, while tracing, for a result of another shape or dtype.
    """
    met = jnp.zeros(lengths.shape, bool)
    for criterion in criteria:
        ends = jnp.asarray(criterion(tokens, lengths, scores))
        if ends.shape != met.shape or ends.dtype != met.dtype:
            raise JaxgenError(
                f"a stopping criterion returned {ends.dtype} of shape {ends.shape}; expected bool {met.shape}"
            )
        met |= ends
    return met


def raise_if_broken(status: Int[np.ndarray, " R"], new_tokens: Int[np.ndarray, " R"]) -> None:
    """Raise `NonFiniteLogitsError` if a row met logits that are not finite."""
    broken = np.flatnonzero(status == BROKEN)
    if broken.size:
        raise NonFiniteLogitsError(broken.tolist(), new_tokens[broken].tolist())
