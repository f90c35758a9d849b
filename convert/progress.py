"""The one progress bar, for loading and for converting."""

from typing import Any


def progress_bar(total: int, text: str) -> Any:
    """A tqdm bar of bytes, shown after a second, and not at all where Hugging Face's bars are switched off."""
    from huggingface_hub.utils import are_progress_bars_disabled
    from tqdm.auto import tqdm

    return tqdm(total=total, desc=text, unit="B", unit_scale=True, delay=1, disable=are_progress_bars_disabled())
