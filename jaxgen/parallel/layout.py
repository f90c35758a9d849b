"""Which part of a model lies on which device of a mesh: one table from what an axis stands for to axes of the mesh."""

import dataclasses
import logging
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgen.errors import JaxgenError
from jaxgen.models.config import DecoderConfig
from jaxgen.models.tensors import logical_axes
from jaxgen.quant.weight import Weight
from jaxgen.shards import Axes

logger = logging.getLogger("jaxgen")

DATA, MODEL, COPIES = "data", "model", "copies"
# What is not named lies on every device. Copies are devices that share key-value heads, where there are more devices.
RULES: dict[str, Axes] = {
    "rows": (DATA,),
    "heads": (MODEL,),
    "mlp": (MODEL, COPIES),
    "experts": (MODEL, COPIES),
    "vocab": (MODEL, COPIES),
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """A mesh of the axes `data`, `model` and perhaps `copies`, and what of a model is divided over which of them."""

    mesh: Mesh
    axes: tuple[tuple[str, Axes], ...]  # of `RULES`, as far as they divide what the model has

    @classmethod
    def of(cls, mesh: Mesh, config: DecoderConfig) -> "Layout":
        """How a model of this config lies on a mesh with the axes `data` and `model`, or one of them.

        Raises `JaxgenError` for a mesh with other axes, and for a family that is not to be divided.
        """
        unknown = [name for name in mesh.axis_names if name not in (DATA, MODEL)]
        if unknown or not mesh.axis_names:
            raise JaxgenError(
                f"device_map: a mesh with the axes {mesh.axis_names}; name them 'data' (rows) and 'model' (heads, "
                "feed-forward, vocabulary): jax.sharding.Mesh(devices, ('data', 'model'))"
            )
        sizes = {DATA: 1, MODEL: 1, **mesh.shape}
        if sizes[MODEL] > 1 and config.stacks_projections:
            raise JaxgenError(
                f"device_map: {type(config).__name__} stacks its projections in one matrix, whose parts are no models "
                f"of fewer heads; use {{'data': {mesh.size}}}"
            )
        mesh = _with_copies(mesh, sizes, config.num_key_value_heads)
        routing = next(filter(None, map(config.routing, range(config.num_hidden_layers))), None)
        counts = {
            "heads": config.num_key_value_heads,
            "mlp": config.intermediate_size,
            "vocab": config.vocab_size,
            "experts": routing.experts if routing else 0,
        }
        axes = {name: _dividing(mesh, RULES[name], count) for name, count in counts.items() if count}
        for name, count in counts.items():
            if count and sizes[MODEL] > 1 and not axes[name]:
                logger.warning("%d (%s) are not to be divided by %d: each device has all", count, name, sizes[MODEL])
        axes["rows"] = tuple(name for name in RULES["rows"] if mesh.shape.get(name, 1) > 1)
        return cls(mesh, tuple(sorted(axes.items())))

    def over(self, name: str | None) -> Axes:
        """The axes of the mesh that something is divided over."""
        return dict(self.axes).get(name or "", ())

    def parts(self, name: str | None) -> int:
        """Into how many parts."""
        return int(np.prod([self.mesh.shape[axis] for axis in self.over(name)], dtype=int))

    @property
    def everywhere(self) -> NamedSharding:
        """Of what every device has."""
        return NamedSharding(self.mesh, PartitionSpec())

    def specs(self, config: DecoderConfig, name: str, value: Any) -> Any:
        """How a parameter is divided: a `PartitionSpec`, or a `Weight` of them. Raises `JaxgenError`."""
        rows, *others = logical_axes(config)[name]
        over = self.over(rows)
        columns = others[0] if others and not set(over) & set(self.over(others[0])) else None
        if not isinstance(value, Weight):
            return PartitionSpec(*(self.over(axis) or None for axis in (rows, columns)[: value.ndim]))
        try:
            return value.divided(over, self.over(columns), self.parts(columns))
        except JaxgenError as error:
            raise type(error)(f"device_map: {name}: {error}") from None

    def put(self, config: DecoderConfig, name: str, value: Any) -> Any:
        """A parameter in host memory, each part of it where it belongs; raises as `specs`."""

        def place(array: np.ndarray, spec: PartitionSpec) -> jax.Array:
            sharding = NamedSharding(self.mesh, spec)
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return jax.tree.map(place, value, self.specs(config, name, value))


def _with_copies(mesh: Mesh, sizes: dict[str, int], kv_heads: int) -> Mesh:
    """The mesh with its model axis split in two, where it has more devices than can share the key-value heads out."""
    heads = int(np.gcd(sizes[MODEL], kv_heads))
    if heads == sizes[MODEL]:
        return Mesh(mesh.devices, mesh.axis_names)  # of automatic axes, whatever the user's are
    copies = sizes[MODEL] // heads
    logger.warning(
        "%d key-value heads are not to be divided by %d devices: each is kept, and attended to, on %d of them",
        kv_heads,
        sizes[MODEL],
        copies,
    )
    order = [mesh.axis_names.index(name) for name in (DATA, MODEL) if name in mesh.axis_names]
    devices = np.transpose(mesh.devices, order).reshape(sizes[DATA], heads, copies)
    return Mesh(devices, (DATA, MODEL, COPIES))


def _dividing(mesh: Mesh, rule: Axes, count: int) -> Axes:
    """As many of the axes as divide a count."""
    axes = tuple(name for name in rule if mesh.shape.get(name, 1) > 1)
    while count % int(np.prod([mesh.shape[name] for name in axes], dtype=int)):
        axes = axes[:-1]
    return axes
