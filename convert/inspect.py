"""What a checkpoint is and what it needs, from its headers alone: nothing is loaded."""

import math
import os
from typing import Any

from jaxgen.errors import JaxgenError
from jaxgen.generation.prompts.memory import cache_bytes, free_bytes, kv_bytes_per_token, usual_length
from jaxgen.models.config import DecoderConfig
from jaxgen.models.tensors import EMBEDDING, parameter_parts
from jaxgen.parallel.fit import Share, own_memory, shares
from jaxgen.quant import Int4Config
from jaxgen.quant.config import WHOLE_ROWS
from jaxgen.quant.int4 import SCALE_DTYPE

from .assemble import Assembler
from .checkpoint import Checkpoint
from .hub import locate
from .load import check_tensors, open_checkpoint
from .placement import as_device, as_dtype, auto_dtype
from .shapes import shapes_of

_MOST_DEVICES = 4096


def describe(
    name_or_path: "str | os.PathLike[str]", dtype: str = "auto", devices: int | None = None, memory: float | None = None
) -> str:
    """A table of architecture, parameters, sizes in bytes, and what fits on JAX's first device, as text.

    `dtype` is what the sizes in memory are computed for. With `devices`, what each of so many has in every layout:
    those that jaxgen would find here, or have `memory` bytes free each. Raises `JaxgenError` as `from_pretrained` does.
    """
    if devices is not None and not 1 <= devices <= _MOST_DEVICES:
        raise JaxgenError(f"--devices {devices} must be from 1 to {_MOST_DEVICES}")
    if memory is not None and devices is None:
        raise JaxgenError("--memory is that of each of --devices: say how many")
    if memory is not None and not 0 < memory < math.inf:
        raise JaxgenError(f"--memory {memory / 1e9:g} must be a number of gigabytes, above 0")
    device = as_device("auto")
    chosen = auto_dtype(device) if dtype == "auto" else as_dtype(dtype)
    place = locate(name_or_path)
    config, checkpoint, stored_as = open_checkpoint(place)
    check_tensors(checkpoint, config, stored_as)  # a count of layers in config.json may be anything
    parts = [part for group in parameter_parts(config).values() for part in group]
    packed = {part.name: stored_as.stored(part) or {} for part in parts if stored_as and part.name != EMBEDDING}
    packed_bytes = sum(checkpoint.tensors[name].nbytes for stored in packed.values() for name in stored)
    count = sum(math.prod(part.shape) for part in parts)
    loaded = packed_bytes + chosen.itemsize * sum(math.prod(part.shape) for part in parts if not packed.get(part.name))
    per_token = kv_bytes_per_token(config, chosen.itemsize)
    row = cache_bytes(config, chosen.itemsize, config.cache_slots(usual_length(config)))
    rows = {
        "checkpoint": place,
        "architecture": _architecture(config),
        "attention": _attention(config),
        "parameters": f"{count:,}",
        "files": _files(checkpoint),
        **({"format": stored_as.name + (f": {_size(packed_bytes)}" if packed_bytes else "")} if stored_as else {}),
        f"as {chosen.name}": _size(loaded)
        + (", about: weights of four bits as large as in the files" if packed_bytes else ""),
        "cache": f"{_size(per_token)} per token and row, {_size(row)} for a row of {usual_length(config):,} tokens",
        "device": f"{device.device_kind}: {_fits(device, loaded, row)}",
    }
    width = max(map(len, rows))
    table = "\n".join(f"{name:<{width}}  {text}" for name, text in rows.items())
    if devices is None:
        return table
    shapes = shapes_of(Assembler(checkpoint, chosen, stored_as), config)
    found = shares(config, shapes, chosen.itemsize, devices)
    memory = own_memory(device) if memory is None else memory
    return "\n".join([table, "", *_layouts(found, usual_length(config), memory)])


def _layouts(found: list[Share], tokens: int, memory: float | None) -> list[str]:
    """A line for each layout, and what is to be said of it."""
    lines = [f"On each device, of weights, and of the cache of a row of {tokens:,} tokens:"]
    for share in found:
        name = f"model {share.model} x data {share.data}"
        if share.refusal is not None:
            lines.append(f"  {name}: no: {share.refusal}")
            continue
        fits = ""
        if memory is not None:
            rows = max(int(memory - share.weights) // share.cache * share.data, 0)
            fits = f"; {rows:,} rows fit in {_size(memory)} each" if rows else f"; too much for {_size(memory)}"
        lines.append(f"  {name}: {_size(share.weights)}, {_size(share.cache)}{fits}")
        lines += [f"    {remark}" for remark in share.remarks]
    return lines


def needed(config: DecoderConfig, itemsize: int, tokens: int, int4: Int4Config | None = None) -> tuple[int, int]:
    """Bytes of the weights, and of the cache of a row of so many tokens; linear layers in four bits by `int4`.

    >>> from jaxgen import MistralConfig
    >>> needed(MistralConfig(), 2, 4096, Int4Config())
    (4123533312, 536870912)
    """
    weights = 0
    for part in (part for group in parameter_parts(config).values() for part in group):
        count = math.prod(part.shape)
        if int4 is not None and int4.quantizes(part.name):
            groups = part.shape[0] if int4.group_size == WHOLE_ROWS else count // int4.group_size
            weights += count // 2 + groups * SCALE_DTYPE.itemsize
        else:
            weights += count * itemsize
    return weights, cache_bytes(config, itemsize, config.cache_slots(tokens))


def _architecture(config: DecoderConfig) -> str:
    tied = ", tied embeddings" if config.tie_word_embeddings else ""
    return (
        f"{config.architecture}: {config.num_hidden_layers} layers, hidden {config.hidden_size}, "
        f"{_feed_forward(config)}, vocabulary {config.vocab_size}{tied}"
    )


def _feed_forward(config: DecoderConfig) -> str:
    routing = [config.routing(layer) for layer in range(config.num_hidden_layers)]
    sparse = [layer for layer in routing if layer is not None]
    if not sparse:
        return f"feed-forward {config.intermediate_size}"
    some = f" in {len(sparse)} of {len(routing)} layers" if len(sparse) < len(routing) else ""
    return f"{sparse[0].chosen} of {sparse[0].experts} experts of {sparse[0].size}{some}"


def _attention(config: DecoderConfig) -> str:
    windows = [window for window in config.layer_windows if window is not None]
    window = f"window {windows[0]}" if windows else "full"
    if 0 < len(windows) < config.num_hidden_layers:
        window += f" in {len(windows)} of {config.num_hidden_layers} layers"
    return (
        f"{config.num_attention_heads} heads of {config.head_size}, {config.num_key_value_heads} key-value heads, "
        f"{window}, context {config.max_position_embeddings}, RoPE base {config.rope_theta:g}"
    )


def _files(checkpoint: Checkpoint) -> str:
    decoders = checkpoint.decoders
    dtypes = sorted(
        {decoders[name].code if name in decoders else info.dtype for name, info in checkpoint.tensors.items()}
    )
    shards = {info.shard for info in checkpoint.tensors.values()}
    return f"{', '.join(dtypes)}, {_size(checkpoint.total_bytes)} in {len(shards)} file(s)"


def _fits(device: Any, loaded: int, row: int) -> str:
    free = free_bytes(device)
    if free is None:
        return "memory unknown"
    left = free - loaded
    if left < 0:
        return f"{_size(free)} free; the weights do not fit"
    return f"{_size(free)} free; the weights fit, and beside them the cache of {left // row:,} rows of that length"


def _size(nbytes: float) -> str:
    power = min(int(math.log10(max(nbytes, 1))) // 3, 3)
    return f"{nbytes / 1000**power:.4g} {('B', 'kB', 'MB', 'GB')[power]}"
