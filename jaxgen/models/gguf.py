"""What llama.cpp's one-file checkpoints call a family, and what they change in it."""

import dataclasses
from collections.abc import Mapping


@dataclasses.dataclass(frozen=True)
class Gguf:
    """A family in GGUF files. Source: llama.cpp's `convert_hf_to_gguf.py`."""

    architecture: str  # `general.architecture`, and the prefix of the metadata
    rotates_neighbours: bool  # rows of queries and keys are stored for rotations of neighbours, not of halves
    named: str = ""  # a part of `general.name` that tells families of one architecture apart
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of its own metadata, and the config's names
