"""Tasks of lm-eval whose data stands here, and what a model says to them: one of each kind of request."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

CHOICES = [
    {"question": "A list of colors: red, blue", "choices": [", green", ", yellow", " and", ","], "answer": 0},
    {"question": "1, 2, 3, ", "choices": ["4, 5", "5, 6", "3", "é"], "answer": 0},
    {"question": "Portugal is a country in southwestern", "choices": [" Europe", " Asia"], "answer": 0},
    {"question": "I am a cat.", "choices": [" " + "word " * 5, " 日本"], "answer": 1},
]
TEXTS = [{"text": "Portugal is a country."}, {"text": ", ".join(map(str, range(1, 91)))}, {"text": "é"}]
QUESTIONS = [
    {"question": "1, 2, 3", "answer": ""},
    {"question": "20, 21", "answer": ""},
    {"question": "A list of colors: red, blue", "answer": ""},
    {"question": "I am a cat.\n", "answer": ""},
    {"question": "8, 9, 10, 11, 1", "answer": ""},  # its end is the beginning of a stop
]
TASKS: dict[str, tuple[list[dict[str, Any]], dict[str, Any]]] = {
    "choices": (
        CHOICES,
        {
            "output_type": "multiple_choice",
            "doc_to_text": "{{question}}",
            "doc_to_choice": "{{choices}}",
            "doc_to_target": "answer",
            "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        },
    ),
    "rolling": (
        TEXTS,
        {
            "output_type": "loglikelihood_rolling",
            "doc_to_text": "",
            "doc_to_target": "{{text}}",
            "metric_list": [{"metric": "word_perplexity"}, {"metric": "bits_per_byte"}],
        },
    ),
    "until": (
        QUESTIONS,
        {
            "output_type": "generate_until",
            "doc_to_text": "{{question}}",
            "doc_to_target": "{{answer}}",
            "generation_kwargs": {"until": ["\n", "8, ", "12", " pur"], "max_gen_toks": 24},
            "metric_list": [{"metric": "bypass"}],
        },
    ),
}


def write_tasks(directory: Path) -> Path:
    """The tasks as lm-eval reads them, and their data beside them."""
    for name, (data, config) in TASKS.items():
        file = directory / f"{name}.jsonl"
        file.write_text("".join(json.dumps(line) + "\n" for line in data))
        source = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(file)}}, "test_split": "test"}
        (directory / f"{name}.yaml").write_text(json.dumps({"task": name, **source, **config}))
    return directory


@contextlib.contextmanager
def datasets_in(directory: Path) -> Iterator[None]:
    """Data sets are prepared in a directory that goes away."""
    import datasets

    before = datasets.config.HF_DATASETS_CACHE
    datasets.config.HF_DATASETS_CACHE = directory
    yield
    datasets.config.HF_DATASETS_CACHE = before


def responses(lm: Any, tasks: Path, names: Sequence[str] = (*TASKS,), **options: Any) -> dict[str, list[Any]]:
    """What a model says to every request of the tasks."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    found = simple_evaluate(
        lm,
        tasks=[*names],
        task_manager=TaskManager(include_path=str(tasks), include_defaults=False),
        bootstrap_iters=0,
        **options,
    )
    assert found is not None
    return {task: [sample["resps"] for sample in found["samples"][task]] for task in names}


def same(mine: Any, theirs: Any) -> None:
    """Numbers to 1e-4, or to the last bit of float32, in which `hf` sums; all else as it is."""
    if isinstance(theirs, dict):
        assert mine.keys() == theirs.keys()
        for name in theirs:
            same(mine[name], theirs[name])
    elif isinstance(theirs, float):
        assert mine == pytest.approx(theirs, abs=1e-4, rel=1.2e-7)
    elif isinstance(theirs, list | tuple):
        assert len(mine) == len(theirs)
        for one, other in zip(mine, theirs, strict=True):
            same(one, other)
    else:
        assert mine == theirs
