"""Sampler against scorer: how much their log-probabilities differ, and what rollouts take, on this CPU.

    python benchmarks/rollouts.py --json benchmarks/results/rollouts.json

The demo model draws 8 samples of 48 tokens for each of 8 prompts, at temperature 1.5 without filters, with one seed
after another. Then the same tokens are scored under the same temperature. *fast* is `generate` and `score_tokens` as
they are, *exact* both with `strict=jaxgen.Strict(rows=64, tokens=64)`, the prompts in another order in scoring, and
*engine* is `jaxgen.Engine(rows=64, slots=64).generate_batch`, scored with that engine's `strict`.
In *ragged* modes the same 64 rows end after 1 to 160 tokens, as a geometric distribution of mean 40 has it, the same
lengths for every seed; 16 rows run at a time. *ragged engine* submits each row with its own `max_new_tokens`; *ragged
batch* calls `generate` for two prompts after another, until the longest of their 16 rows has ended. Only the tokens
that were asked for count.
transformers on torch is measured the same way: its `generate` with `output_scores=True`, and a forward pass over the
finished rows. Differences are in nats; a ratio is exp(scored - drawn). Tokens per second are those of the fastest of 5
calls, in which the modes take turns, so that what else the machine does falls on all; then *exact* goes on, untimed.
`--tiny` tries it all, in float32. On a machine that does other things too, hold all of it to one core: `taskset -c 0
python benchmarks/rollouts.py ...`.
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
ROWS, LONGEST, MEAN = 16, 160, 40  # of the ragged modes
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
            texts = [(output.prompt_ids, output.generated_tokens) for output in outputs]
            scored = scores_of(model, texts, **alone)
            drawn = np.concatenate([np.float32(output.logprobs) for output in outputs])
            yield drawn, scored, middle - start, time.perf_counter() - middle


def scores_of(model: Any, texts: list[tuple[list[int], list[int]]], **options: Any) -> np.ndarray:
    """What scoring says of the new tokens of prompts and what followed each, one text behind the other."""
    rows = [prompt + new for prompt, new in texts]
    ids, mask = left_pad(rows, 0), left_pad([[1] * len(row) for row in rows], 0)
    scores = jaxgen.score_tokens(model, ids, [len(prompt) for prompt, _ in texts], mask, **options)
    return np.concatenate([found[: len(new)] for found, (_, new) in zip(scores.logprobs, texts, strict=True)])


def ragged_lengths() -> np.ndarray:
    """How many tokens each sample of each prompt gets."""
    return np.random.default_rng(0).geometric(1 / MEAN, (PROMPTS, SAMPLES)).clip(max=LONGEST)


def ragged_engine(weights: str) -> Iterator[Pair]:
    """Rows of many lengths: an engine gives the place of one that has ended to the next."""
    model = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), device_map="cpu", **WEIGHTS[weights])
    prompts, _ = prompts_of(PROMPTS)
    options = {**OPTIONS, "eos_token_id": None, "num_return_sequences": 1}
    longest = max(map(len, prompts)) + LONGEST
    with jaxgen.Engine(model, rows=ROWS, slots=longest, queue=PROMPTS * SAMPLES) as engine:
        for seed in range(1 << 30):
            start = time.perf_counter()
            handles = [
                engine.submit(
                    prompts[row], seed=seed, row_id=row, sample=sample, **{**options, "max_new_tokens": int(count)}
                )
                for (row, sample), count in np.ndenumerate(ragged_lengths())
            ]
            done = [handle.result() for handle in handles]
            middle = time.perf_counter()
            texts = [(each.prompt_ids.tolist(), each.token_ids) for each in done]
            scored = scores_of(model, texts, strict=engine.strict, **{**options, "max_new_tokens": LONGEST})
            drawn = np.concatenate([each.tokens.logprobs for each in done])
            yield drawn, scored, middle - start, time.perf_counter() - middle


def ragged_batch(weights: str) -> Iterator[Pair]:
    """The same rows by `generate`, as many at a time: each batch runs until its longest has ended."""
    model = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), device_map="cpu", **WEIGHTS[weights])
    prompts, _ = prompts_of(PROMPTS)
    ids, mask = left_padded()
    at_a_time, counts = ROWS // SAMPLES, ragged_lengths()
    options = {**OPTIONS, "eos_token_id": None, "return_dict_in_generate": True}
    for seed in range(1 << 30):
        texts, drawn = [], []
        start = time.perf_counter()
        for first in range(0, PROMPTS, at_a_time):
            part = np.arange(first, min(first + at_a_time, PROMPTS))
            given = {**options, "max_new_tokens": int(counts[part].max()), "row_ids": part.tolist()}
            out = model.generate(ids[part], mask[part], seed=seed, **given)
            new = out.sequences[:, ids.shape[1] :]
            for row, count in enumerate(counts[part].ravel().tolist()):
                texts.append((prompts[first + row // SAMPLES], new[row, :count].tolist()))
                drawn.append(out.logprobs[row, :count])
        middle = time.perf_counter()
        scored = scores_of(model, texts, batch_size=ROWS, **{**OPTIONS, "num_return_sequences": 1})
        yield np.concatenate(drawn), scored, middle - start, time.perf_counter() - middle


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


class Differences:
    """What one way of sampling and scoring says of the same tokens, and how long its calls take."""

    def __init__(self, pairs: Iterator[Pair]):
        next(pairs)  # compiles
        self._pairs, self._differences, self._times, self._different = pairs, list[np.ndarray](), list[list[float]](), 0
        self.tokens = 0

    def call(self) -> None:
        """Draw and score once more."""
        drawn, scored, *took = next(self._pairs)
        self._different += int((drawn.view(np.uint32) != scored.view(np.uint32)).sum())
        self._differences.append((scored - drawn).ravel())
        self._times.append(took)
        self.tokens += drawn.size

    def told(self, turns: int) -> dict[str, Any]:
        """All differences, and the rates of the fastest of the first calls, which took turns with the others'."""
        difference = np.concatenate(self._differences).astype(np.float64)
        ratios = np.exp(difference)
        generate, score = np.array(self._times[:turns]).min(axis=0)
        return {
            "tokens": self.tokens,
            "different": self._different,
            "largest": float(np.abs(difference).max()),
            "sd": float(difference.std()),
            "outside": float(((ratios < 0.9) | (ratios > 1.1)).mean()),
            "generate_tokens_per_second": self._differences[0].size / generate,
            "score_tokens_per_second": self._differences[0].size / score,
        }


def ways(weights: str) -> dict[tuple[str, str], Callable[[], Iterator[Pair]]]:
    """All there are with such weights, by engine and mode."""
    found: dict[tuple[str, str], Callable[[], Iterator[Pair]]] = {
        ("jaxgen", "exact"): lambda: ours(weights, exact=True),
        ("jaxgen", "fast"): lambda: ours(weights, exact=False),
        ("jaxgen", "engine"): lambda: in_engine(weights),
        ("jaxgen", "ragged engine"): lambda: ragged_engine(weights),
        ("jaxgen", "ragged batch"): lambda: ragged_batch(weights),
    }
    theirs_too = {("transformers", ""): lambda: theirs(weights)}  # which has other four bits
    return found if weights == "int4" else found | theirs_too


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--tokens", type=int, default=100_000, help="at least, in exact mode")
    parser.add_argument("--turns", type=int, default=5, help="timed calls of each mode")
    parser.add_argument("--tiny", action="store_true", help="try it: float32, few tokens")
    options = parser.parse_args()
    kinds, tokens = (["float32"], 1) if options.tiny else ([*WEIGHTS], options.tokens)
    sys.path.remove(str(Path(__file__).parent))  # transformers looks for a package of the name `kernels`
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    rows = []
    for weights in kinds:
        each = {names: Differences(way()) for names, way in ways(weights).items()}
        for _ in range(options.turns):
            for way in each.values():
                way.call()
        while each["jaxgen", "exact"].tokens < tokens:
            each["jaxgen", "exact"].call()
        for (engine, mode), way in each.items():
            rows.append({"engine": engine, "weights": weights, "mode": mode, **way.told(options.turns)})
            print(json.dumps(rows[-1]), flush=True)
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
