"""Speculative decoding on this machine: how many drafts are accepted, and the speed-up over plain decoding.

    python benchmarks/speculate.py [--json FILE] [--repeats 2] [--drafts 4] [--new-tokens 32]

Greedy, float32, batches of 1 and 8; plain and speculative runs take turns, and the ratio is that of the medians.

- demo: text that counts, which repeats itself, so that prompt lookup and the demo without its last layer guess well.
- 125M: a model of random weights. What a random assistant drafts is rejected, always: `rejected` is what a round
  costs when it gains nothing, and says nothing about real assistants. With the model as its own assistant every
  draft is accepted: `accepted` is what that leaves of the gain when drafting costs as much as reading.
  `break even` is the number of accepted drafts per round from which speculation with the small assistant pays.
"""

import argparse
import dataclasses
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from shapes import SHAPE_125M

import jaxgen
from jaxgen.generation.execute import advance, prefill, program_for
from jaxgen.generation.options.config import resolve
from jaxgen.generation.options.table import Extras
from jaxgen.generation.prepare import prepare

SHAPE_SMALL = dataclasses.replace(
    SHAPE_125M, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4
)


def decoded(model: Any, ids: np.ndarray, mask: np.ndarray | None, options: dict[str, Any]) -> tuple[Any, float]:
    """The final state of a call, and the seconds that its decode loop took."""
    extras, fields = Extras.take(options)
    config = resolve(fields, None, model.generation_config)
    request = prepare(model, ids, mask, config, extras=extras)
    program = program_for(model, request)
    state = jax.block_until_ready(prefill(program, request))
    start = time.perf_counter()
    state = advance(program, request, state)
    jax.block_until_ready(state)
    return state, time.perf_counter() - start


def compare(
    model: Any, ids: np.ndarray, mask: np.ndarray | None, plain: dict, speculation: dict, repeats: int
) -> dict[str, Any]:
    expected, _ = decoded(model, ids, mask, plain)  # also the warm-up
    state, _ = decoded(model, ids, mask, plain | speculation)
    seconds: dict[str, list[float]] = {"plain": [], "speculative": []}
    for _ in range(repeats):
        for name, options in (("plain", plain), ("speculative", plain | speculation)):
            seconds[name].append(decoded(model, ids, mask, options)[1])
    rows = len(ids)
    drafted, accepted, rounds = (int(np.asarray(x)[:rows].sum()) for x in (state.drafted, state.accepted, state.rounds))
    longest, steps = int(state.rounds[:rows].max()), int((expected.lengths - expected.prompt_lengths)[:rows].max()) - 1
    took = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "drafted": drafted,
        "accepted": accepted,
        "acceptance": accepted / max(drafted, 1),
        "tokens_per_round": 1 + accepted / max(rounds, 1),
        "speed_up": took["plain"] / took["speculative"],
        "ms_per_step": 1e3 * took["plain"] / steps,
        "ms_per_round": 1e3 * took["speculative"] / longest,
        "same_tokens": bool((np.asarray(state.tokens)[:rows] == np.asarray(expected.tokens)[:rows]).all()),
    }


def demo_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    from jaxgen.text.tokenizer import load_tokenizer

    model, tokenizer = load("demo"), load_tokenizer(jaxgen.demo.path())
    short = load("demo")
    short.model.layers = short.model.layers[:-1]
    short.config = dataclasses.replace(short.config, num_hidden_layers=len(short.model.layers))
    drafters = {
        "prompt lookup": {"prompt_lookup_num_tokens": options.drafts},
        "one layer less": {"assistant_model": short, "num_assistant_tokens": options.drafts},
    }
    rows = []
    for batch in (1, 8):
        texts = [f"{', '.join(str(n) for n in range(start, start + 8))}," for start in range(1, batch + 1)]
        inputs = tokenizer(texts, padding=True, return_tensors="np")
        plain = {"max_new_tokens": options.new_tokens, "eos_token_id": None}
        for name, speculation in drafters.items():
            result = compare(model, inputs["input_ids"], inputs["attention_mask"], plain, speculation, options.repeats)
            rows.append({"model": "demo", "drafter": name, "batch": batch, **result})
    return rows


def load(name: str) -> Any:
    if name == "demo":
        return jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), dtype="float32")
    return jaxgen.MistralForCausalLM(SHAPE_125M if name == "125M" else SHAPE_SMALL, rngs=nnx.Rngs(0))


def random_rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    model, small = load("125M"), load("small")
    rows = []
    for batch in (1, 8):
        ids = np.random.default_rng(0).integers(3, SHAPE_125M.vocab_size, (batch, 16))
        plain = {"max_new_tokens": options.new_tokens, "eos_token_id": None}
        for name, assistant in (("small: rejected", small), ("itself: accepted", model)):
            speculation = {
                "assistant_model": assistant,
                "num_assistant_tokens": options.drafts,
                "assistant_confidence_threshold": 0.0,
            }
            result = compare(model, ids, None, plain, speculation, options.repeats)
            if assistant is small:
                result["break_even"] = result["ms_per_round"] / result["ms_per_step"] - 1
            rows.append({"model": "125M", "drafter": name, "batch": batch, **result})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--drafts", type=int, default=4)
    parser.add_argument("--new-tokens", type=int, default=32)
    options = parser.parse_args()
    device = jax.devices()[0]
    machine = {"device": device.device_kind, "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__}
    print(json.dumps(machine), flush=True)
    print(
        f"{'model':5} {'drafter':17} {'batch':>5} {'accepted':>9} {'tokens/round':>12} {'ms/step':>8} {'ms/round':>9} "
        f"{'speed-up':>8}  same  break even",
        flush=True,
    )
    rows = []
    for part in (demo_rows, random_rows):
        for row in part(options):
            rows.append(row)
            print(
                f"{row['model']:5} {row['drafter']:17} {row['batch']:5} {row['acceptance']:9.0%} "
                f"{row['tokens_per_round']:12.2f} {row['ms_per_step']:8.2f} {row['ms_per_round']:9.2f} "
                f"{row['speed_up']:8.2f}  {'yes' if row['same_tokens'] else 'NO':4}  "
                + (f"{row['break_even']:.1f}" if "break_even" in row else ""),
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
