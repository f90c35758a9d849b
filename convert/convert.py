"""`jaxgen convert`: a plain checkpoint rewritten with int4 weights, in the format of compressed-tensors."""

import dataclasses
import hashlib
import logging
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import jaxgen
from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from jaxgen.files import read_json
from jaxgen.models.config import DecoderConfig
from jaxgen.models.families import config_from_hf
from jaxgen.models.tensors import HEAD, Part, parameter_parts
from jaxgen.paths import as_path
from jaxgen.quant import Int4, Int4Config

from . import hub, packed
from .assemble import finite
from .atomic import resumable_directory
from .calibration import read_calibration
from .checkpoint import DTYPES, INDEX, Checkpoint
from .companions import Companions
from .composite import text_model
from .files import require
from .fingerprint import fingerprint
from .formats import FIELDS, detect
from .load import check_tensors
from .progress import progress_bar
from .writer import Layout, Planned, ShardWriter, index_of, json_bytes, plan_shards, shard_bytes

logger = logging.getLogger("jaxgen")

_LAYER = re.compile(r"model\.layers\.\d+\.")
_METHODS = ("rtn", "gptq", "autoround")
_WEIGHTS_AT_ONCE = 1 << 22  # as many as `quantize` takes at a time


def convert_checkpoint(
    source: "str | os.PathLike[str]",
    target: "str | os.PathLike[str]",
    *,
    bits: Any = 4,
    group_size: Any = 128,
    method: Any = "rtn",
    lm_head: Any = False,
    calibration: "str | os.PathLike[str] | None" = None,
    max_shard_size: Any = "1GB",
) -> Path:
    """Write the checkpoint `source` (a directory or hub id) with int4 weights to the new directory `target`.

    `group_size`: 32, 64, 128, or -1 for whole rows. `method`: "rtn", round to nearest with searched scales; "gptq" or
    "autoround", which take `calibration`, a UTF-8 text file of the kind of text that the model will see (128 sequences
    of 2048 tokens are used, if there are as many). Every linear layer is quantised, the output head only with
    `lm_head` (always by "rtn": no layer follows it); all else is copied in its own dtype. The result is a
    compressed-tensors checkpoint ("pack-quantized", symmetric), in files of at most `max_shard_size` where tensors
    allow. Returns its path.

    Host memory stays far below 2 GB with "rtn", whatever the size of the checkpoint; the other methods add a layer
    and the hidden states of the text (4.3 GB for 128 x 2048 tokens of a 7B model, "autoround" twice that). `target`
    appears complete or not at all; an interrupted conversion goes on from its last finished file when it is started
    again. Raises `JaxgenError` for other options, an already quantised source, a target that is not empty, and a disk
    that is too small; `CheckpointError` for damaged sources; both before any weight is written.

    >>> import tempfile
    >>> from jaxgen.convert import convert_checkpoint
    >>> with tempfile.TemporaryDirectory() as directory:
    ...     path = convert_checkpoint(jaxgen.demo.path(), directory, group_size=64)
    ...     sorted(file.name for file in path.iterdir())[:3]
    ['config.json', 'generation_config.json', 'model.safetensors']
    """
    if bits != 4 or isinstance(bits, bool):
        raise JaxgenError(f"convert: bits={bits!r} must be 4")
    if method not in _METHODS:
        raise JaxgenError(f"convert: method={method!r} must be one of {', '.join(_METHODS)}")
    if (method == "rtn") != (calibration is None):
        needs = "needs calibration text" if calibration is None else "looks at no text; leave calibration away"
        raise JaxgenError(f"convert: method={method!r} {needs}")
    config = Int4Config(group_size=group_size, lm_head=lm_head)
    path = as_path(target, "convert: target")
    directory = hub.locate(source)
    conversion = _Conversion(directory, config, method, calibration, shard_bytes(max_shard_size))
    with resumable_directory(path, conversion.made_from()) as place:
        conversion.write(place)
    return path


class _Conversion:
    """One conversion, planned to the byte before anything is written."""

    def __init__(self, directory: Path, int4: Int4Config, method: str, calibration: Any, limit: int):
        self.int4, self.method = int4, method
        fields, self.checkpoint = _plain(directory)
        self.config = config_from_hf(fields)
        if int4.lm_head and self.config.tie_word_embeddings:
            raise JaxgenError("convert: lm_head=True, but this model's head is its embedding, which stays as it is")
        check_tensors(self.checkpoint, self.config, None)
        if calibration is not None and self.config.experts_field:
            raise UnsupportedError(
                f"convert: method={method!r} is not supported for models with experts ({self.config.architecture}), "
                "few of which would see enough of the calibration text; method='rtn' is"
            )
        parts = [part for group in parameter_parts(self.config).values() for part in group]
        self.planned = {part.name: self._planned(part) for part in parts}
        self.calibration = None if calibration is None else _calibration(directory, calibration, self.config)
        self.shards = plan_shards(parts, self._nbytes, limit)
        self.layouts = {shard: self._layout(parts) for shard, parts in self.shards.items()}
        fields["quantization_config"] = packed.quantization_config(int4.group_size, self._ignored(parts))
        self.companions = Companions(directory)
        self.small_files = {"config.json": json_bytes(fields)}
        if len(self.shards) > 1:
            self.small_files[INDEX] = json_bytes(self._index(parts))

    def made_from(self) -> dict[str, Any]:
        """What the result depends on beside the weights: conversions that agree in this and those write the same."""
        tensors = self.checkpoint.tensors
        return {
            "jaxgen": jaxgen.__version__,
            "options": [dataclasses.asdict(self.int4), self.method],
            "calibration": None if self.calibration is None else _digest(self.calibration.tobytes()),
            "tensors": {name: dataclasses.astuple(info) for name, info in tensors.items()},
            "shards": {name: layout.nbytes for name, layout in self.layouts.items()},
            "small_files": {name: _digest(data) for name, data in self.small_files.items()} | self.companions.digests,
        }

    def write(self, place: Path) -> None:
        """Write the files that are not there yet, or all if what is there was made of other weights."""
        for partial in place.glob("*.partial"):  # of a process that was killed
            partial.unlink()
        finished = [shard for shard in self.shards if (place / shard).exists()]
        if any(self._source(shard) != _noted(place, shard) for shard in finished):
            logger.warning("%s is of another source: starting afresh", place.parent)
            for shard in finished:
                (place / shard).unlink()
        missing = [shard for shard in self.shards if not (place / shard).exists()]
        self._check_room(place, missing)
        blocks = self._blocks(place, missing)
        with progress_bar(self.checkpoint.total_bytes, "Converting weights") as bar:
            for shard in self.shards.keys() - set(missing):
                bar.update(sum(self.checkpoint.tensors[part.name].nbytes for part in self.shards[shard]))
            for shard in missing:
                _note(place, shard, self._source(shard))  # before: what changes meanwhile is found out next time
                with ShardWriter(place / shard, self.layouts[shard]) as file:
                    for part in self.shards[shard]:
                        for name, piece in self._pieces(part, blocks):
                            file.append(name, piece)
                        bar.update(self.checkpoint.tensors[part.name].nbytes)
        for name, data in self.small_files.items():
            (place / name).write_bytes(data)
        self.companions.copy_to(place)

    def _ignored(self, parts: list[Part]) -> list[str]:
        """The linear layers that stay as they are: the head, where there is one or not, and routers."""
        routers = [part.name for part in parts if part.routed and not self.int4.quantizes(part.name)]
        names = [*routers, *([] if self.int4.lm_head else [HEAD])]
        return [name.removesuffix(".weight") for name in names]

    def _source(self, shard: str) -> str:
        """A hash of all weights of the source that a file depends on beside those that the files before it do."""
        names = [part.name for part in self.shards[shard]]
        if self.calibration is not None:  # the weights of a layer are made together
            layers = {match[0] for name in names if (match := _LAYER.match(name))}
            names += [name for name in self.planned if (match := _LAYER.match(name)) and match[0] in layers]
        return fingerprint(self.checkpoint, dict.fromkeys(names))

    def _planned(self, part: Part) -> dict[str, Planned]:
        """The tensors that are written for one of the source."""
        if self.int4.quantizes(part.name):
            return packed.planned(part, self.int4.group_size)
        return {part.name: Planned(self.checkpoint.tensors[part.name].dtype, part.shape)}

    def _nbytes(self, part: Part) -> int:
        return sum(tensor.nbytes for tensor in self.planned[part.name].values())

    def _layout(self, parts: list[Part]) -> Layout:
        return Layout({name: tensor for part in parts for name, tensor in self.planned[part.name].items()})

    def _index(self, parts: list[Part]) -> dict[str, Any]:
        weight_map = {name: shard for shard, layout in self.layouts.items() for name in layout.tensors}
        return index_of(weight_map, sum(map(self._nbytes, parts)), sum(math.prod(part.shape) for part in parts))

    def _check_room(self, place: Path, missing: list[str]) -> None:
        small = sum(map(len, self.small_files.values())) + self.companions.nbytes
        needed = sum(self.layouts[shard].nbytes for shard in missing) + small
        free = shutil.disk_usage(place).free
        if needed > free:
            raise JaxgenError(f"convert: {needed:,} bytes are to be written, but the disk has {free:,} free ({place})")

    def _pieces(self, part: Part, blocks: "_Blocks") -> Iterator[tuple[str, np.ndarray]]:
        """What is written for one tensor of the source: names, each with its next elements."""
        if not self.int4.quantizes(part.name):
            yield from ((part.name, rows) for rows in _rows(self.checkpoint, part.name))
            return
        if self.method == "rtn" or part.name == HEAD:
            pieces = (finite(self.checkpoint, part, rows) for rows in _rows(self.checkpoint, part.name))
            weights = (self.int4.quantize(rows, repr(part.name)) for rows in pieces)
        else:
            weights = iter([blocks[part.name]])
        for weight in weights:
            yield from packed.encode(part.name, weight).items()
        yield from packed.shape_of(part).items()

    def _blocks(self, place: Path, missing: list[str]) -> "_Blocks":
        """The weights of methods that go layer by layer; layers in finished files are read, not made again."""
        if self.calibration is None:
            return _Blocks(iter(()))
        from .quantize.blocks import quantized_blocks

        homes = {part.name: shard for shard, parts in self.shards.items() for part in parts}

        def finished(layer: int) -> dict[str, Int4] | None:
            prefix = f"model.layers.{layer}."
            names = [name for name in homes if name.startswith(prefix) and self.int4.quantizes(name)]
            if any(homes[name] in missing for name in names):
                return None
            return {name: packed.decode(name, place / homes[name]) for name in names}

        options = {"group_size": self.int4.group_size, "method": self.method, "finished": finished}
        return _Blocks(quantized_blocks(self.checkpoint, self.config, self.calibration, **options))


class _Blocks:
    """Quantised weights by name, from an iterator over layers; asked for in order, so it keeps one layer."""

    def __init__(self, layers: Iterator[tuple[int, dict[str, Int4]]]):
        self._layers, self._weights = layers, {}

    def __getitem__(self, name: str) -> Int4:
        while name not in self._weights:
            self._weights = {}  # before the next layer is made
            _, self._weights = next(self._layers)
        return self._weights[name]


def _plain(place: Path) -> tuple[dict[str, Any], Checkpoint]:
    """The fields of config.json and the tensors of a checkpoint directory that is not quantised."""
    advice = "jaxgen converts float32, bfloat16 and float16 checkpoints: give it the original"
    if place.is_file():
        raise JaxgenError(f"{place} is a GGUF file; {advice}")
    fields = read_json(require(place / "config.json", "a model"))
    if said := next((name for name in FIELDS if fields.get(name)), None):
        raise JaxgenError(f"{place} is already quantised (config.json has {said!r}); {advice}")
    checkpoint = Checkpoint(place)
    fields = text_model(fields, checkpoint)
    fields, stored_as = detect(fields, checkpoint)
    if stored_as is not None:
        raise JaxgenError(f"{place} is already quantised ({stored_as.name}); {advice}")
    return fields, checkpoint


def _calibration(directory: Path, path: Any, config: DecoderConfig) -> np.ndarray:
    from jaxgen.text.tokenizer import load_tokenizer

    return read_calibration(as_path(path, "calibration"), load_tokenizer(directory), config)


def _note(place: Path, shard: str, source: str) -> None:
    """Keep, beside the files, what one of them is made of."""
    path = place.parent / f"{shard}.source"
    path.unlink(missing_ok=True)  # no link is followed
    path.write_text(source)


def _noted(place: Path, shard: str) -> str | None:
    try:
        return (place.parent / f"{shard}.source").read_text()
    except (OSError, ValueError):
        return None


def _rows(checkpoint: Checkpoint, name: str) -> Iterator[np.ndarray]:
    """A tensor in its own dtype, some rows at a time."""
    info = checkpoint.tensors[name]
    row = info.nbytes // info.shape[0]
    step = max(1, _WEIGHTS_AT_ONCE * DTYPES[info.dtype].itemsize // row) * row
    for begin in range(info.begin, info.end, step):
        wanted = min(step, info.end - begin)
        try:
            data = np.fromfile(checkpoint.directory / info.shard, np.uint8, wanted, offset=begin)
        except OSError as error:
            raise CheckpointError(str(checkpoint.directory), [f"{info.shard}: reading {name!r}: {error}"]) from error
        if len(data) < wanted:
            problem = f"{info.shard} ended {wanted - len(data)} bytes early while {name!r} was read; did it change?"
            raise CheckpointError(str(checkpoint.directory), [problem])
        yield data.view(DTYPES[info.dtype]).reshape(-1, *info.shape[1:])


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()
