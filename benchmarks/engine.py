"""A ragged load: the engine, static batches of `generate`, and transformers' `generate_batch`, in one run.

    python benchmarks/engine.py [--tiny] [--json FILE] [--requests 160] [--rows 16]
    python benchmarks/engine.py --steps [--tiny] [--json FILE] [--rows 16]

Needs the extra `oracle`. One model with random weights of the 125M shape, float32, on the CPU. Prompts of 8 to 96
tokens, and new tokens of each request drawn from a geometric distribution of mean 48, at most 256, without an end
token. Static batches take the requests in order of arrival, and decode until the longest has ended; tokens per second
count what was asked for. transformers' `generate_batch` has one length for all requests: 48. `full` is a load where
every row is busy to the end, against `generate` in the engine's own shape. `busy_rows` is the share of rows in the
engine's steps that got a token, `slots_used` that of the reserved slots which requests filled.

`--steps` measures instead what an engine's step costs, in milliseconds, where no request uses what the engine has: with
no processors, with all of them, with room for constraints, and with the best tokens kept, not asked for and asked for.
"""

import argparse
import json
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from flax import nnx
from shapes import SHAPE_125M

import jaxgen

TINY = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}


def load(number: int, seed: int = 0) -> list[tuple[list[int], int]]:
    """Prompts, and how many tokens each is to get."""
    rng = np.random.default_rng(seed)
    news = np.minimum(rng.geometric(1 / 48, number), 256)
    return [(rng.integers(3, 97, rng.integers(8, 97)).tolist(), int(new)) for new in news]


def through_engine(engine: jaxgen.Engine, requests: list[tuple[list[int], int]]) -> dict[str, Any]:
    before, start = engine.stats(), time.perf_counter()
    handles = [engine.submit(ids, max_new_tokens=new, eos_token_id=None) for ids, new in requests]
    done = [handle.result() for handle in handles]
    seconds, after = time.perf_counter() - start, engine.stats()
    assert [len(each.token_ids) for each in done] == [new for _, new in requests]
    rows = after["row_steps"] - before.get("row_steps", 0)
    first = sorted(each.first_token_s or 0 for each in done)
    return {
        "tokens_per_second": sum(new for _, new in requests) / seconds,
        "busy_rows": (after["tokens"] - before.get("tokens", 0)) / rows,
        "first_token_s_p50": first[len(first) // 2],
        "slots_used": sum(len(ids) + new for ids, new in requests) / (len(requests) * engine.strict.tokens),
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
    made = {key: jaxgen.Engine(model, rows=rows, slots=384, **has) for key, has in engines.items()}
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


def in_batches(generate: Any, requests: list[tuple[list[int], int]], rows: int) -> float:
    """Tokens per second, of those asked for, where `generate(ids, mask, new)` decodes until the longest has ended."""
    start = time.perf_counter()
    for at in range(0, len(requests), rows):
        part = requests[at : at + rows]
        width = max(len(ids) for ids, _ in part)
        ids = np.array([[0] * (width - len(ids)) + ids for ids, _ in part])
        mask = np.array([[0] * (width - len(ids)) + [1] * len(ids) for ids, _ in part])
        generate(ids, mask, max(new for _, new in part))
    return sum(new for _, new in requests) / (time.perf_counter() - start)


def continuous_in_transformers(model: Any, requests: list[tuple[list[int], int]]) -> float | str:
    """Tokens per second of `generate_batch`, where all requests get as many tokens."""
    config = transformers.GenerationConfig(do_sample=False, eos_token_id=-1, pad_token_id=0)
    try:
        config.max_new_tokens = 48
        start = time.perf_counter()
        outputs = model.generate_batch([ids for ids, _ in requests], generation_config=config)
        return sum(len(output.generated_tokens) for output in outputs.values()) / (time.perf_counter() - start)
    except Exception as error:  # what it needs of the machine
        return f"{type(error).__name__}: {error}"


def main() -> None:
    """Print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--requests", type=int, default=160)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--steps", action="store_true")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each part of --steps")
    options = parser.parse_args()
    shape = jaxgen.MistralConfig(**TINY) if options.tiny else SHAPE_125M
    ours = jaxgen.MistralForCausalLM(shape, rngs=nnx.Rngs(0))
    if options.steps:
        new = 16 if options.tiny else 128
        tell({"step_ms": step_costs(ours, options.rows, new, options.repeats)}, options.json)
        return
    requests = load(options.requests)
    figures: dict[str, Any] = {}
    with jaxgen.Engine(ours, rows=options.rows, slots=384) as engine:
        engine.wait_until_ready()
        figures["engine"] = through_engine(engine, requests)
        full = full_load(ours, engine, 64)

    def here(ids: Any, mask: Any, new: int) -> None:
        ours.generate(ids, mask, max_new_tokens=new, eos_token_id=None)

    in_batches(here, requests, options.rows)  # compiles
    figures["static batches"] = in_batches(here, requests, options.rows)
    fields = {k: v for k, v in shape.to_hf().items() if k not in ("model_type", "architectures")}
    theirs: Any = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model("mistral", **fields))
    theirs.eval()

    def there(ids: Any, mask: Any, new: int) -> None:
        given, real = torch.from_numpy(ids), torch.from_numpy(mask)
        with torch.no_grad():
            theirs.generate(given, attention_mask=real, max_new_tokens=new, do_sample=False, eos_token_id=None)

    figures["transformers, static batches"] = in_batches(there, requests, options.rows)
    figures["transformers, generate_batch of 48 tokens each"] = continuous_in_transformers(theirs, requests)
    tell({"figures": figures, "full": full}, options.json)


def tell(found: dict[str, Any], file: Path | None) -> None:
    """Print what was found, and keep it with what it was found on."""
    versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    machine = {"processor": platform.processor() or platform.machine(), **versions}
    print(json.dumps(found, indent=1))
    if file:
        file.write_text(json.dumps({"machine": machine, **found}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
