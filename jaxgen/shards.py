"""What one device of a mesh computes: its part of the heads, feed-forward and vocabulary; and where they meet.

The layers name what they are divided along ("heads", "mlp", "experts", "vocab"), and sum where a part is not the whole.
Outside of a mesh nothing is divided, and all of this is the identity. `jaxgen.parallel` decides what lies where.
"""

import contextlib
import contextvars
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType
from jaxtyping import Array, Float, Int

from jaxgen.errors import JaxgenError

Axes = tuple[str, ...]  # of a mesh
_current: contextvars.ContextVar[Mapping[str, Axes]] = contextvars.ContextVar("shards", default={})  # noqa: B039


@contextlib.contextmanager
def dividing(axes: Mapping[str, Axes]) -> Iterator[None]:
    """What is traced inside is one device's part: `axes` are those of the mesh that each name is divided over."""
    token = _current.set(axes)
    try:
        yield
    finally:
        _current.reset(token)


def divided(name: str | None) -> Axes:
    """The axes of the mesh that something is divided over; none where one device has all of it."""
    return () if name is None else _current.get().get(name, ())


def parts(name: str | None) -> int:
    """Into how many parts."""
    return jax.lax.psum(1, axes) if (axes := divided(name)) else 1


def part(name: str) -> Int[Array, ""] | int:
    """Which part is here."""
    return jax.lax.axis_index(axes) if (axes := divided(name)) else 0


def summed(x: Float[Array, "*axes"], name: str | None) -> Float[Array, "*axes"]:
    """The sum over all parts."""
    return jax.lax.psum(x, axes) if (axes := divided(name)) else x


def averaged(x: Float[Array, "*axes"], name: str | None) -> Float[Array, "*axes"]:
    """The mean over all parts."""
    return jax.lax.pmean(x, axes) if (axes := divided(name)) else x


def joined(x: Float[Array, "*axes"], name: str, axis: int = -1) -> Float[Array, "*longer"]:
    """All parts, one behind the other along an axis, by default the last one."""
    return jax.lax.all_gather(x, axes, axis=axis % x.ndim, tiled=True) if (axes := divided(name)) else x


def taken(x: Array) -> Array:
    """Of all rows those that are computed here."""
    if not divided("rows"):
        return x
    size = len(x) // parts("rows")
    return jax.lax.dynamic_slice_in_dim(x, part("rows") * size, size)


def check_axes(model: Any) -> None:
    """Raise `JaxgenError` for a model divided over axes whose every use JAX wants spelt out (`AxisType.Explicit`).

    Also for one on a mesh of its own inside of `jax.set_mesh` with such axes.
    """
    around = jax.sharding.get_abstract_mesh()
    if model.layout is not None and AxisType.Explicit in around.axis_types:
        raise JaxgenError(
            f"a model with a device_map inside of a mesh of explicit axes ({_named(around)}): call it outside of "
            "jax.set_mesh, or make that mesh with axis_types=(jax.sharding.AxisType.Auto,) for each axis"
        )
    for path, array in jax.tree.leaves_with_path(nnx.state(model)):
        sharding = jax.typeof(array).sharding
        if AxisType.Explicit in sharding.mesh.axis_types and any(sharding.spec):
            raise JaxgenError(
                f"{jax.tree_util.keystr(path, simple=True, separator='.').removesuffix('.value')} is divided over a "
                f"mesh of explicit axes ({_named(sharding.mesh)}); make the mesh with "
                "axis_types=(jax.sharding.AxisType.Auto,) for each axis, or load the model with device_map=mesh"
            )


def _named(mesh: Any) -> str:
    return ", ".join(f"{name!r}: {size}" for name, size in mesh.shape.items())
