"""Which tokens two libraries must share: those before a close decision."""

import numpy as np

# Below this lead of the best logit over the second, float32 sums of another order may decide otherwise.
SMALLEST_LEAD = 1e-4


def agreed(new: np.ndarray, scores: np.ndarray, eos: list[int]) -> np.ndarray:
    """bool [B, steps]: the tokens before a row's first close decision, which both libraries must share."""
    top = np.sort(scores, axis=-1)[..., -2:]
    ended = np.cumsum(np.isin(new, eos), axis=1) - np.isin(new, eos) > 0
    close = (top[..., 1] - top[..., 0] < SMALLEST_LEAD) & ~ended
    return np.cumsum(close, axis=1) == 0
