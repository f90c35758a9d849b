"""A checkpoint's tokenizer, set up for generation, and what goes in and out of it."""

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.text.hf import transformers
from jaxgen.text.tokenizer_files import check_files


def load_tokenizer(directory: Path, **options: Any) -> Any:
    """`read_tokenizer`, padding on the left; pad defaults to end-of-sequence."""
    tokenizer = read_tokenizer(directory, padding_side="left", **options)
    with telling(f"{directory}: no tokenizer that transformers can use"):
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def read_tokenizer(directory: Path, **options: Any) -> Any:
    """transformers' tokenizer of a checkpoint directory; `options` are those of transformers.

    Code from the repository never runs, and nothing asks whether it may: raises `UnsupportedError` for a repository
    that needs its own. Raises `JaxgenError` if the directory holds no tokenizer that transformers can read and use.
    """
    check_files(directory)
    with telling(f"{directory}: no tokenizer that transformers can read"):
        tokenizer = transformers().AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **options
        )
        # Much of what a damaged file holds is looked at only now.
        tokenizer.decode(tokenizer("a")["input_ids"], skip_special_tokens=True)
    return tokenizer


@contextlib.contextmanager
def telling(what: str) -> Iterator[None]:
    """Turn whatever transformers and its Rust code raise, on files from anywhere, into one `JaxgenError`."""
    try:
        yield
    except UnsupportedError:
        raise
    except BaseException as error:
        # A panic in Rust is no Exception, and its class cannot be imported.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        reason = f"{error!s:.500}"
        expected = isinstance(error, ValueError | OSError) and reason
        raise JaxgenError(f"{what}: {reason if expected else f'{type(error).__name__}: {reason}'}") from error


def tokenizer_for(model: Any, tokenizer: Any = None, **options: Any) -> Any:
    """The tokenizer given, as an object, a directory or a hub id; if none is, the one of the model's checkpoint.

    `options` are for one that is loaded.
    Raises `JaxgenError` for a model that was not loaded from a checkpoint, or one without a tokenizer.
    """
    from jaxgen.convert.hub import COMPANIONS, locate

    if tokenizer is None:
        tokenizer = getattr(model, "name_or_path", None)
        if tokenizer is None:
            raise JaxgenError("this model was not loaded from a checkpoint, so it has no tokenizer: pass tokenizer=")
    if not isinstance(tokenizer, str | Path):
        return tokenizer
    return load_tokenizer(locate(tokenizer, files=("config.json", *COMPANIONS)), **options)


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
