"""transformers' streamers (`TextStreamer`, `TextIteratorStreamer`, ...), which are told each token as it is made."""

from collections.abc import Iterable
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxgen.errors import JaxgenError


def check_streamer(streamer: Any) -> None:
    """Raise `JaxgenError` for an object that has not the two methods of transformers' `BaseStreamer`."""
    for name in ("put", "end"):
        if not callable(getattr(streamer, name, None)):
            raise JaxgenError(f"streamer={streamer!r} has no method {name!r}; pass one like TextStreamer")


def feed(streamer: Any, input_ids: Int[np.ndarray, "R T"], chunks: Iterable[Any], filler: int) -> None:
    """Drive a streamer through a generation: the prompts [R, T] once, then every step's ids [R], then the end.

    `input_ids` has one row per sequence, `chunks` are those of `decode_in_chunks`, run here; rows that have ended are
    told as `filler`, as they appear in the result. All values are int64 numpy arrays, which transformers' own
    streamers take. A TextStreamer raises ValueError for more than one row, as in HF. Unlike in HF the streamer is
    told the end even if generating fails, so that a thread that reads from it does not wait for ever. Raises
    `JaxgenError` for what is no streamer.
    """
    check_streamer(streamer)
    try:
        streamer.put(np.asarray(input_ids, np.int64))
        for chunk in chunks:
            for step in range(max(map(len, chunk.new), default=0)):
                ids = [new[step] if step < len(new) else filler for new in chunk.new]
                streamer.put(np.array(ids, np.int64))
    finally:
        streamer.end()
