"""Which part of a model lies on which device of a mesh: one table from what an axis stands for to axes of the mesh."""

import dataclasses
import math
from typing import Any

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from jaxgen.errors import JaxgenError
from jaxgen.models.config import DecoderConfig
from jaxgen.models.tensors import logical_axes
from jaxgen.quant.weight import Weight
from jaxgen.shards import Axes

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

    mesh: Any  # a `Mesh`; or an `AbstractMesh`, where nothing but sizes is asked for
    axes: tuple[tuple[str, Axes], ...]  # of `RULES`, as far as they divide what the model has

    @classmethod
    def of(cls, mesh: Mesh | AbstractMesh, config: DecoderConfig) -> "Layout":
        """How a model of this config lies on a mesh with the axes `data` and `model`, or one of them.

        Raises `JaxgenError` for a mesh with other axes.
        """
        unknown = [name for name in mesh.axis_names if name not in (DATA, MODEL)]
        if unknown or not mesh.axis_names:
            raise JaxgenError(
                f"device_map: a mesh with the axes {mesh.axis_names}; name them 'data' (rows) and 'model' (heads, "
                "feed-forward, vocabulary): jax.sharding.Mesh(devices, ('data', 'model'))"
            )
        sizes = {DATA: 1, MODEL: 1, **mesh.shape}
        mesh = _with_copies(mesh, sizes, config.num_key_value_heads)
        axes = {name: _dividing(mesh, RULES[name], count) for name, count in _counts(config).items()}
        axes["rows"] = tuple(name for name in RULES["rows"] if mesh.shape.get(name, 1) > 1)
        return cls(mesh, tuple(sorted(axes.items())))

    def remarks(self, config: DecoderConfig) -> list[str]:
        """What does not divide, and what becomes of it."""
        copies = self.mesh.shape.get(COPIES, 1)
        devices = self.mesh.shape.get(MODEL, 1) * copies
        heads = (
            f"{config.num_key_value_heads} key-value heads are not to be divided by {devices} devices: each is kept, "
            f"and attended to, on {copies} of them"
        )
        return [heads] * (copies > 1) + [
            f"{count} ({name}) are not to be divided by {devices}: each device has all"
            for name, count in _counts(config).items()
            if devices > 1 and name != "heads" and not self.over(name)
        ]

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
        rows, *others = logical_axes(config, name)
        over = self.over(rows)
        columns = others[0] if others and not set(over) & set(self.over(others[0])) else None
        if not isinstance(value, Weight):
            return PartitionSpec(*(self.over(axis) or None for axis in (rows, columns)[: value.ndim]))
        try:
            return value.divided(over, self.over(columns), self.parts(columns))
        except JaxgenError as error:
            raise type(error)(f"device_map: {name}: {error}") from None

    def bytes_of(self, config: DecoderConfig, name: str, value: Any) -> int:
        """What each device has of a parameter, or of its shape; raises as `specs`."""

        def part(array: Any, spec: PartitionSpec) -> int:
            shape = NamedSharding(self.mesh, spec).shard_shape(array.shape)
            return math.prod(shape) * np.dtype(array.dtype).itemsize

        return sum(jax.tree.leaves(jax.tree.map(part, value, self.specs(config, name, value))))

    def put(self, config: DecoderConfig, name: str, value: Any) -> Any:
        """A parameter in host memory, each part of it where it belongs; raises as `specs`."""

        def place(array: np.ndarray, spec: PartitionSpec) -> jax.Array:
            sharding = NamedSharding(self.mesh, spec)
            return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])

        return jax.tree.map(place, value, self.specs(config, name, value))


def _counts(config: DecoderConfig) -> dict[str, int]:
    """How many a model has of what is divided."""
    routing = next(filter(None, map(config.routing, range(config.num_hidden_layers))), None)
    counts = {
        "heads": config.num_key_value_heads,
        "mlp": config.intermediate_size,
        "vocab": config.vocab_size,
        "experts": routing.experts if routing else 0,
    }
    return {name: count for name, count in counts.items() if count}


def _with_copies(mesh: Any, sizes: dict[str, int], kv_heads: int) -> Any:
    """The mesh with its model axis split in two, where it has more devices than can share the key-value heads out.

    Its axes are automatic ones, whatever the user's are.
    """
    heads = int(np.gcd(sizes[MODEL], kv_heads))
    if heads == sizes[MODEL]:
        sizes, order = dict(mesh.shape), range(len(mesh.axis_names))
    else:
        order = [mesh.axis_names.index(name) for name in (DATA, MODEL) if name in mesh.axis_names]
        sizes = {DATA: sizes[DATA], MODEL: heads, COPIES: sizes[MODEL] // heads}
    if isinstance(mesh, AbstractMesh):
        return AbstractMesh(tuple(sizes.values()), tuple(sizes))
    return Mesh(np.transpose(mesh.devices, order).reshape(*sizes.values()), tuple(sizes))


def _dividing(mesh: Any, rule: Axes, count: int) -> Axes:
    """As many of the axes as divide a count."""
    axes = tuple(name for name in rule if mesh.shape.get(name, 1) > 1)
    while count % int(np.prod([mesh.shape[name] for name in axes], dtype=int)):
        axes = axes[:-1]
    return axes
