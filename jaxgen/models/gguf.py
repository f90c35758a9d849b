"""What llama.cpp's one-file checkpoints call a family, and what they change in it."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any


def _as_they_are(fields: dict[str, Any]) -> dict[str, Any]:
    return fields


@dataclasses.dataclass(frozen=True)
class Gguf:
    """A family in GGUF files. Source: llama.cpp's `convert_hf_to_gguf.py`, and its `src/models`.

    Names of tensors follow from the family's block: where it has norms, and whether projections are stacked.
    """

    architecture: str  # `general.architecture`, and the prefix of the metadata
    rotates_neighbours: bool  # rows of queries and keys are stored for rotations of neighbours, not of halves
    named: str = ""  # a part of `general.name` that tells families of one architecture apart
    told_by: str = ""  # metadata that does so, because no other family of the architecture has it
    also: str = ""  # another architecture, all of whose files are of the family unless another one is told by them
    fields: Mapping[str, str] = dataclasses.field(default_factory=dict)  # of its own metadata, and the config's names
    optional: Mapping[str, str] = dataclasses.field(default_factory=dict)  # the same, where files may lack them
    defaults: Mapping[str, Any] = dataclasses.field(default_factory=dict)  # metadata that llama.cpp takes then
    windows_by_layer: bool = False  # whether llama.cpp has the same layers with a window as the config's defaults
    # The config's fields, of those that are read, which may be damaged: llama.cpp has some in its code, or otherwise.
    derived: Callable[[dict[str, Any]], dict[str, Any]] = _as_they_are

    @property
    def architectures(self) -> tuple[str, ...]:
        """All that its files may say."""
        return (self.architecture, self.also) if self.also else (self.architecture,)
