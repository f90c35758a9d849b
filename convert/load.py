"""From a Hugging Face checkpoint to a Flax NNX module, one tensor at a time."""

import dataclasses
import logging
import os
import re
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.sharding import Mesh

from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from jaxgen.files import read_json
from jaxgen.generation.choosing.seed import next_seed
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.lowering import device_runs_kernels, own_rules
from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.config import DecoderConfig
from jaxgen.models.families import config_from_hf, family_of
from jaxgen.models.layers import QuantizedWeight
from jaxgen.models.tensors import EMBEDDING, HEAD, is_legacy_buffer, parameter_parts
from jaxgen.parallel.fit import spread
from jaxgen.parallel.layout import Layout
from jaxgen.quant import Int4Config, Quantization, Weight

from .adapter import FILES as ADAPTER_FILES
from .adapter import Adapter
from .assemble import Assembler
from .checkpoint import DTYPES, Checkpoint, Wanted
from .composite import text_model
from .files import is_there, require
from .formats import FIELDS, Format, detect
from .formats.bitsandbytes import BitsAndBytes
from .hub import COMPANIONS, locate
from .options import as_quantization, refuse
from .placement import Device, as_dtype, as_place, auto_dtype
from .progress import progress_bar
from .shapes import shapes_of

logger = logging.getLogger("jaxgen")

_LAYER = re.compile(r"model\.layers\.(\d+)\.")
_EXPERT = re.compile(r"model\.layers\.\d+\..*\.experts\.(\d+)\.")


class AutoModelForCausalLM:
    """Loads checkpoints, under the name that Hugging Face users know; never instantiated."""

    def __init__(self):
        raise JaxgenError("AutoModelForCausalLM is not instantiated: call AutoModelForCausalLM.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        dtype: Any = None,
        torch_dtype: Any = None,
        device_map: Any = "auto",
        load_in_4bit: Any = False,
        quantization_config: Any = None,
        adapter: str | os.PathLike[str] | None = None,
        gguf_file: Any = None,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        **unsupported: Any,
    ) -> DecoderForCausalLM:
        """Load a checkpoint from a directory, a .gguf file or the Hub, as a model of the class that its config names.

        `dtype`: "float32", "bfloat16", "float16" (or such a JAX or torch dtype), or "auto", the default:
        bfloat16 on TPUs and on GPUs that have it, float16 on older GPUs (float32 for models that overflow it),
        float32 on CPUs. `torch_dtype` is its old name. `device_map`: "auto" (JAX's first device; or all that this
        host has, where one has no room for the weights and a row, and a warning says so), "cpu", "gpu", "cuda", "tpu",
        "cuda:1", a number, a `jax.Device`, or one of these for the whole model (`{"": 0}`); or a mesh, by the sizes
        of its axes (`{"model": 4, "data": 2}`) or as a `jax.sharding.Mesh` with these. `adapter`: a PEFT LoRA
        adapter, as a directory or a hub id (its main branch); it is merged in float32 before any rounding, and kept
        beside weights that the checkpoint holds quantised. `gguf_file`: the name of a .gguf file in the directory or
        repository. The others as in `huggingface_hub.snapshot_download`.

        `load_in_4bit=True` quantises linear layers, by the defaults of `Int4Config`; `quantization_config` is
        another one, or HF's `BitsAndBytesConfig` (transformers', ours, or as a mapping), which asks for these defaults.
        Weights that the checkpoint holds in four bits stay as they are; only bitsandbytes' become int4 by an
        `Int4Config`, with a warning.

        Host memory stays below the finished parameters (those on CPU) plus two of the largest tensor. The
        model's `generation_config` comes from generation_config.json, or else from config.json. Raises
        `CheckpointError` with every problem of the files before any weight is read, `UnsupportedError` for
        models and options that jaxgen does not have (those that change nothing here are taken), and
        `JaxgenError` for other arguments. Source: transformers `PreTrainedModel.from_pretrained`.
        """
        refuse(unsupported, cls.from_pretrained)
        wanted = _the_dtype(dtype, torch_dtype)
        place = as_place(device_map)
        chosen = None if wanted is None or wanted == "auto" else as_dtype(wanted)
        quantization = as_quantization(load_in_4bit, quantization_config)
        options: dict[str, Any] = {"local_files_only": local_files_only, "cache_dir": cache_dir, "token": token}
        adapter_directory = None if adapter is None else locate(adapter, files=ADAPTER_FILES, **options)
        find = locate if gguf_file is None else partial(_locate_gguf, gguf_file)
        return load(
            find(pretrained_model_name_or_path, revision=revision, **options),
            dtype=chosen,
            place=place,
            may_spread=device_map == "auto",
            quantization=quantization,
            requantize=isinstance(quantization_config, Quantization),
            adapter=adapter_directory,
        )

    @classmethod
    def from_config(
        cls, config: Any, *, dtype: Any = None, torch_dtype: Any = None, **options: Any
    ) -> DecoderForCausalLM:
        """A model with random weights, which `jaxgen.set_seed` decides; `dtype` is float32 by default.

        `config` is ours (`DecoderConfig`, ...) or one of transformers. Raises as `from_pretrained`.

        >>> from jaxgen import AutoConfig, demo
        >>> config = AutoConfig.from_pretrained(demo.path(), num_hidden_layers=1)
        >>> AutoModelForCausalLM.from_config(config).num_parameters()
        918272
        """
        refuse(options, cls.from_config)
        if not isinstance(config, DecoderConfig):
            fields = config.to_dict() if callable(getattr(config, "to_dict", None)) else config
            config = config_from_hf(fields)
        wanted = _the_dtype(dtype, torch_dtype)
        chosen = as_dtype("float32" if wanted is None or wanted == "auto" else wanted)
        return family_of(config)(config, rngs=nnx.Rngs(next_seed()), dtype=chosen)


def load(
    directory: Path,
    *,
    dtype: np.dtype | None,
    place: Device | Mesh,
    may_spread: bool = False,
    quantization: Quantization | None = None,
    requantize: bool = False,
    adapter: Path | None = None,
) -> DecoderForCausalLM:
    """The model in a local directory or .gguf file, with its generation config; raises as `from_pretrained`.

    `dtype`: None for the one that suits device and model. `may_spread`: over all devices, where `place` has no room.
    Weights that have four bits already are quantised again only on `requantize`.
    """
    lora = None if adapter is None else Adapter(adapter)
    config, checkpoint, stored_as = open_checkpoint(directory)
    layout = Layout.of(place, config) if isinstance(place, Mesh) else None
    device = place.devices.flat[0] if isinstance(place, Mesh) else place
    dtype = auto_dtype(device, config.overflows_float16) if dtype is None else dtype
    generation = _stored_generation(checkpoint)
    check_tensors(checkpoint, config, stored_as, lora)
    low_cpu_memory = quantization is not None and quantization.low_cpu_memory
    if quantization is not None and requantize and _has_four_bits(config, stored_as):
        quantization = _requantization(quantization, stored_as)
        requantize = quantization is not None
    if quantization is not None:
        _check_quantization(quantization, config, None if requantize else stored_as)
    assembler = Assembler(
        checkpoint, dtype, stored_as, quantization, lora, requantize=requantize, low_cpu_memory=low_cpu_memory
    )
    if may_spread:
        layout = spread(config, partial(shapes_of, assembler, config), dtype.itemsize, jax.local_devices())
    for remark in layout.remarks(config) if layout is not None else ():
        logger.warning("%s", remark)
    model = _stream(assembler, config, device, layout)
    if generation is not None:  # else the special tokens of config.json, as in transformers
        model.generation_config = generation
    model.name_or_path = str(checkpoint.directory)
    return model


def open_configs(directory: Path) -> tuple[DecoderConfig, GenerationConfig]:
    """What a checkpoint says of its model and of how to generate, without its weights."""
    config, checkpoint, _ = open_checkpoint(directory)
    return config, _stored_generation(checkpoint) or GenerationConfig.from_model_config(config)


def _stored_generation(checkpoint: Checkpoint) -> GenerationConfig | None:
    path = checkpoint.directory / "generation_config.json"
    return GenerationConfig.from_stored(read_json(path), path) if is_there(path) else None


def open_checkpoint(place: Path) -> tuple[DecoderConfig, Checkpoint, Format | None]:
    """The config, the tensors and the format of quantised ones, of a checkpoint directory or a .gguf file."""
    if place.suffix == ".gguf" and not place.is_dir():
        from .formats.gguf import open_gguf

        return open_gguf(place)
    files = sorted(path.name for path in place.glob("*.gguf"))
    if files and not is_there(place / "config.json"):
        raise JaxgenError(f"{place} has no config.json, but {', '.join(files)}: choose one with gguf_file={files[0]!r}")
    fields = read_json(require(place / "config.json", "a model"))
    checkpoint = Checkpoint(place)
    fields = text_model(fields, checkpoint)
    try:
        plain, stored_as = detect(fields, checkpoint)
    except UnsupportedError as error:  # of the quantisation, whose advice is in vain if the model is refused as well
        try:
            config_from_hf({name: value for name, value in fields.items() if name not in FIELDS})
        except UnsupportedError as other:
            raise UnsupportedError(f"{other}; {error}") from error
        raise
    return config_from_hf(plain), checkpoint, stored_as


def _the_dtype(dtype: Any, torch_dtype: Any) -> Any:
    if dtype is not None and torch_dtype is not None:
        raise JaxgenError(f"dtype={dtype!r} and torch_dtype={torch_dtype!r} are the same option; give dtype only")
    return torch_dtype if dtype is None else dtype


def _locate_gguf(name: Any, name_or_path: str | os.PathLike[str], **options: Any) -> Path:
    if not isinstance(name, str) or not name.endswith(".gguf"):
        raise JaxgenError(f"gguf_file={name!r} must be the name of a .gguf file")
    directory = locate(name_or_path, files=(name, "config.json", *COMPANIONS), **options)
    if not is_there(directory / name):
        raise JaxgenError(f"gguf_file={name!r}: there is no such file in {directory}")
    return directory / name


def _has_four_bits(config: DecoderConfig, stored_as: Format | None) -> bool:
    parts = (part for group in parameter_parts(config).values() for part in group)
    return stored_as is not None and any(stored_as.stored(part) is not None for part in parts)


def _requantization(config: Quantization, stored_as: Format | None) -> Quantization | None:
    """What `quantization_config` asks of a checkpoint that has four bits: only lookup tables are quantised again."""
    assert stored_as is not None
    if config == Int4Config(low_cpu_memory=True) and not isinstance(stored_as, BitsAndBytes):
        return None  # says how to run the weights, and not how to make them
    if not isinstance(stored_as, BitsAndBytes):
        raise JaxgenError(
            f"quantization_config={config}: the checkpoint is int4 already ({stored_as.name}); leave the option out, "
            "or quantise the original model"
        )
    logger.warning("Quantising again what is %s: errors add up; prefer the original model", stored_as.name)
    return config


def _check_quantization(quantization: Quantization, config: DecoderConfig, kept: Format | None) -> None:
    """Raise `JaxgenError` for a weight that is to be quantised and cannot be, before any is read.

    What `kept` stores in four bits is not.
    """
    if quantization.lm_head and config.tie_word_embeddings:
        kind = type(quantization).__name__
        raise JaxgenError(f"{kind}: lm_head=True, but this model's head is its embedding, which is not quantised")
    shapes = {
        part.shape
        for parts in parameter_parts(config).values()
        for part in parts
        if quantization.quantizes(part.name) and (kept is None or kept.stored(part) is None)
    }
    for shape in sorted(shapes):
        quantization.check(shape, f"quantization_config={quantization}: a weight")


def check_tensors(
    checkpoint: Checkpoint, config: DecoderConfig, stored_as: Format | None, adapter: Adapter | None = None
) -> None:
    """Raise one `CheckpointError` with everything that is wrong with checkpoint and adapter, if anything is."""
    problems = list(checkpoint.problems)
    names = checkpoint.tensors.keys() | checkpoint.unreadable
    # A damaged count must not make us spell out a billion missing tensors.
    layers = len({match[1] for name in names if (match := _LAYER.match(name))})
    if config.num_hidden_layers > layers:
        claimed = f"{checkpoint.described_by} has num_hidden_layers={config.num_hidden_layers}"
        problems.append(f"{claimed}, the weights have {layers}")
        config = config.with_layers(range(max(layers, 1)))
    experts = len({match[1] for name in names if (match := _EXPERT.match(name))})
    routing = next(filter(None, map(config.routing, range(config.num_hidden_layers))), None)
    if routing is not None and routing.experts > experts:
        problems.append(
            f"{checkpoint.described_by} has {config.experts_field}={routing.experts}, the weights have {experts}"
        )
        fewer: Any = {
            config.experts_field: max(experts, 1),
            "num_experts_per_tok": min(routing.chosen, max(experts, 1)),
        }
        config = dataclasses.replace(config, **fewer)
    parts = [part for group in parameter_parts(config).values() for part in group]
    wanted: dict[str, Wanted] = {}
    for part in parts:
        quantized = stored_as.stored(part) if stored_as is not None else None
        wanted |= {part.name: Wanted(part.shape)} if quantized is None else quantized
    optional = {name for name in checkpoint.tensors if is_legacy_buffer(name)}
    wanted |= {name: Wanted(checkpoint.tensors[name].shape) for name in optional}
    if config.tie_word_embeddings:  # some files hold the shared matrix twice
        wanted[HEAD] = Wanted((config.vocab_size, config.hidden_size))
        optional.add(HEAD)
    problems += checkpoint.compare(wanted, optional=frozenset(optional))
    if not problems and config.tie_word_embeddings and HEAD in checkpoint.tensors:
        problems += _tied_head_problems(checkpoint)
    if adapter is not None:
        problems += adapter.problems(parts) or ([] if problems else adapter.copy_problems(checkpoint, parts))
    if problems:
        raise CheckpointError(str(checkpoint.directory), problems)


def _tied_head_problems(checkpoint: Checkpoint) -> list[str]:
    head, embedding = checkpoint.tensors[HEAD], checkpoint.tensors[EMBEDDING]
    if head.dtype == embedding.dtype:
        # Compared as integers, in which a NaN equals itself.
        bits = [np.empty(info.shape, f"u{DTYPES[info.dtype].itemsize}") for info in (head, embedding)]
        for name, target in zip((HEAD, EMBEDDING), bits, strict=True):
            checkpoint.read_into(name, target.view(DTYPES[head.dtype]))
        if np.array_equal(bits[0], bits[1]):
            return []
    return [f"config.json ties the embeddings (tie_word_embeddings=true), but {HEAD!r} differs from {EMBEDDING!r}"]


@own_rules()
def _stream(assembler: Assembler, config: DecoderConfig, device: Device, layout: Layout | None) -> DecoderForCausalLM:
    model = nnx.eval_shape(lambda: family_of(config)(config, rngs=nnx.Rngs(0), dtype=assembler.dtype))
    variables = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model))}
    model.layout = layout
    table = parameter_parts(config)
    kernels = assembler.dtype.itemsize == 2 and device_runs_kernels(device)
    with progress_bar(assembler.checkpoint.total_bytes, "Loading weights") as bar:
        for name, parts in table.items():
            value = assembler.parameter(parts, variables[name].shape)
            placed = jax.device_put(value, device) if layout is None else layout.put(config, name, value)
            on_device = jax.block_until_ready(placed)
            del value  # before the next one is allocated
            del placed
            _place(model, name, on_device.for_kernels() if kernels and isinstance(on_device, Weight) else on_device)
            bar.update(assembler.stored_bytes(parts))
    return model


def _place(model: DecoderForCausalLM, name: str, value: Any) -> None:
    """Put a parameter into the abstract model."""
    *path, last = name.split(".")
    module: Any = model
    for step in path:
        module = module[int(step)] if step.isdigit() else getattr(module, step)
    setattr(module, last, QuantizedWeight(value) if isinstance(value, Weight) else nnx.Param(value))
