"""Sampler against scorer: how much their log-probabilities differ, and what rollouts take, on this CPU.

    python benchmarks/rollouts.py --json benchmarks/results/rollouts.json

The demo model draws 8 samples of 48 tokens for each of 8 prompts, at temperature 1.5 without filters, with one seed
after another. Then the same tokens are scored under the same temperature. *fast* is `generate` and `score_tokens` as
they are, *exact* both with `strict=jaxgen.Strict(rows=64, tokens=64)`, the prompts in another order in scoring, and
*engine* is `jaxgen.Engine(rows=64, slots=64).generate_batch`, scored with that engine's `strict`.
transformers on torch is measured the same way: its `generate` with `output_scores=True`, and a forward pass over the
finished rows. Differences are in nats; a ratio is exp(scored - drawn). Tokens per second are those of the fastest call.
On a machine that does other things too, hold all of it to one core: `taskset -c 0 python benchmarks/rollouts.py ...`.
Needs the extra `oracle`, for transformers.
"""

import argparse
import datetime
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
import torch
import transformers
from reproducibility import processor, prompts_of

import jaxgen
from jaxgen.text.tokenizer import left_pad

PROMPTS, SAMPLES, NEW = 8, 8, 48
OPTIONS: dict[str, Any] = {
    "do_sample": True, "temperature": 1.5, "top_k": 0, "max_new_tokens": NEW, "num_return_sequences": SAMPLES,
}  # fmt: skip
WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "int4": {"dtype": "float32", "load_in_4bit": True},
}
Pair = tuple[np.ndarray, np.ndarray, float, float]  # drawn, scored; seconds of each


def left_padded() -> tuple[np.ndarray, np.ndarray]:
    prompts, _ = prompts_of(PROMPTS)
    width = max(map(len, prompts))
    ids = np.array([[0] * (width - len(prompt)) + prompt for prompt in prompts], np.int32)
    return ids, np.array([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], np.int32)


def ours(weights: str, exact: bool) -> Iterator[Pair]:
    """One seed after the other."""
    model = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), device_map="cpu", **WEIGHTS[weights])
    ids, mask = left_padded()
    options = {**OPTIONS, "eos_token_id": None, "strict": jaxgen.Strict(rows=64, tokens=64) if exact else None}
    for seed in range(1 << 30):
        start = time.perf_counter()
        out = model.generate(ids, mask, seed=seed, return_dict_in_generate=True, **options)
        middle = time.perf_counter()
        order = np.random.default_rng(seed).permutation(PROMPTS)
        rows = (order[:, None] * SAMPLES + np.arange(SAMPLES)).ravel()
        given = out.sequences[rows], out.prompt_lengths[rows], out.attention_mask[rows]
        scores = jaxgen.score_tokens(model, *given, batch_size=PROMPTS * SAMPLES, **options)
        yield out.logprobs[rows], scores.logprobs, middle - start, time.perf_counter() - middle


def in_engine(weights: str) -> Iterator[Pair]:
    """The same by one engine, whose rows wait for nobody; here all are equally long."""
    model = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), device_map="cpu", **WEIGHTS[weights])
    prompts, _ = prompts_of(PROMPTS)
    options, count = {**OPTIONS, "eos_token_id": None}, PROMPTS * SAMPLES
    with jaxgen.Engine(model, rows=count, slots=64, queue=count) as engine:
        alone = {**options, "num_return_sequences": 1, "strict": engine.strict}
        for seed in range(1 << 30):
            start = time.perf_counter()
            outputs = [*engine.generate_batch(prompts, seed=seed, **options).values()]
            middle = time.perf_counter()
            outputs = [outputs[row] for row in np.random.default_rng(seed).permutation(count)]
            rows = [output.prompt_ids + output.generated_tokens for output in outputs]
            starts = [len(output.prompt_ids) for output in outputs]
            ids, mask = left_pad(rows, 0), left_pad([[1] * len(row) for row in rows], 0)
            scores = jaxgen.score_tokens(model, ids, starts, mask, **alone)
            drawn = np.array([output.logprobs for output in outputs], np.float32)
            yield drawn, scores.logprobs, middle - start, time.perf_counter() - middle


def theirs(weights: str) -> Iterator[Pair]:
    """transformers on torch, as it asks to be called."""
    dtype = getattr(torch, weights)
    model = transformers.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), dtype=dtype).eval()
    ids, mask = (torch.tensor(table) for table in left_padded())
    whole = torch.cat([mask.repeat_interleave(SAMPLES, 0), torch.ones(PROMPTS * SAMPLES, NEW, dtype=mask.dtype)], 1)
    for seed in range(1 << 30):
        transformers.set_seed(seed)
        start = time.perf_counter()
        with torch.inference_mode():
            out = model.generate(
                ids, attention_mask=mask, eos_token_id=None, pad_token_id=0, output_scores=True,
                return_dict_in_generate=True, **OPTIONS,
            )  # fmt: skip
            middle = time.perf_counter()
            new = out.sequences[:, -NEW:, None]
            positions = (whole.cumsum(-1) - 1).clamp(min=0)
            logits = model(input_ids=out.sequences, attention_mask=whole, position_ids=positions).logits
            logits = logits[:, -NEW - 1 : -1].float() / OPTIONS["temperature"]
            scored = logits.log_softmax(-1).gather(2, new)[..., 0].numpy()
            end = time.perf_counter()
            drawn = torch.stack(out.scores, 1).float().log_softmax(-1).gather(2, new)[..., 0].numpy()
        yield drawn, scored, middle - start, end - middle


def measure(pairs: Iterator[Pair], tokens: int) -> dict[str, Any]:
    """Differences over so many tokens, and the fastest calls."""
    next(pairs)  # compiles
    differences, different, times, count = [], 0, [], 0
    while count < tokens:
        drawn, scored, *seconds = next(pairs)
        different += int((drawn.view(np.uint32) != scored.view(np.uint32)).sum())
        differences.append((scored - drawn).ravel())
        times.append(seconds)
        count += drawn.size
    difference = np.concatenate(differences).astype(np.float64)
    ratios = np.exp(difference)
    generate, score = np.array(times).min(axis=0)
    return {
        "tokens": count,
        "different": different,
        "largest": float(np.abs(difference).max()),
        "sd": float(difference.std()),
        "outside": float(((ratios < 0.9) | (ratios > 1.1)).mean()),
        "generate_tokens_per_second": PROMPTS * SAMPLES * NEW / generate,
        "score_tokens_per_second": PROMPTS * SAMPLES * NEW / score,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000, help="in exact mode; a fifth of it in the others")
    options = parser.parse_args()
    sys.path.remove(str(Path(__file__).parent))  # transformers looks for a package of the name `kernels`
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    jobs: list[tuple[str, str, str, Callable[[], Iterator[Pair]]]] = []
    for weights in WEIGHTS:
        jobs.append(("jaxgen", weights, "exact", lambda weights=weights: ours(weights, exact=True)))
        jobs.append(("jaxgen", weights, "fast", lambda weights=weights: ours(weights, exact=False)))
        jobs.append(("jaxgen", weights, "engine", lambda weights=weights: in_engine(weights)))
        if weights != "int4":  # transformers has other four bits
            jobs.append(("transformers", weights, "", lambda weights=weights: theirs(weights)))
    rows = []
    for engine, weights, mode, run in jobs:
        row = {
            "engine": engine,
            "weights": weights,
            "mode": mode,
            **measure(run(), options.tokens // (1 if mode == "exact" else 5)),
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    if options.json:
        report = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": {"cpu": processor(), "cores": len(os.sched_getaffinity(0))},
            "versions": {m.__name__: m.__version__ for m in (jax, flax, torch, transformers)},
            "rows": rows,
        }
        options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
