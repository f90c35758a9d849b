"""The embedded demo model: a small Mistral checkpoint in Hugging Face layout, for first steps and for tests.

`python -m jaxgen.demo.train` made it, from text that `corpus.py` writes.
"""

from pathlib import Path


def path() -> Path:
    """The directory of the demo checkpoint, for jaxgen's and transformers' `from_pretrained`.

    >>> (path() / "config.json").is_file()
    True
    """
    return Path(__file__).parent / "checkpoint"
