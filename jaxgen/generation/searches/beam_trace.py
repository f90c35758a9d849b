"""The result of a beam search, on the host: sequences are read back along the trace that the beams left."""

from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxgen.generation.choosing.stop import TIME, raise_if_broken


class Sequences(NamedTuple):
    """What a search returns, on the host: N new tokens in the longest of R sequences, zeros behind a sequence's end."""

    tokens: Int[np.ndarray, "R N"]
    logprobs: Float[np.ndarray, "R N"]
    model_logprobs: Float[np.ndarray, "R N"]
    beam_indices: Int[np.ndarray, "R N"]  # the row whose scores gave the token; -1 behind the end
    lengths: Int[np.ndarray, " R"]
    scores: Float[np.ndarray, " R"]
    status: Int[np.ndarray, " R"]


def best_sequences(state: Any, prompts: int, beams: int, returned: int, length_penalty: float) -> Sequences:
    """The `returned` best sequences of each of the first `prompts` prompts of a `BeamState`, best first.

    Where time ran out, the running beams count as ended. Raises `NonFiniteLogitsError` if a search met NaN.
    """
    tables = ("picked", "parents", "logprobs", "model_logprobs")
    names = (*tables, "finished", "scores", "lengths", "prompt_lengths", "status")
    arrays = jax.device_get({name: getattr(state, name) for name in names})
    arrays = jax.tree.map(lambda x: x[: prompts * beams], arrays)
    lengths, starts, status = arrays["lengths"], arrays["prompt_lengths"], arrays["status"]
    raise_if_broken(status[::beams], (lengths - starts)[::beams])

    final = vars(arrays["finished"])
    if (status == TIME).any():
        final = _with_running(final, arrays, beams, length_penalty)
    chosen = (np.arange(prompts)[:, None] * beams + np.arange(returned)).reshape(-1)
    final, starts = {name: x[chosen] for name, x in final.items()}, starts[chosen]
    counts = final["lengths"] - starts
    shape = (len(chosen), int(counts.max()))
    trace = {name: np.zeros(shape, arrays[name].dtype) for name in tables}
    trace["parents"] -= 1
    source = np.zeros(len(chosen), np.int32)
    for step in reversed(range(shape[1])):
        slot, newest, inside = starts + step, step == counts - 1, step < counts
        here = np.minimum(slot, arrays["picked"].shape[1] - 1)
        values = {name: np.where(newest, final[name], arrays[name][source, here]) for name in tables}
        for name in tables:
            trace[name][:, step] = np.where(inside, values[name], trace[name][:, step])
        source = np.where(inside, values["parents"], source)
    return Sequences(
        trace["picked"],
        trace["logprobs"],
        trace["model_logprobs"],
        trace["parents"],
        counts,
        final["scores"],
        final["reasons"],
    )


def _with_running(
    final: dict[str, np.ndarray], arrays: dict[str, Any], beams: int, length_penalty: float
) -> dict[str, np.ndarray]:
    """What had ended and, where time ran out, the beams that had not: the best of both per prompt, best first."""
    lengths, late = arrays["lengths"], arrays["status"] == TIME
    row, newest = np.arange(len(lengths)), lengths - 1
    running = {name: arrays[name][row, newest] for name in ("picked", "parents", "logprobs", "model_logprobs")} | {
        "scores": arrays["scores"] / (lengths - arrays["prompt_lengths"]).astype(np.float32) ** length_penalty,
        "done": late,
        "lengths": lengths,
        "reasons": np.full(len(lengths), TIME, np.int8),
    }
    running["scores"] = np.where(late, running["scores"], -np.inf).astype(np.float32)
    both = {
        name: np.concatenate([final[name].reshape(-1, beams), running[name].reshape(-1, beams)], 1) for name in final
    }
    # What had not ended gives way to what was still running, however bad.
    order = np.lexsort((-both["scores"], ~both["done"]))[:, :beams]
    return {name: np.take_along_axis(x, order, axis=1).reshape(-1) for name, x in both.items()}
