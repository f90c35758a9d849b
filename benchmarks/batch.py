"""Ragged rows offline: `jaxgen.batch.Generator`, a plain loop of `generate`, and transformers in the same batches.

    python benchmarks/batch.py [--rows 2000] [--rows-125m 2000] [--batch-size 16] [--json FILE]

Needs the extra `oracle`. The demo, and random weights of the 125M shape, float32, on the CPU; 0 rows leave a model out.
Takes half an hour on two cores, most of it for the 125M shape.
Prompts of 4 to 96 random tokens; new tokens of each row from a geometric distribution of mean 16, at most 64, without
an end token. The loops take the rows as they come, and decode each batch until its longest row has ended.
Each runs once: `rows_per_second` leaves out `compile_seconds`, in which something was traced, lowered or compiled, and
`rows_per_second_with_compilations` does not. `prompt_padding` is the share of the prompt positions read that hold no
token, `idle_steps` that of the rows' decode steps that give no token that was asked for.

What a small model cannot win: a prompt is read alone, in pieces of one shape, [1, 64], for a row's bits must not depend
on the others; the loop reads 16 prompts at a time. Some steps are idle because the engine looks for rows that ended
every 8 steps, and because the rows of each bucket of lengths end alone.
"""

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from flax import nnx
from shapes import SHAPE_125M

import jaxgen
from jaxgen.batch import Generator
from jaxgen.batch.rows import Row

CHUNK = 64  # prompt tokens that an engine reads at a time
compiling: list[tuple[str, float, float]] = []  # an event, and when it began and ended


class Numbers:
    """A tokenizer: numbers are ids."""

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [int(word) for word in text.split()]}

    def decode(self, ids: Any, **_: Any) -> str:
        return "".join(f"{token} " for token in ids)


def load(number: int) -> list[tuple[list[int], int]]:
    """Prompts, and how many tokens each is to get."""
    rng = np.random.default_rng(0)
    news = np.minimum(rng.geometric(1 / 16, number), 64)
    return [(rng.integers(3, 97, rng.integers(4, 97)).tolist(), int(new)) for new in news]


def through_batch(model: Any, requests: list[tuple[list[int], int]], size: int) -> dict[str, float]:
    generator = Generator(model, Numbers(), batch_size=size, eos_token_id=None)
    rows = [Row(i, i, " ".join(map(str, ids)), {"max_new_tokens": new}) for i, (ids, new) in enumerate(requests)]
    tasks = sorted((generator.planner.plan(row) for row in rows), key=lambda task: -task.slots)
    counts: dict[int, dict[str, int]] = {}
    done = 0
    for task, result in generator.run(tasks):
        assert not isinstance(result, Exception) and len(result.token_ids) == task.options["max_new_tokens"]
        done += 1
        counts[task.slots] = generator._engine.stats()  # pyright: ignore[reportOptionalMemberAccess]
    assert done == len(requests)
    generator.close()
    read = sum(-(-len(ids) // CHUNK) * CHUNK for ids, _ in requests)
    steps = sum(each["row_steps"] for each in counts.values())
    return {
        "prompt_padding": 1 - sum(len(ids) for ids, _ in requests) / read,
        "idle_steps": 1 - sum(each["tokens"] for each in counts.values()) / steps,
        "buckets": len(counts),
    }


def in_batches(generate: Callable[..., Any], requests: list[tuple[list[int], int]], size: int) -> dict[str, float]:
    read = steps = 0
    for at in range(0, len(requests), size):
        part = requests[at : at + size]
        width, new = max(len(ids) for ids, _ in part), max(new for _, new in part)
        ids = np.array([[0] * (width - len(ids)) + ids for ids, _ in part])
        mask = np.array([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in part])
        generate(ids, mask, new)
        read, steps = read + ids.size, steps + new * len(part)
    return {
        "prompt_padding": 1 - sum(len(ids) for ids, _ in requests) / read,
        "idle_steps": 1 - sum(new for _, new in requests) / steps,
    }


def compiles(event: str, duration_secs: float, **_: Any) -> None:
    """Told by JAX of all that it measures."""
    if event.startswith("/jax/core/compile/"):
        now = time.perf_counter()
        compiling.append((event, now - duration_secs, now))


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """Seconds that lie in any of the spans: one trace is made within another, and two threads compile at a time."""
    seconds, until = 0.0, float("-inf")
    for start, end in sorted(spans):
        seconds += max(0.0, end - max(start, until))
        until = max(until, end)
    return seconds


def timed(run: Callable[[], dict[str, float]], rows: int) -> dict[str, Any]:
    """What a run gives, with the seconds in which something was compiled and without them."""
    compiling.clear()
    start = time.perf_counter()
    found = run()
    seconds, compile_seconds = time.perf_counter() - start, covered((began, ended) for _, began, ended in compiling)
    return {
        "rows_per_second": rows / (seconds - compile_seconds),
        "rows_per_second_with_compilations": rows / seconds,
        "compile_seconds": compile_seconds,
        "compilations": sum(event.endswith("/backend_compile_duration") for event, *_ in compiling),
        **found,
    }


def measure(name: str, directory: Path, number: int, size: int) -> dict[str, Any]:
    requests = load(number)
    ours = jaxgen.AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    theirs: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()

    def here(ids: Any, mask: Any, new: int) -> None:
        ours.generate(ids, mask, max_new_tokens=new, eos_token_id=None, do_sample=False)

    def there(ids: Any, mask: Any, new: int) -> None:
        options = {"max_new_tokens": new, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        with torch.no_grad():
            theirs.generate(torch.from_numpy(ids), attention_mask=torch.from_numpy(mask), **options)

    ways: dict[str, Callable[[], dict[str, float]]] = {
        "jaxgen batch": lambda: through_batch(ours, requests, size),
        "a loop of generate": lambda: in_batches(here, requests, size),
        "a loop of transformers' generate": lambda: in_batches(there, requests, size),
    }
    found = {}
    for way, run in ways.items():
        found[way] = timed(run, number)
        print(f"{name}, {number} rows, {way}: {json.dumps(found[way], indent=1)}", flush=True)
    return found


def main() -> None:
    """Print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2000)
    parser.add_argument("--rows-125m", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    jax.monitoring.register_event_duration_secs_listener(compiles)
    numbers, found = {"demo": options.rows, "125M": options.rows_125m}, {}
    with tempfile.TemporaryDirectory() as place:
        jaxgen.MistralForCausalLM(SHAPE_125M, rngs=nnx.Rngs(0)).save_pretrained(place)
        for name, number in numbers.items():
            if number:
                directory = jaxgen.demo.path() if name == "demo" else Path(place)
                found[name] = {"rows": number, **measure(name, directory, number, options.batch_size)}
    if options.json:
        versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        machine = {"processor": platform.processor() or platform.machine(), **versions}
        told = {"machine": machine, "batch_size": options.batch_size, "models": found}
        options.json.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
