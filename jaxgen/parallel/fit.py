"""Which layouts a model has on so many devices, what each device has then, and which one is taken by itself."""

import dataclasses
import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from jax.sharding import AbstractMesh, Mesh

from jaxgen.attention import query_block
from jaxgen.errors import JaxgenError
from jaxgen.generation.prompts.memory import cache_bytes, free_bytes, prefill_bytes, usual_length
from jaxgen.models.config import DecoderConfig
from jaxgen.parallel.layout import DATA, MODEL, Layout

logger = logging.getLogger("jaxgen")


@dataclasses.dataclass(frozen=True)
class Share:
    """What each device has of a model that lies on `model` times `data` of them; or why it cannot lie so."""

    model: int
    data: int
    weights: int = 0  # bytes
    cache: int = 0  # bytes of a row of `usual_length`, on each device that has part of it
    remarks: tuple[str, ...] = ()
    refusal: str | None = None

    @property
    def sizes(self) -> dict[str, int]:
        """As `device_map` has them."""
        return {MODEL: self.model, DATA: self.data}


def shares(config: DecoderConfig, parameters: Mapping[str, Any], itemsize: int, devices: int) -> list[Share]:
    """The layouts that use all of so many devices, from whole models to parts of one.

    `parameters`: arrays or their shapes by dotted path, some of them a `Weight`. `itemsize`: bytes of a float of the
    cache.
    """
    return [
        _share(config, parameters, itemsize, model, devices // model)
        for model in range(1, devices + 1)
        if devices % model == 0
    ]


def _share(config: DecoderConfig, parameters: Mapping[str, Any], itemsize: int, model: int, data: int) -> Share:
    try:
        layout = Layout.of(AbstractMesh((data, model), (DATA, MODEL)), config)
        weights = sum(layout.bytes_of(config, name, value) for name, value in parameters.items())
    except JaxgenError as error:
        return Share(model, data, refusal=str(error).removeprefix("device_map: "))
    cache = cache_bytes(config, itemsize, config.cache_slots(usual_length(config))) // layout.parts("heads")
    return Share(model, data, weights, cache, tuple(layout.remarks(config)))


def spread(
    config: DecoderConfig, parameters: Callable[[], Mapping[str, Any]], itemsize: int, devices: Sequence[Any]
) -> Layout | None:
    """A layout on all devices, where one has no room for weights and one row; None where it has, or nobody says.

    `model` is the smallest number that fits; `parameters` and `itemsize` as of `shares`. Raises `JaxgenError` where no
    layout's weights fit.
    """
    free = [own_memory(device) for device in devices]
    if len(devices) == 1 or None in free:
        return None
    room = min(size for size in free if size is not None)
    one_row = partial(with_one_row, config, itemsize)
    alone, *_ = found = shares(config, parameters(), itemsize, len(devices))
    if one_row(alone) <= (free[0] or 0):
        return None
    possible = [share for share in found if share.refusal is None]
    fitting = [share for share in possible if one_row(share) <= room]
    chosen = fitting[0] if fitting else min(possible, key=lambda share: share.weights)
    wanted = f"{alone.weights / 1e9:.2f} GB of weights, and room for a row of {usual_length(config)} tokens"
    if chosen.weights > room:
        refused = [f"{share.sizes} is refused: {share.refusal}" for share in found if share.refusal]
        raise JaxgenError(
            f"device_map='auto': {wanted}: at least {chosen.weights / 1e9:.2f} GB on each of {len(devices)} devices, "
            f"and {room / 1e9:.2f} GB are free; use more devices, or weights of four bits"
            + "".join(f"; {line}" for line in refused)
        )
    logger.warning(
        "device_map='auto': %s do not fit in %.2f GB of one device; device_map=%s takes all %d, with %.2f GB of "
        "weights on each",
        wanted,
        (free[0] or 0) / 1e9,
        chosen.sizes,
        len(devices),
        chosen.weights / 1e9,
    )
    return Layout.of(Mesh(np.array(devices).reshape(chosen.data, chosen.model), (DATA, MODEL)), config)


def with_one_row(config: DecoderConfig, itemsize: int, share: Share) -> int:
    """Bytes that each device needs for its weights, for the cache of a row of `usual_length`, and to read that."""
    length = usual_length(config)
    return share.weights + share.cache + prefill_bytes(config, itemsize, 1, length, query_block(length), length)


def own_memory(device: Any) -> int | None:
    """Free bytes of a device that shares its memory with no other, or None where nobody says."""
    return None if device.platform == "cpu" else free_bytes(device)
