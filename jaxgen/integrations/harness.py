"""`jaxgen eval`: tasks of lm-evaluation-harness, a table of their results, and a file with all of them."""

import contextlib
import inspect
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from jaxgen.errors import JaxgenError
from jaxgen.files import write_text
from jaxgen.integrations.lm_eval import JaxgenLM
from jaxgen.text.tokenizer import telling

_OURS = {"model", "model_args", "tasks", "task_manager", "batch_size", "max_batch_size", "device"}  # settled before


def evaluate(
    load: Callable[[], JaxgenLM],
    tasks: list[str],
    *,
    include_path: Path | None,
    output: Path | None,
    options: Mapping[str, Any],
) -> str:
    """The table that lm-eval prints of these tasks; `options` are those of its `simple_evaluate`.

    `load` makes the model, once all else is known to be there. `include_path` is a directory of tasks beside lm-eval's
    own. `output` is a file for everything that lm-eval says, as JSON. Raises `JaxgenError` for tasks that are not
    there, and for whatever else lm-eval complains of.
    """
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager
    from lm_eval.utils import handle_non_serializable, make_table

    if output is not None and not output.absolute().parent.is_dir():
        raise JaxgenError(f"--output {output}: there is no directory {output.parent}")
    if include_path is not None and not include_path.is_dir():
        raise JaxgenError(f"--include-path {include_path}: there is no such directory")
    if (limit := options.get("limit")) is not None and not limit > 0:
        raise JaxgenError(f"--limit {limit:g} must be more than 0")
    if strange := options.keys() - (inspect.signature(simple_evaluate).parameters.keys() - _OURS):
        raise JaxgenError(f"--set {min(strange)}=...: simple_evaluate of lm-eval has no such option for this command")
    with _quiet():
        with telling("lm-eval's tasks"):
            manager = TaskManager(include_path=None if include_path is None else str(include_path))
        for task in tasks:
            if not manager.match_tasks([task]):
                raise JaxgenError(f"--tasks {task}: lm-eval has no such task; `lm-eval ls tasks` lists them")
        lm = load()
        with telling("lm-eval"):
            run: Any = simple_evaluate  # a decorator hides its parameters from type checkers
            found = run(lm, tasks=manager.match_tasks(tasks), task_manager=manager, **options)
    if output is not None:
        told = json.dumps(found, indent=2, default=handle_non_serializable, ensure_ascii=False)
        write_text(output, told, "the result")
    return "\n".join([make_table(found), *([make_table(found, "groups")] if found.get("groups") else [])])


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without lm-eval's remarks on each of its tasks' files."""
    logger = logging.getLogger("lm_eval")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
