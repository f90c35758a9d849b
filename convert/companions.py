"""The files beside config.json and the weights: a tokenizer's, chat templates, and the defaults for generating."""

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from jaxgen.errors import CheckpointError
from jaxgen.files import MOST_TOKENIZER, read_chunks

from .files import files_matching, leads_out
from .hub import COMPANIONS


class Companions:
    """The companions of a checkpoint directory, by their names in it; `digests` are the sha256 of what they hold.

    Raises `CheckpointError` for what is no regular file, has more than `MOST_TOKENIZER` bytes, or is a link out of the
    directory, as config.json must not be either.
    """

    def __init__(self, directory: Path):
        self._directory = directory
        found = [path for path in files_matching(directory, COMPANIONS) if path.suffix != ".safetensors"]
        if outside := [
            f"{path.relative_to(directory)} is a link out of the directory, to {str(path.resolve())!r:.200}; only what "
            "is in the checkpoint is copied: put the file there"
            for path in (directory / "config.json", *found)
            if leads_out(path, directory)
        ]:
            raise CheckpointError(str(directory), outside)
        self.nbytes = sum(path.stat().st_size for path in found)
        self.digests = {str(path.relative_to(directory)): self._copy(path, Path(os.devnull)) for path in found}

    def copy_to(self, place: Path) -> None:
        """Copy them; raises `CheckpointError` if one is not what it was."""
        for name, digest in self.digests.items():
            (place / name).parent.mkdir(exist_ok=True)
            if self._copy(self._directory / name, place / name) != digest:
                raise CheckpointError(str(self._directory), [f"{name} has changed meanwhile"])

    def _copy(self, path: Path, target: Path) -> str:
        hashed = hashlib.sha256()
        with target.open("wb") as file:
            for chunk in _chunks(path):
                hashed.update(chunk)
                file.write(chunk)
        return hashed.hexdigest()


def _chunks(path: Path) -> Iterator[bytes]:
    try:
        yield from read_chunks(path, MOST_TOKENIZER)
    except OSError as error:
        raise CheckpointError(str(path), [f"cannot be copied: {error}"]) from error
