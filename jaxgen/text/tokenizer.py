"""A checkpoint's tokenizer, set up for generation, and what goes in and out of it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxgen.errors import JaxgenError


def load_tokenizer(directory: Path) -> Any:
    """transformers' tokenizer of a checkpoint directory, padding on the left; pad defaults to end-of-sequence.

    Raises `JaxgenError` if the directory holds no tokenizer that transformers can read.
    """
    import transformers  # takes seconds; nothing but text needs it

    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(directory, local_files_only=True, padding_side="left")
    except (OSError, ValueError, KeyError) as error:
        raise JaxgenError(f"{directory}: no tokenizer that transformers can read: {error}") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def tokenizer_for(model: Any, tokenizer: Any = None) -> Any:
    """The tokenizer given, as an object, a directory or a hub id; if none is, the one of the model's checkpoint.

    Raises `JaxgenError` for a model that was not loaded from a checkpoint, or one without a tokenizer.
    """
    from jaxgen.convert.hub import locate

    if tokenizer is None:
        tokenizer = getattr(model, "name_or_path", None)
        if tokenizer is None:
            raise JaxgenError("this model was not loaded from a checkpoint, so it has no tokenizer: pass tokenizer=")
    return load_tokenizer(locate(tokenizer)) if isinstance(tokenizer, str | Path) else tokenizer


def left_pad(rows: Sequence[Sequence[int]], fill: int) -> Int[np.ndarray, "B T"]:
    """Rows of ids as one int32 array [B, T], shorter ones behind `fill`: what transformers does, on any tokenizer."""
    width = max(map(len, rows))
    return np.array([[fill] * (width - len(row)) + list(row) for row in rows], np.int32).reshape(len(rows), width)


def continuation(tokenizer: Any, prompt: list[int], new: list[int], **decoding: Any) -> str:
    """The text that the new tokens add to the prompt's; `decoding` as for the tokenizer's `decode`.

    Decoded together: alone, Llama's tokenizers drop the space in front of the first new word.
    """
    decoding.setdefault("skip_special_tokens", True)
    before = tokenizer.decode(prompt, **decoding)
    return tokenizer.decode(prompt + new, **decoding)[len(before) :]
