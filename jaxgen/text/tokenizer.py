"""A checkpoint's tokenizer, set up for generation."""

from pathlib import Path
from typing import Any

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


def continuation(tokenizer: Any, prompt: list[int], new: list[int]) -> str:
    """The text that the new tokens add to the prompt's.

    Decoded together: alone, Llama's tokenizers drop the space in front of the first new word.
    """
    before = tokenizer.decode(prompt, skip_special_tokens=True)
    return tokenizer.decode(prompt + new, skip_special_tokens=True)[len(before) :]
