"""The two executables that generate, prefill and decode, which say when they compile; and the cache of them."""

import logging
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxgen.errors import JaxgenError
from jaxgen.generation.choosing.kept import keep_in
from jaxgen.generation.programs.strict import DETERMINISTIC_OPTIONS
from jaxgen.generation.searches.search import Search
from jaxgen.generation.searches.speculate import Pair
from jaxgen.lowering import Target, own_rules, tracing_for
from jaxgen.paths import as_path
from jaxgen.quant.matmul import FUSION_OPTIONS
from jaxgen.quant.weight import Weight

logger = logging.getLogger("jaxgen")
# What compilers raise; Pallas also while its kernels are traced, or where it is missing.
_REFUSALS = (jax.errors.JaxRuntimeError, NotImplementedError, ImportError)


class Stage:
    """`jax.jit(function)` that logs one line per compilation: `describe(*args)`, and the seconds it took.

    `compiled_for` is what `function` is traced for. Compilers may refuse experimental `compiler_options`, or fail
    on a program because of them: the call then goes to the stage `otherwise`, from then on, and this is logged once.

    >>> double = Stage(lambda x: 2 * x, describe=lambda x: f"double[{x.shape}]")
    >>> int(double(jax.numpy.ones(())))
    2
    """

    def __init__(
        self,
        function: Callable[..., Any],
        describe: Callable[..., str],
        *,
        compiled_for: Target = Target(),  # noqa: B008  (frozen)
        otherwise: "Stage | None" = None,
        **jit_options: Any,
    ):
        self.describe, self.otherwise = describe, otherwise
        self.traces, self._refused = 0, False
        self._options = jit_options.get("compiler_options", {})

        def counted(*args: object) -> Any:
            self.traces += 1  # Python runs this only while tracing
            with tracing_for(compiled_for):
                return function(*args)

        counted.__name__ = counted.__qualname__ = getattr(function, "__name__", "stage").strip("<>")
        self._jitted = jax.jit(counted, **jit_options)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Those that a call is compiled with, as far as is known by now."""
        return self.otherwise.compiler_options if self._refused and self.otherwise else self._options

    def __call__(self, *args: object) -> Any:
        """Run, and log if that took a compilation."""
        if self._refused and self.otherwise is not None:
            return self.otherwise(*args)
        traces, start = self.traces, time.perf_counter()
        try:
            with own_rules():
                result = self._jitted(*args)
        except Exception as error:  # XLA, Pallas and Triton refuse with errors of many kinds
            if self.otherwise is None or _out_of_memory(error) or _used_up(args):
                raise
            if not isinstance(error, _REFUSALS):
                with own_rules():
                    self._jitted.trace(*args)  # raises again what comes from the function, and not from its compiler
            result = self.otherwise(*args)  # raises again what was not the compiler's affair
            self._refused = True
            said = str(error).strip().partition("\n")[0]
            logger.warning(
                "%s falls back to a slower form, because its compiler said: %.300s", self.describe(*args), said
            )
            return result
        if self.traces != traces:
            logger.info("compiled %s in %.1f s", self.describe(*args), time.perf_counter() - start)
        return result


def _out_of_memory(error: Exception) -> bool:
    """Whether the device has no room; a kernel that asks for too much shared memory is the compiler's affair."""
    return "RESOURCE_EXHAUSTED" in str(error) and "Shared memory" not in str(error)


def _used_up(args: tuple[Any, ...]) -> bool:
    """Whether donated arguments are gone: then it was not the compiler that failed."""
    return any(leaf.is_deleted() for leaf in jax.tree.leaves(args) if isinstance(leaf, jax.Array))


def _run_prefill(
    search: Search,
    structure: Any,
    weights: Any,
    drafter: Any,
    drafter_weights: Any,
    prompts: Any,
    key: Any,
    traced: Any,
    layout: Any,
) -> Any:
    models = _models(structure, weights, drafter, drafter_weights)
    return search.prefill(models, prompts, key, traced, layout)


def _run_decode(
    search: Search,
    structure: Any,
    weights: Any,
    drafter: Any,
    drafter_weights: Any,
    state: Any,
    until: Any,
    traced: Any,
    static: Any,
) -> Any:
    models = _models(structure, weights, drafter, drafter_weights)
    return search.decode(models, state, until, traced, static)


def _models(structure: Any, weights: Any, drafter: Any, drafter_weights: Any) -> Any:
    """The model, and with an assistant both."""
    model = structure.module(weights)
    return model if drafter is None else Pair(model, drafter.module(drafter_weights))


def _describe_prefill(*args: Any) -> str:
    *_, prompts, _, _, layout = args
    rows, length = prompts.tokens.shape
    return f"prefill[batch={rows}, prompt={layout.fresh or length}, total={layout.total}]"


def _describe_decode(*args: Any) -> str:
    state = args[5]
    return f"decode[batch={state.tokens.shape[0]}, total={state.tokens.shape[1]}]"


# Weights are arguments, never constants of the executable; the state is donated, so the cache is updated in place.
_PREFILL: dict[str, Any] = {"static_argnums": (0, 1, 3, 8)}
_DECODE: dict[str, Any] = _PREFILL | {"donate_argnums": 5}
_prefill = Stage(_run_prefill, _describe_prefill, **_PREFILL)
_decode = Stage(_run_decode, _describe_decode, **_DECODE)
_decode_on_gpu = Stage(_run_decode, _describe_decode, compiled_for=Target(gpu_decode=True), **_DECODE)
_decode_int4_on_gpu = Stage(
    _run_decode,
    _describe_decode,
    compiled_for=Target(gpu_decode=True, fuses_int4=True),
    otherwise=_decode,
    compiler_options=FUSION_OPTIONS,
    **_DECODE,
)
# Strict ones change their form only where they never could run: another form is another order of sums.
_strict_prefill_on_gpu = Stage(_run_prefill, _describe_prefill, compiler_options=DETERMINISTIC_OPTIONS, **_PREFILL)
_strict_decode_on_gpu = Stage(
    _run_decode,
    _describe_decode,
    compiled_for=Target(gpu_decode=True),
    compiler_options=DETERMINISTIC_OPTIONS,
    **_DECODE,
)

# Made of `jaxgen.kernels`, or with cuDNN's attention; and as above where a compiler refuses these.
_flash_prefill_on_gpu = Stage(
    _run_prefill, _describe_prefill, compiled_for=Target(flash_prefill=True), otherwise=_prefill, **_PREFILL
)
_KERNELS = Target(gpu_decode=True, kernels=True)
_kernels_on_gpu, _kernels_int4_on_gpu, _strict_kernels_on_gpu = (
    Stage(
        _run_decode,
        _describe_decode,
        compiled_for=_KERNELS,
        otherwise=otherwise,
        compiler_options=otherwise.compiler_options if otherwise is _strict_decode_on_gpu else {},
        **_DECODE,
    )
    for otherwise in (_decode_on_gpu, _decode_int4_on_gpu, _strict_decode_on_gpu)
)


def stages_for(model: object, weights: list[Any], strict: bool = False) -> tuple[Stage, Stage]:
    """Prefill and decode as they run fastest where these weights are, or so that their sums have one order.

    `weights` are the model's, as `jaxgen.generation.programs.structure.split` lists them.
    """
    kernels = getattr(model, "decodes_with_kernels", False)
    device = next(iter(jax.tree.leaves(weights)[0].devices()))
    if device.platform != "gpu":
        return _prefill, _decode
    if strict:
        return _strict_prefill_on_gpu, _strict_kernels_on_gpu if kernels else _strict_decode_on_gpu
    fuses = any(isinstance(weight, Weight) and weight.fuses for weight in weights)
    if kernels:
        return _flash_prefill_on_gpu, _kernels_int4_on_gpu if fuses else _kernels_on_gpu
    return _prefill, _decode_int4_on_gpu if fuses else _decode_on_gpu


def enable_compile_cache(directory: str | os.PathLike[str] | None = None) -> Path:
    """Keep compiled executables, and the automata of constraints, for the next process; returns the directory.

    By default a private directory of this user (mode 0700). JAX loads and runs what it finds there: never use a
    directory that others can write to. Raises `JaxgenError` if the directory cannot be made, belongs to someone else
    or is writable by others.
    """
    path = as_path(directory or "~/.cache/jaxgen/compiled", "enable_compile_cache: directory")
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        status = path.stat()
    except OSError as error:
        raise JaxgenError(f"{path!s:.200} cannot be a directory of compiled programs: {error}") from error
    if hasattr(os, "getuid") and (status.st_uid != os.getuid() or status.st_mode & 0o022):
        raise JaxgenError(
            f"{path} can be written by other users, and whoever writes there can run code here; "
            "choose a private directory, or chmod 700 it"
        )
    jax.config.update("jax_compilation_cache_dir", str(path))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    keep_in(path / "constraints")
    return path
