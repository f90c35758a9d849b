"""What the executable that is being traced will run on, where its form depends on more than the platform.

`lax.platform_dependent` chooses between forms of one computation. What it cannot know, while a model is traced, is
which compiler options will be used, and that a computation may change its shape for one platform. jaxgen's own
executables say so here; a user's own `jax.jit` gets the forms that need nothing special.
"""

import contextlib
import contextvars
import dataclasses
from collections.abc import Iterator


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of executable."""

    gpu_decode: bool = False  # one token per row on a GPU, where every kernel launch counts
    fuses_int4: bool = False  # compiled with `jaxgen.quant.matmul.FUSION_OPTIONS`


_NOTHING_SPECIAL = Target()
_current: contextvars.ContextVar[Target] = contextvars.ContextVar("target", default=_NOTHING_SPECIAL)


def target() -> Target:
    """What is being traced for."""
    return _current.get()


@contextlib.contextmanager
def tracing_for(target: Target) -> Iterator[None]:
    """Trace what is inside for `target`."""
    token = _current.set(target)
    try:
        yield
    finally:
        _current.reset(token)
