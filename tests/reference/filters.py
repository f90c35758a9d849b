"""Inputs of the logits processors, and the settings they are tried with: no torch, same numbers everywhere."""

from dataclasses import dataclass

import numpy as np

from tests.reference.weights import integers, normals

VOCAB = 131  # above 64, so that a top_k of 100 lies beyond jaxgen's smallest static bound
SEED = 5
EOS = (7, 90)

# In HF's names; several settings together are applied in HF's order.
SETTINGS: dict[str, dict[str, float | int]] = {
    **{f"repetition_penalty={x}": {"repetition_penalty": x} for x in (1.3, 0.7, 5.0)},
    **{f"min_new_tokens={x}": {"min_new_tokens": x} for x in (1, 4, 100)},
    **{f"temperature={x}": {"temperature": x} for x in (0.1, 0.7, 3.0)},
    **{f"top_k={x}": {"top_k": x} for x in (1, 5, 50, 64, 100, 1000)},
    **{f"top_p={x}": {"top_p": x} for x in (0.1, 0.5, 0.9, 0.99)},
    **{f"min_p={x}": {"min_p": x} for x in (0.01, 0.1, 0.5, 1.0)},
    "temperature,top_p": {"temperature": 0.5, "top_p": 0.9},
    "temperature,min_p": {"temperature": 2.0, "min_p": 0.2},
    "top_k,top_p": {"top_k": 10, "top_p": 0.8},
    "top_p,min_p": {"top_p": 0.95, "min_p": 0.3},
    "penalty,min_new_tokens": {"repetition_penalty": 1.7, "min_new_tokens": 4},
    "all": {
        "repetition_penalty": 1.2, "min_new_tokens": 4, "temperature": 0.8, "top_k": 20, "top_p": 0.9, "min_p": 0.05,
    },
}  # fmt: skip


@dataclass(frozen=True)
class Inputs:
    """Logits of a ragged batch, and what each row has read: a left-padded prompt, then `new_tokens` of its own."""

    logits: np.ndarray  # float32 [B, V]
    ids: np.ndarray  # int32 [B, T]; padding holds an id that no real token of the row has
    mask: np.ndarray  # int32 [B, T]
    new_tokens: np.ndarray  # int32 [B]

    def history(self, row: int) -> np.ndarray:
        """The row's real tokens."""
        return self.ids[row][self.mask[row] == 1]

    def seen(self) -> np.ndarray:
        """bool [B, V]: which tokens a row has read."""
        seen = np.zeros(self.logits.shape, bool)
        for row in range(len(seen)):
            seen[row, self.history(row)] = True
        return seen


def inputs(seed: int, vocab: int = VOCAB) -> Inputs:
    """Eight rows: ordinary, ordinary, many ties, some -inf, peaked, nearly flat, all equal, all negative."""
    stream = np.random.PCG64(seed)
    logits = 3 * normals(stream, (8, vocab))
    logits[2] = np.round(logits[2])
    logits[3, integers(stream, vocab, vocab // 2)] = -np.inf
    logits[4, integers(stream, vocab, 1)] += 20
    logits[5] *= 1e-2
    logits[6] = 1.5
    logits[7] = -np.abs(logits[7]) - 1
    ids, mask = np.zeros((8, 24), np.int32), np.zeros((8, 24), np.int32)
    for row, length in enumerate(8 + integers(stream, 17, 8)):
        history = integers(stream, vocab, int(length))
        ids[row] = min(set(range(vocab)) - set(history.tolist()))
        ids[row, -length:], mask[row, -length:] = history, 1
    return Inputs(logits.astype(np.float32), ids, mask, (integers(stream, 8, 8)).astype(np.int32))


def undecided(logits: np.ndarray, settings: dict[str, float | int], margin: float = 2e-6) -> np.ndarray:
    """bool [B]: rows where top_p or min_p hangs on the last bits of float32, so that no outcome is the right one.

    `logits` are those that reach the two filters. Equal logits are no such case: they are compared exactly.
    """
    with np.errstate(invalid="ignore"):
        x = logits.astype(np.float64)
        p = np.exp(x - x.max(axis=1, keepdims=True))
    share = p / p.sum(axis=1, keepdims=True)
    hangs = np.zeros(len(x), bool)
    if "top_p" in settings:
        hangs |= (np.abs(np.sort(share, axis=1).cumsum(axis=1) - (1 - settings["top_p"])) < margin).any(axis=1)
    if "min_p" in settings:
        hangs |= ((np.abs(p - settings["min_p"]) < margin) & (p < 1)).any(axis=1)
    return hangs
