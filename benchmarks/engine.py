"""A ragged load: the engine, static batches, transformers' `generate_batch`, and both libraries' servers, in one run.

    python benchmarks/engine.py [--tiny] [--json FILE] [--requests 128] [--rows 16]
    python benchmarks/engine.py --steps [--tiny] [--json FILE] [--rows 16]

Needs the extra `oracle`, and what transformers' server asks for: `pip install fastapi openai uvicorn accelerate`. All
read one checkpoint, random weights of the 125M shape, float32, on the CPU. Prompts of 8 to 96 tokens, and new tokens of
each request drawn from a geometric distribution of mean 48, at most 256, greedy, without an end token. Static batches
take the requests in order of arrival, and decode until the longest has ended; tokens per second count what was asked
for. transformers' `generate_batch` has one length for all requests: 48. The servers get texts, from twice as many
clients as the engine has rows, each with one request after the other. transformers' continuous batching would take most
of the machine's memory: it gets pages for all these clients at once, and 1024 tokens to a step. `same` is the share of
requests whose tokens are those of our static batches. What cannot be done on the machine has its error for figures.

`full` is a load where every row is busy to the end, against `generate` in the engine's own shape. `busy_rows` is the
share of rows in the engine's steps that got a token, `slots_used` that of the reserved slots which requests had filled
when they ended, and `slots_held` that of all slots which held a token, taken over all steps: the rest is what fixed
slots waste.

`--steps` measures instead what an engine's step costs, in milliseconds, where no request uses what the engine has: with
no processors, with all of them, with room for constraints, and with the best tokens kept, not asked for and asked for.
"""

import argparse
import functools
import json
import platform
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from flax import nnx
from servers import SPECIAL, completions, jaxgen_serve, random_checkpoint, running, transformers_serve
from shapes import SHAPE_125M

import jaxgen

TINY = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "sliding_window": None}
SLOTS, ONE_LENGTH = 384, 48
GREEDY = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
# What each server takes as greedy and without an end.
OURS = {"temperature": 0, "ignore_eos": True}
THEIRS = {"generation_config": json.dumps({"do_sample": False, "eos_token_id": -1})}
Requests = Sequence[tuple[list[int], int]]


def load(number: int, seed: int = 0) -> Requests:
    """Prompts, and how many tokens each is to get."""
    rng = np.random.default_rng(seed)
    news = np.minimum(rng.geometric(1 / 48, number), 256)
    return [(rng.integers(3, 97, rng.integers(8, 97)).tolist(), int(new)) for new in news]


def figures_of(seconds: float, given: Sequence[list[int]], known: Sequence[list[int]]) -> dict[str, float]:
    """Tokens per second, and the share of requests that got the tokens which are known, as far as these go."""
    same = [tokens[: len(row)] == row[: len(tokens)] for tokens, row in zip(given, known, strict=True)]
    return {"tokens_per_second": sum(map(len, given)) / seconds, "same": sum(same) / len(same)}


def through_engine(engine: jaxgen.Engine, requests: Requests, known: Sequence[list[int]]) -> dict[str, float]:
    before, start = engine.stats(), time.perf_counter()
    handles = [engine.submit(ids, max_new_tokens=new, eos_token_id=None) for ids, new in requests]
    done = [handle.result() for handle in handles]
    seconds, after = time.perf_counter() - start, engine.stats()
    given = [each.token_ids for each in done]
    assert [len(tokens) for tokens in given] == [new for _, new in requests]
    rows = after["row_steps"] - before.get("row_steps", 0)
    first = sorted(each.first_token_s or 0 for each in done)
    return figures_of(seconds, given, known) | {
        "busy_rows": (after["tokens"] - before.get("tokens", 0)) / rows,
        "first_token_s_p50": first[len(first) // 2],
        "slots_used": sum(len(ids) + new for ids, new in requests) / (len(requests) * engine.strict.tokens),
        "slots_held": sum(len(ids) + step for ids, new in requests for step in range(new))
        / (rows * engine.strict.tokens),
    }


def full_load(model: Any, engine: jaxgen.Engine, new: int) -> dict[str, float]:
    """Tokens per second where every row is busy to the end: what an engine costs beside `generate` in its own shape."""
    prompts = np.random.default_rng(1).integers(3, 97, (engine.strict.rows, 8))
    options: dict[str, Any] = {"max_new_tokens": new, "eos_token_id": None}
    rates = {"engine": 0.0, "strict generate": 0.0}
    for _ in range(3):
        start = time.perf_counter()
        for handle in [engine.submit(ids, **options) for ids in prompts]:
            handle.result()
        rates["engine"] = max(rates["engine"], prompts.shape[0] * new / (time.perf_counter() - start))
        start = time.perf_counter()
        model.generate(prompts, strict=engine.strict, **options)
        rates["strict generate"] = max(rates["strict generate"], prompts.shape[0] * new / (time.perf_counter() - start))
    return rates


ROOM = (1024, 384)
# What an engine has, and what its requests ask for.
STEPS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "no processors": ({"processors": (), "constraints": None}, {}),
    "all processors, unused": ({"constraints": None}, {}),
    "room for constraints, unused": ({"processors": (), "constraints": ROOM}, {}),
    "top_logprobs=20, not asked for": ({"processors": (), "constraints": None, "top_logprobs": 20}, {}),
    "top_logprobs=20, asked for": ({"processors": (), "constraints": None, "top_logprobs": 20}, {"top_logprobs": 20}),
}


def step_costs(model: Any, rows: int, new: int, repeats: int) -> dict[str, dict[str, float]]:
    """Milliseconds of a decode step in which every row is busy: the median, the least and the most of several runs.

    All engines are there at once and take turns, so that what else the machine does falls on all of them.
    """
    prompts = np.random.default_rng(1).integers(3, 97, (rows, 8))
    engines = {json.dumps(has): has for has, _ in STEPS.values()}
    made = {key: jaxgen.Engine(model, rows=rows, slots=SLOTS, **has) for key, has in engines.items()}
    taken: dict[str, list[float]] = {name: [] for name in STEPS}
    try:
        for engine in made.values():
            engine.wait_until_ready()
        for turn in range(repeats + 1):
            for name, (has, asked) in STEPS.items():
                engine = made[json.dumps(has)]
                before, start = engine.stats().get("steps", 0), time.perf_counter()
                handles = [engine.submit(ids, max_new_tokens=new, eos_token_id=None, **asked) for ids in prompts]
                for handle in handles:
                    handle.result()
                seconds = time.perf_counter() - start
                if turn:  # the first one warms up
                    taken[name].append(1000 * seconds / (engine.stats()["steps"] - before))
    finally:
        for engine in made.values():
            engine.close()
    return {
        name: {"median": float(np.median(each)), "least": min(each), "most": max(each)} for name, each in taken.items()
    }


def in_batches(generate: Callable[..., Any], requests: Requests, rows: int) -> tuple[float, list[list[int]]]:
    """The seconds and all new tokens of each request, where `generate(ids, mask, new)` decodes to the longest end."""
    start, given = time.perf_counter(), []
    for at in range(0, len(requests), rows):
        part = requests[at : at + rows]
        width = max(len(ids) for ids, _ in part)
        ids = np.array([[0] * (width - len(ids)) + ids for ids, _ in part])
        mask = np.array([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in part])
        given += np.asarray(generate(ids, mask, max(new for _, new in part)))[:, width:].tolist()
    return time.perf_counter() - start, given


def asked_for(given: Sequence[list[int]], requests: Requests) -> list[list[int]]:
    return [tokens[:new] for tokens, (_, new) in zip(given, requests, strict=True)]


def pages_for(rows: int) -> dict[str, int]:
    """What transformers' continuous batching may use: two pages of 256 tokens for each client, 1024 new to a step."""
    return {"num_blocks": 4 * rows, "max_batch_tokens": 1024}


def in_transformers(directory: Path, requests: Requests, rows: int, known: Sequence[list[int]]) -> dict[str, Any]:
    """Figures of static batches, and of `generate_batch`, where all requests get as many tokens."""
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    model.eval()

    def static(ids: Any, mask: Any, new: int) -> Any:
        given, real = torch.from_numpy(ids), torch.from_numpy(mask)
        with torch.no_grad():
            return model.generate(given, attention_mask=real, max_new_tokens=new, generation_config=GREEDY)

    def continuous() -> dict[str, float]:
        GREEDY.max_new_tokens = ONE_LENGTH
        start = time.perf_counter()
        room = transformers.ContinuousBatchingConfig(**pages_for(rows))
        outputs = model.generate_batch(
            [ids for ids, _ in requests], generation_config=GREEDY, continuous_batching_config=room
        )
        seconds = time.perf_counter() - start
        given = [outputs[f"req_{place}"].generated_tokens for place in range(len(requests))]
        return figures_of(seconds, given, known)

    seconds, given = in_batches(static, requests, rows)
    return {
        "transformers, static batches": figures_of(seconds, asked_for(given, requests), known),
        f"transformers, generate_batch of {ONE_LENGTH} tokens each": or_error(continuous),
    }


def served(
    command: list[str], ready: str, fields: dict[str, Any], requests: Requests, rows: int, known: Sequence[list[int]]
) -> dict[str, float]:
    """Figures of a server. It answers with texts, which do not show special tokens; how many there are it says."""
    with running(command, ready) as (url, _):
        bodies = [
            {"prompt": " ".join(f"w{token}" for token in ids), "max_tokens": new, **fields} for ids, new in requests
        ]
        completions(url, [bodies[0] | {"max_tokens": 2}], 1)  # what it does once
        start = time.perf_counter()
        answers = completions(url, bodies, 2 * rows)
        seconds = time.perf_counter() - start
    counts = [answer["usage"]["completion_tokens"] for answer in answers]
    texts = [[int(word.removeprefix("w")) for word in answer["choices"][0]["text"].split()] for answer in answers]
    shown = [
        [token for token in row[:count] if token >= len(SPECIAL)] for row, count in zip(known, counts, strict=True)
    ]
    same = [text == row for text, row in zip(texts, shown, strict=True)]
    return {"tokens_per_second": sum(counts) / seconds, "same": sum(same) / len(same)}


def or_error(work: Callable[[], dict[str, float]]) -> dict[str, float] | str:
    """The figures, or what stands against them on this machine."""
    try:
        return work()
    except Exception as error:
        return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[-1]}"


def ragged(directory: Path, requests: Requests, rows: int) -> dict[str, Any]:
    """All figures of a checkpoint."""
    model = jaxgen.AutoModelForCausalLM.from_pretrained(directory, dtype="float32")

    def static(ids: Any, mask: Any, new: int, **options: Any) -> Any:
        return model.generate(ids, mask, max_new_tokens=new, eos_token_id=None, **options)

    in_batches(lambda *given: static(*given, max_time=1e-3), requests, rows)  # compiles
    seconds, known = in_batches(static, requests, rows)
    with jaxgen.Engine(model, rows=rows, slots=SLOTS) as engine:
        engine.wait_until_ready()
        figures: dict[str, Any] = {"engine": through_engine(engine, requests, known)}
        full = full_load(model, engine, 64)
    figures["static batches"] = {"tokens_per_second": sum(new for _, new in requests) / seconds}
    figures |= in_transformers(directory, requests, rows, known)
    sizes = {"rows": rows, "slots": SLOTS, "queue": len(requests)}
    servers = {
        "jaxgen serve": (jaxgen_serve(directory, **sizes), "/ready", OURS),
        "transformers serve": (transformers_serve(directory, **pages_for(rows)), "/health", THEIRS),
    }
    for name, said in servers.items():
        figures[name] = or_error(functools.partial(served, *said, requests, rows, known))
    return {"requests": len(requests), "rows": rows, "slots": SLOTS, "figures": figures, "full": full}


def main() -> None:
    """Print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--requests", type=int, help="128, or 16 with --tiny")
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each part of --steps")
    options = parser.parse_args()
    shape = jaxgen.MistralConfig(**TINY) if options.tiny else SHAPE_125M
    if options.steps:
        ours = jaxgen.MistralForCausalLM(shape, rngs=nnx.Rngs(0))
        new = 16 if options.tiny else 128
        tell({"step_ms": step_costs(ours, options.rows, new, options.repeats)}, options.json)
        return
    with tempfile.TemporaryDirectory() as directory:
        place = random_checkpoint(Path(directory), shape)
        requests = load(options.requests or (16 if options.tiny else 128))
        tell(ragged(place, requests, options.rows), options.json)


def tell(found: dict[str, Any], file: Path | None) -> None:
    """Print what was found, and keep it with what it was found on."""
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"processor": platform.processor() or platform.machine(), **versions}
    print(json.dumps(found, indent=1))
    if file:
        file.write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
