"""`jaxgen batch`: the rows of a file, through a model, into a directory."""

import argparse
import contextlib
import importlib.util
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jaxgen
from jaxgen.batch.generator import Generator, Result
from jaxgen.batch.plan import Planner
from jaxgen.batch.rows import pyarrow, read
from jaxgen.batch.run import Outcome, Part, Run, digest, digest_of_model
from jaxgen.errors import JaxgenError
from jaxgen.generation.options.checks import integer
from jaxgen.text.tokenizer import load_tokenizer

# Options that decide nothing of what is written.
_ELSEWHERE = ("command", "input", "output", "no_compile_cache", "model", "revision", "engine", "workers")


def run(options: argparse.Namespace, directory: Path, settings: Mapping[str, Any]) -> tuple[str, int]:
    """Do what is left of a run; what there is at the end, in a line, and how many rows are bad.

    `directory` is the model's, `settings` are options of `generate`. Raises `JaxgenError` for options and files that
    cannot be used, and for a disk that is full: what is finished stays.
    """
    from jaxgen.convert.load import open_configs

    _check(options)
    rows, bad = read(options.input)
    tokenizer = load_tokenizer(directory)
    every: dict[str, Any] = {"seed": options.seed or 0, **settings}
    config, stored = open_configs(directory)
    planner = Planner(tokenizer, config, stored, every)
    part_rows = integer(1)("--part-rows", options.part_rows)
    place = _computed_with(options, config.overflows_float16)
    filled = Run(options.output, _made_from(options, directory) | place, f".{options.format}", part_rows)
    with filled.held():
        left = filled.plan(planner, rows, bad)
        if left:
            own = {name: getattr(options, name) for name in ("batch_size", "logprobs", "dtype", "load_in_4bit")}
            with _outcomes(options, left, {"model": directory, **own, **every}) as outcomes:
                _show(filled, left, outcomes)
    return _said(filled), len(filled.bad)


@contextlib.contextmanager
def _outcomes(options: argparse.Namespace, left: list[Part], given: dict[str, Any]) -> Iterator[Iterator[Outcome]]:
    """What becomes of the rows that are left, here or on Ray."""
    if options.engine == "ray":
        from jaxgen.batch import on_ray

        yield on_ray.outcomes(left, options.workers, not options.no_compile_cache, given)
    else:
        with contextlib.closing(Generator(**given)) as generator:
            yield generator.run(task for part in left for task in part.tasks)


def _check(options: argparse.Namespace) -> None:
    integer(1)("--batch-size", options.batch_size)
    integer(1)("--workers", options.workers)
    if options.format == "parquet":
        pyarrow()
    if options.engine == "ray":
        if importlib.util.find_spec("ray") is None:
            raise JaxgenError('--engine ray needs ray: pip install -e ".[ray]", which brings it')
        import jax

        jax.config.update("jax_platforms", "cpu")  # the workers' devices are theirs


def _made_from(options: argparse.Namespace, directory: Path) -> dict[str, Any]:
    """What decides the output, as JSON."""
    given = {k: v for k, v in vars(options).items() if k not in _ELSEWHERE}
    given = {k: digest(v) if isinstance(v, Path) else v for k, v in given.items()}
    try:
        return {"input": digest(options.input), "model": digest_of_model(directory), **given, "seed": options.seed or 0}
    except OSError as error:
        raise JaxgenError(f"{error.filename}: it cannot be read: {error.strerror or error}") from error


def _computed_with(options: argparse.Namespace, overflows_float16: bool) -> dict[str, str]:
    """What bits depend on beside the model and the options: where the rest of a run goes on must be the same."""
    if options.engine == "ray":
        from jaxgen.batch import on_ray

        return on_ray.where_workers_run(computed_with, options.dtype, overflows_float16)
    return computed_with(options.dtype, overflows_float16)


def computed_with(dtype: str, overflows_float16: bool) -> dict[str, str]:
    """The dtype that a model has here, the kind of device, and the versions. Raises `JaxgenError` for no dtype."""
    import jax

    from jaxgen.convert.placement import as_device, as_dtype, auto_dtype

    device = as_device("auto")
    found = auto_dtype(device, overflows_float16) if dtype == "auto" else as_dtype(dtype)
    return {"dtype": found.name, "device": device.device_kind, "jax": jax.__version__, "jaxgen": jaxgen.__version__}


def _show(filled: Run, left: list[Part], outcomes: Iterator[Outcome]) -> None:
    """Write the parts that are left, with a bar where there is a terminal: rows, tokens per second, the time left."""
    from tqdm.auto import tqdm

    total, todo = (sum(len(part.tasks) for part in parts) for parts in (filled.parts, left))
    with tqdm(total=total, initial=total - todo, unit="row", disable=None) as bar:
        tokens = 0
        for result in filled.collect(left, outcomes):
            tokens += len(result.token_ids) if isinstance(result, Result) else 0
            seconds = bar.format_dict["elapsed"]
            bar.set_postfix_str(f"{tokens / max(seconds, 1e-3):.0f} tokens/s", refresh=False)
            bar.update()


def _said(filled: Run) -> str:
    planned = sum(len(part.tasks) for part in filled.parts)
    lost = {task.row.line for part in filled.parts for task in part.tasks} & filled.bad.keys()
    said = f"{filled.directory}: {planned - len(lost)} rows, {len(filled.parts)} parts"
    return f"{said}; bad rows, which errors.jsonl names: {len(filled.bad)}" if filled.bad else said
