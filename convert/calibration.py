"""Calibration text: a file, tokenised and cut into sequences of equal length."""

from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxgen.errors import JaxgenError
from jaxgen.files import read_bytes
from jaxgen.models.config import DecoderConfig
from jaxgen.text.utf8 import decode_utf8

SEQUENCES = 128
TOKENS = 2048
MOST_BYTES = 20_000_000  # all of it is tokenised; a million or two are used


def read_calibration(
    path: Path, tokenizer: Any, config: DecoderConfig, sequences: int = SEQUENCES, tokens: int = TOKENS
) -> Int[np.ndarray, "N T"]:
    """Sequences of token ids from a UTF-8 text file, as int32.

    They are `tokens` long, or the model's context if that is shorter; at most `sequences`, spread evenly over the
    file. Raises `JaxgenError` for a file that is not regular, that has more than `MOST_BYTES` or not one sequence, or
    whose tokens the model does not have.
    """
    try:
        data = read_bytes(path, MOST_BYTES)
    except (OSError, ValueError) as error:
        raise JaxgenError(f"calibration {path}: cannot be read: {error}") from error
    text = decode_utf8(data, f"calibration {path}")
    ids = np.array(tokenizer(text, verbose=False)["input_ids"], np.int32)
    length = min(tokens, config.max_position_embeddings)
    available = len(ids) // length
    if not available:
        raise JaxgenError(f"calibration {path} has {len(ids)} tokens; one sequence takes {length}: give more text")
    if ids.max() >= config.vocab_size:
        raise JaxgenError(
            f"calibration {path}: the tokenizer gives id {ids.max()}, but the model has vocab_size={config.vocab_size}"
        )
    chosen = np.linspace(0, available - 1, min(sequences, available)).round().astype(int)
    return ids[: available * length].reshape(available, length)[chosen]
