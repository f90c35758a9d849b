"""The same run on Ray Data: workers with a model each do one part after the other; the parts are written here.

A worker that dies is replaced, and its part is done again. What is finished is seen by the files of the parts, as
without Ray, and so a run may go on with or without it: Ray's own checkpoints would know of one kind of run only.
"""

import contextlib
import dataclasses
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
import ray.data
import ray.exceptions

from jaxgen.batch.generator import Generator, Result
from jaxgen.batch.rows import Row
from jaxgen.batch.run import Outcome, Part
from jaxgen.errors import JaxgenError


class Worker:
    """Does a part: its rows in, what became of them out, both as JSON."""

    def __init__(self, keep_compiled: bool, options: Mapping[str, Any]):
        if keep_compiled and "JAX_COMPILATION_CACHE_DIR" not in os.environ:
            from jaxgen.generation.programs.stages import enable_compile_cache

            with contextlib.suppress(JaxgenError, OSError):  # then they are not kept
                enable_compile_cache()
        self._generator = Generator(**options)

    def __call__(self, batch: Mapping[str, Any]) -> dict[str, list[str]]:
        """One part."""
        tasks = [self._generator.planner.plan(Row(**row)) for row in json.loads(batch["rows"][0])]
        told = [
            (task.row.line, str(result) if isinstance(result, JaxgenError) else vars(result))
            for task, result in self._generator.run(tasks)
        ]
        return {"told": [json.dumps(told)]}


def where_workers_run(function: Callable[..., Any], *arguments: Any) -> Any:
    """What a function gives there, or here where there are no GPUs. Raises `JaxgenError` for what goes wrong there."""
    _join()
    if not _gpus():
        return function(*arguments)
    try:
        return ray.get(ray.remote(num_gpus=_gpus())(function).remote(*arguments))
    except ray.exceptions.RayError as error:
        raise _failed(error) from error


def _join() -> None:
    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False)


def _gpus() -> int:
    """How many a worker takes."""
    return 1 if ray.cluster_resources().get("GPU") else 0


def _failed(error: Exception) -> JaxgenError:
    return JaxgenError(f"a worker failed: {str(error).strip()[-600:]}")


def outcomes(parts: Sequence[Part], workers: int, keep_compiled: bool, options: Mapping[str, Any]) -> Iterator[Outcome]:
    """What becomes of the rows of parts, on the cluster of RAY_ADDRESS, or on one of this machine.

    `options` are those of `Generator`, whose model every worker must be able to read. A worker takes a GPU where the
    cluster has any. Raises `JaxgenError` for what ends a worker otherwise than by its death.
    """
    _join()
    ray.data.DataContext.get_current().enable_progress_bars = False
    tasks = {task.row.line: task for part in parts for task in part.tasks}
    items = [{"rows": json.dumps([dataclasses.asdict(task.row) for task in part.tasks])} for part in parts]
    results = ray.data.from_items(items, override_num_blocks=len(items)).map_batches(
        Worker,
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=min(workers, len(items))),
        fn_constructor_kwargs={"keep_compiled": keep_compiled, "options": dict(options)},
        num_gpus=_gpus(),
    )
    try:
        for item in results.iter_rows():
            for line, told in json.loads(item["told"]):
                yield tasks[line], JaxgenError(told) if isinstance(told, str) else Result(**told)
    except ray.exceptions.RayError as error:
        raise _failed(error) from error
