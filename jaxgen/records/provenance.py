"""Where numbers come from: the model's files and weights, the tokenizer's files, the versions and the device."""

import hashlib
import json
import os
import platform
import re
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

import jaxgen
from jaxgen.errors import JaxgenError
from jaxgen.files import JsonObject, read_bytes, read_json
from jaxgen.generation.programs.stages import stages_for
from jaxgen.generation.programs.structure import references, same_arrays, split
from jaxgen.quant.weight import as_weight

_PACKAGES = ("jax", "jaxlib", "flax", "transformers", "tokenizers", "safetensors", "numpy")
_CONFIG = ("jax_default_matmul_precision", "jax_enable_x64", "jax_threefry_partitionable")
_WEIGHTS, _TOKENIZER = ("*.safetensors", "*.gguf"), ("tokenizer*", "special_tokens_map.json", "chat_template*")
_known_files: dict[tuple[str, int, int], str] = {}
_known_weights: list[tuple[tuple[Any, ...], str]] = []  # references to the last weights that were read, their digest


def model_of(model: Any) -> JsonObject:
    """What is to be known of a model: where it is from, and what its weights are.

    `id` and `revision` are those of the Hugging Face hub, or "demo"; a local directory has neither, since a record
    names no paths. `files` are the sha256 of its weight files as they are now, `parameters` that of the weights in
    memory: quantised, trained or merged, as they were used.
    """
    directory = None if model.name_or_path is None else Path(model.name_or_path)
    return {**_origin(directory), "files": _files(directory, _WEIGHTS), **facts_of(model)}


def facts_of(model: Any) -> JsonObject:
    """What a model is, wherever it is from: its kind, its config and its weights in memory."""
    config = json.dumps(model.config.to_hf(), sort_keys=True, default=str)
    return {
        "architecture": type(model).__name__,
        "config_sha256": hashlib.sha256(config.encode()).hexdigest(),
        "parameters_sha256": parameters_sha256(model),
        "dtype": model.dtype.name,
        "weights": sorted({as_weight(weight).describe() for weight in split(model)[1]}),
    }


def tokenizer_of(model: object, tokenizer: object = None) -> JsonObject:
    """The sha256 of the files of a tokenizer, by default the checkpoint's, and of its chat template as it is now."""
    place = getattr(model if tokenizer is None else tokenizer, "name_or_path", None)
    directory = Path(place) if place and Path(place).is_dir() else None
    template = _chat_template(directory) if tokenizer is None else getattr(tokenizer, "chat_template", None)
    template = template if template is None or isinstance(template, str) else json.dumps(template)
    return {
        "files": _files(directory, _TOKENIZER),
        "chat_template_sha256": None if template is None else hashlib.sha256(template.encode()).hexdigest(),
    }


def environment(model: Any) -> JsonObject:
    """Versions, device, mesh and XLA's options: what decides the last bits. No host names, no paths."""
    leaf = jax.tree.leaves(split(model)[1])[0]
    devices = sorted(leaf.sharding.device_set, key=lambda device: device.id)
    mesh = getattr(leaf.sharding, "mesh", None)
    return {
        "versions": {"python": platform.python_version(), "jaxgen": jaxgen.__version__, **_versions()},
        "platform": f"{sys.platform} {platform.machine()}",
        "device": {"platform": devices[0].platform, "kind": devices[0].device_kind, "processor": _processor()},
        "mesh": {"devices": len(devices), "axes": {} if mesh is None else dict(mesh.shape)},
        "xla_flags": [_without_path(flag) for flag in os.environ.get("XLA_FLAGS", "").split()],
        "jax_config": {name: getattr(jax.config, name, None) for name in _CONFIG},
    }


def compiler_options(model: Any, strict: bool) -> JsonObject:
    """XLA's options of the decode executable, as far as jaxgen chooses them."""
    return dict(stages_for(model, split(model)[1], strict)[1].compiler_options)


def parameters_sha256(model: Any) -> str:
    """The sha256 over all weights in memory: names, dtypes, shapes and bytes, tensor by tensor."""
    weights = split(model)[1]
    for known, digest in _known_weights:
        if same_arrays(known, weights):
            return digest
    digest = hashlib.sha256()
    for (path, _), weight in zip(nnx.to_flat_state(nnx.state(model)), weights, strict=True):
        stored = as_weight(weight).as_stored()  # in the order of files, whatever a device reads faster
        for leaf in jax.tree.leaves(stored):
            value = np.ascontiguousarray(np.asarray(leaf))
            digest.update(f"{'.'.join(map(str, path))} {value.dtype} {value.shape}\n".encode())
            digest.update(value.reshape(-1).view(np.uint8).data)
    _known_weights[:] = [(references(weights), digest.hexdigest())]
    return digest.hexdigest()


def _origin(directory: Path | None) -> JsonObject:
    """Hub id and commit, from where the Hugging Face cache puts a snapshot."""
    from jaxgen import demo

    if directory is None:
        return {"id": None, "revision": None}
    if directory == demo.path():
        return {"id": "demo", "revision": None}
    found = re.search(r"models--([^/\\]+)[/\\]snapshots[/\\]([0-9a-f]{40})$", str(directory))
    if found is None:
        return {"id": None, "revision": None}
    return {"id": found[1].replace("--", "/"), "revision": found[2]}


def _files(directory: Path | None, patterns: tuple[str, ...]) -> dict[str, str]:
    paths = [] if directory is None else sorted({path for pattern in patterns for path in directory.glob(pattern)})
    return {path.name: _file_sha256(path) for path in paths if path.is_file()}


def _file_sha256(path: Path) -> str:
    status = path.stat()
    key = (str(path.resolve()), status.st_size, status.st_mtime_ns)
    if key not in _known_files:
        with path.open("rb") as file:
            _known_files[key] = hashlib.file_digest(file, "sha256").hexdigest()
    return _known_files[key]


def _chat_template(directory: Path | None) -> Any:
    if directory is None:
        return None
    try:
        return read_bytes(directory / "chat_template.jinja").decode()
    except (OSError, UnicodeDecodeError):
        pass
    try:
        return read_json(directory / "tokenizer_config.json").get("chat_template")
    except JaxgenError:
        return None


def _versions() -> dict[str, str | None]:
    def version(name: str) -> str | None:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            return None

    return {name: version(name) for name in _PACKAGES}


def _processor() -> str | None:
    """What the host's processor calls itself; on a CPU its kind decides the order of sums."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return platform.processor() or None
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else None


def _without_path(flag: str) -> str:
    name, _, value = flag.partition("=")
    if not flag.startswith("--"):  # the name of a file with flags, or the rest of a path with a space in it
        return "(a path)"
    is_path = "/" in value or "\\" in value or name.endswith(("_to", "_dir", "_path", "_file"))
    return f"{name}=(a path)" if is_path else flag
