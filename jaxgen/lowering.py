"""What the executable that is being traced will run on, where its form depends on more than the platform.

`lax.platform_dependent` chooses between forms of one computation. What it cannot know, while a model is traced, is
which compiler options will be used, and that a computation may change its shape for one platform. jaxgen's own
executables say so here; a user's own `jax.jit` gets the forms that need nothing special.

And what it must not depend on: JAX's switches for the whole process.
"""

import contextlib
import contextvars
import dataclasses
import os
from collections.abc import Iterator
from typing import Any

import jax
from jax import experimental

from jaxgen.errors import JaxgenError


@dataclasses.dataclass(frozen=True)
class Target:
    """One kind of executable."""

    gpu_decode: bool = False  # one token per row on a GPU, where every kernel launch counts
    kernels: bool = False  # the same, on one that runs those of `jaxgen.kernels`
    flash_prefill: bool = False  # prompts on a GPU whose cuDNN attends without keeping scores in memory
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


@contextlib.contextmanager
def own_rules() -> Iterator[None]:
    """Compute what is inside by the same rules in every process; also a decorator.

    Research code sets `jax_enable_x64`, `jax_numpy_dtype_promotion`, `jax_numpy_rank_promotion` and
    `jax_threefry_partitionable` for itself. jaxgen's dtypes are 32-bit or narrower and its draws fixed whatever they
    say, so that the same call gives the same bytes. Raises `JaxgenError` where `check_process` does.
    """
    check_process()
    with (
        _x64_off(),
        jax.numpy_dtype_promotion("standard"),
        jax.numpy_rank_promotion("allow"),
        jax.threefry_partitionable(True),  # the draws of every supported version's default
    ):
        yield


def _x64_off() -> Any:
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(False)
    return vars(experimental)["disable_x64"]()  # of old versions


_process: int | None = None  # the one in which jaxgen first used JAX


def check_process() -> None:
    """Raise `JaxgenError` in a forked child of a process that used JAX: without its threads it would wait for ever."""
    global _process  # noqa: PLW0603
    own = os.getpid()
    if _process is None:
        _process = own
    elif _process != own:
        raise JaxgenError(
            f"this process was forked from one (pid {_process}) in which JAX already ran, and JAX does not survive a "
            "fork; start workers with multiprocessing.get_context('spawn'), and load the model there"
        )


def device_runs_kernels(device: object) -> bool:
    """Whether a device is an NVIDIA GPU of compute capability 8.0 or newer: those that `jaxgen.kernels` is for."""
    capability = str(getattr(device, "compute_capability", ""))
    if getattr(device, "platform", "") != "gpu" or not capability.replace(".", "").isdigit():
        return False
    return float(capability) >= 8.0
