"""Which dtype and which devices a model is loaded to: HF's `dtype` and `device_map`, for JAX."""

import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from jaxgen.errors import JaxgenError

Device: TypeAlias = jax.Device  # pyright: ignore[reportInvalidTypeForm]  (jax leaves its type open)

DTYPES = ("float32", "bfloat16", "float16")
_PLATFORMS = {"cpu": "cpu", "gpu": "gpu", "cuda": "cuda", "tpu": "tpu"}
_BFLOAT16_SINCE = 8.0  # CUDA compute capability of the first GPUs with bfloat16 units (Ampere)


def as_dtype(value: Any, field: str = "dtype") -> np.dtype:
    """A weight dtype from its name, a JAX or numpy dtype, or a torch dtype (which is told by its name only).

    Raises `JaxgenError` for anything but float32, bfloat16 and float16.

    >>> as_dtype("bfloat16") == as_dtype(jnp.bfloat16)
    True
    """
    name = value if isinstance(value, str) else str(value)
    name = name.removeprefix("torch.")
    if name not in DTYPES:
        try:
            name = jnp.dtype(value).name
        except TypeError:
            name = ""
    if name not in DTYPES:
        raise JaxgenError(f"{field}={value!r} is not one of {', '.join(DTYPES)}")
    return jnp.dtype(name)


def auto_dtype(device: Device, overflows_float16: bool = False) -> np.dtype:
    """The dtype that `device` computes fastest without surprises.

    bfloat16 on TPUs and on GPUs that have it, float16 on older GPUs, unless the model overflows it, float32 on CPUs.
    """
    if device.platform == "cpu":
        return jnp.dtype("float32")
    capability = str(getattr(device, "compute_capability", ""))
    # Only CUDA's capability is a number; AMD's is the name of an architecture; JAX runs on none without bfloat16.
    if re.fullmatch(r"\d+(\.\d+)?", capability) and float(capability) < _BFLOAT16_SINCE:
        return jnp.dtype("float32" if overflows_float16 else "float16")
    return jnp.dtype("bfloat16")


def as_place(device_map: Any) -> Device | Mesh:
    """The device or the mesh that `device_map` names: as `as_device`, or a mesh, or the sizes of its axes.

    `{"model": 4, "data": 2}`: two rows of four devices, the first ones that JAX has. Raises `JaxgenError`.
    """
    if isinstance(device_map, Mesh):
        return device_map
    if not isinstance(device_map, Mapping) or not device_map or device_map.keys() - {"data", "model"}:
        return as_device(device_map)
    sizes = {name: device_map.get(name, 1) for name in ("data", "model")}
    if any(type(size) is not int or size < 1 for size in sizes.values()):
        raise JaxgenError(f"device_map={dict(device_map)}: how many devices 'model' and 'data' have, 1 or more each")
    devices, wanted = jax.devices(), math.prod(sizes.values())
    if wanted > len(devices):
        raise JaxgenError(f"device_map={dict(device_map)} needs {wanted} devices, and JAX has {len(devices)}")
    return Mesh(np.array(devices[:wanted]).reshape(*sizes.values()), tuple(sizes))


def as_device(device_map: Any) -> Device:
    """The device that `device_map` names: "auto", "cpu", "gpu", "cuda", "tpu", "cuda:1", a number, or a `jax.Device`.

    A mapping of "" to one of these is the same: the whole model goes there.

    Raises `JaxgenError` for any other value, and for a platform or index that JAX does not have here.
    """
    if isinstance(device_map, Mapping) and list(device_map) == [""]:  # HF's name for the whole model
        return as_device(device_map[""])
    if isinstance(device_map, jax.Device):
        return device_map
    if type(device_map).__module__ == "torch":
        return as_device(str(device_map))
    if isinstance(device_map, int) and not isinstance(device_map, bool):
        if not 0 <= device_map < len(jax.local_devices()):
            raise JaxgenError(
                f"device_map={device_map}: JAX has {len(jax.local_devices())} devices here, numbered from 0"
            )
        return jax.local_devices()[device_map]
    if device_map == "auto":
        return jax.local_devices()[0]
    match = re.fullmatch(r"([a-z]+)(?::(\d{1,4}))?", device_map) if isinstance(device_map, str) else None
    if match is None or match[1] not in _PLATFORMS:
        raise JaxgenError(
            f"device_map={device_map!r} is not 'auto', one of {', '.join(map(repr, _PLATFORMS))} "
            "(with an index: 'cuda:1'), a number, or a jax.Device, for one device; nor a jax.sharding.Mesh or "
            "{'model': 4, 'data': 2} for several"
        )
    try:
        devices = jax.local_devices(backend=_PLATFORMS[match[1]])
    except RuntimeError as error:
        raise JaxgenError(f"device_map={device_map!r}: JAX has no such devices here: {error}") from error
    index = int(match[2] or 0)
    if index >= len(devices):
        raise JaxgenError(f"device_map={device_map!r}: JAX has only {len(devices)} {match[1]} device(s)")
    return devices[index]
