"""Microseconds per decode step that each logits processor costs on this machine, by vocabulary and batch.

    python benchmarks/processors.py [--vocab 32000 131072] [--batch 1 8] [--repeats 15]
                                   [--only top_p typical_p] [--json FILE]

Each processor is compiled alone; the median over the repeats, after a warm-up. "nothing" is the cost of the call
itself. Rows hold 1024 tokens. "top_p by sorting" and "typical_p by sorting" are what the processors would cost if
they sorted the vocabulary; they are checked to leave the same tokens.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.processors.chain import chain_of
from jaxgen.generation.processors.watermark import WatermarkingConfig
from jaxgen.generation.prompts.rows import Rows

TOKENS = 1024
SAMPLE: dict[str, Any] = {"do_sample": True, "temperature": None, "top_k": 0, "eos_token_id": 2}
OPTIONS: dict[str, dict[str, Any]] = {
    "nothing": {},
    "temperature": {"temperature": 0.7},
    "top_k=50": {"top_k": 50},
    "top_k=500": {"top_k": 500},
    "top_k=5000": {"top_k": 5000},
    "top_p": {"top_p": 0.9},
    "typical_p": {"typical_p": 0.9},
    "min_p": {"min_p": 0.05},
    "top_h": {"top_h": 0.4},
    "epsilon_cutoff": {"epsilon_cutoff": 1e-4},
    "eta_cutoff": {"eta_cutoff": 1e-4},
    "repetition_penalty": {"repetition_penalty": 1.2},
    "no_repeat_ngram_size": {"no_repeat_ngram_size": 4},
    "sequence_bias": {"sequence_bias": {(i, i + 1, i + 2): 1.0 for i in range(100)}},
    "suppress_tokens": {"suppress_tokens": list(range(3, 103))},
    "min_new_tokens": {"min_new_tokens": 5},
    "forced_eos_token_id": {"forced_eos_token_id": 2},
    "exponential_decay": {"exponential_decay_length_penalty": (5, 1.01)},
    "watermark, lefthash": {"watermarking_config": WatermarkingConfig()},
    "watermark, selfhash": {"watermarking_config": WatermarkingConfig(seeding_scheme="selfhash", context_width=4)},
    "renormalize_logits": {"renormalize_logits": True},
    "usual sampling": {"temperature": 0.7, "top_k": 50, "top_p": 0.9},
}


def sorted_top_p(logits: jax.Array, rows: Rows) -> jax.Array:
    order = jnp.argsort(logits, axis=1, stable=True)
    sums = jnp.cumsum(jax.nn.softmax(jnp.take_along_axis(logits, order, axis=1), axis=1), axis=1)
    removed = (sums <= 1 - 0.9).at[:, -1].set(False)
    row = jnp.arange(len(logits))[:, None]
    return jnp.where(jnp.zeros(logits.shape, bool).at[row, order].set(removed), -jnp.inf, logits)


def sorted_typical_p(logits: jax.Array, rows: Rows) -> jax.Array:
    log_probs = jax.nn.log_softmax(logits, axis=1)
    distance = jnp.abs(-log_probs + (jnp.exp(log_probs) * log_probs).sum(axis=1, keepdims=True))
    order = jnp.argsort(distance, axis=1, stable=True)
    sums = jnp.cumsum(jnp.exp(jnp.take_along_axis(log_probs, order, axis=1)), axis=1)
    last = jnp.take_along_axis(order, (sums < 0.9).sum(axis=1, keepdims=True), axis=1)
    return jnp.where(distance > jnp.take_along_axis(distance, last, axis=1), -jnp.inf, logits)


@jax.jit
def run(chain: tuple[Any, ...], logits: jax.Array, rows: Rows) -> jax.Array:
    for entry in chain:
        logits = entry(logits, rows)
    return logits


def inputs(batch: int, vocab: int) -> tuple[jax.Array, Rows]:
    rng = np.random.default_rng(0)
    lengths = jnp.full(batch, TOKENS - 8, jnp.int32)
    rows = Rows(
        tokens=jnp.asarray(rng.integers(0, vocab, (batch, TOKENS)), jnp.int32),
        lengths=lengths,
        prompt_lengths=lengths - 16,
        max_lengths=lengths + 8,
        prompts=jnp.arange(batch, dtype=jnp.int32),
        running=jnp.ones(batch, bool),
    )
    return jnp.asarray(3 * rng.standard_normal((batch, vocab)), jnp.float32), rows


def microseconds(chain: tuple[Any, ...], logits: jax.Array, rows: Rows, repeats: int) -> tuple[float, np.ndarray]:
    result, times = np.asarray(run(chain, logits, rows)), []
    for _ in range(repeats):
        start = time.perf_counter()
        run(chain, logits, rows).block_until_ready()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times), result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 131072])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--only", nargs="+", choices=OPTIONS, default=[*OPTIONS])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()

    cases = [(vocab, batch) for vocab in arguments.vocab for batch in arguments.batch]
    print(f"{jax.devices()[0].device_kind}, JAX {jax.__version__}; microseconds per step")
    print(f"{'':22}" + "".join(f"{f'V={vocab} B={batch}':>16}" for vocab, batch in cases))
    table: dict[str, list[float]] = {}
    for vocab, batch in cases:
        data = inputs(batch, vocab)
        for name in arguments.only:
            chain = chain_of(GenerationConfig(**{**SAMPLE, **OPTIONS[name]}), vocab)
            spent, result = microseconds(chain, *data, arguments.repeats)
            table.setdefault(name, []).append(spent)
            if by_sorting := {"top_p": sorted_top_p, "typical_p": sorted_typical_p}.get(name):
                spent, expected = microseconds((Partial(by_sorting),), *data, max(3, arguments.repeats // 5))
                table.setdefault(f"{name} by sorting", []).append(spent)
                if (differ := int((np.isneginf(result) != np.isneginf(expected)).sum())) > 2 * batch:
                    raise SystemExit(f"{name}: {differ} tokens differ from sorting")
    for name, row in table.items():
        print(f"{name:22}" + "".join(f"{spent:16.0f}" for spent in row))
    if arguments.json:
        device = {"device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__}
        shapes = [{"vocab": vocab, "batch": batch} for vocab, batch in cases]
        found = {"machine": device, "cases": shapes, "microseconds": table}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
