"""Beam search on this CPU: caches moved in place, a block at a time, against caches copied, and transformers.

    python benchmarks/beams.py [--json FILE] [--new-tokens 64] [--repeats 5]

Needs the extra `oracle`. Tokens per second of the best beams (new tokens of the result, not of all beams), float32,
4 beams, no end-of-sequence id; the median over the repeats, after a warm-up, all taking turns. `copied` is the same
search with `jnp.take` of the whole cache at every step.
"""

import argparse
import json
import os
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import torch
import transformers
from flax import nnx
from shapes import SHAPE_125M

import jaxgen
from jaxgen.generation.programs import stages
from jaxgen.generation.searches import beam

BEAMS = 4


def copied(cache: Any, parents: Any, first: Any, last: Any) -> Any:
    """What `beam.reordered` does, by a copy of everything."""
    return jax.tree.map(lambda x: jnp.take(x, parents, axis=0), cache)


def compare(path: Path, batch: int, prompt: int, new_tokens: int, repeats: int) -> dict[str, float | bool]:
    ours = jaxgen.AutoModelForCausalLM.from_pretrained(path, dtype="float32", device_map="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(3, ours.config.vocab_size, (batch, prompt))
    options = {"max_new_tokens": new_tokens, "eos_token_id": None, "do_sample": False, "num_beams": BEAMS}
    tensor, mask = torch.tensor(ids), torch.ones(ids.shape, dtype=torch.long)

    def run_ours() -> np.ndarray:
        return ours.generate(ids, **options)

    def run_theirs() -> np.ndarray:
        with torch.inference_mode():
            return theirs.generate(tensor, attention_mask=mask, **options).numpy()

    copying = stages.Stage(stages._run_decode, stages._describe_decode, **stages._DECODE)

    def run_copied() -> np.ndarray:
        with mock.patch.object(compiled, "_decode", copying), mock.patch.object(beam, "reordered", copied):
            return run_ours()

    runs = {"moved": run_ours, "copied": run_copied, "transformers": run_theirs}
    results = {name: run() for name, run in runs.items()}  # also the warm-up
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name, run in runs.items():
            time.sleep(0.3)  # the other one's worker threads spin on for a while after their last task
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    rates = {name: batch * new_tokens / statistics.median(spans) for name, spans in times.items()}
    return {
        **rates,
        "moved_to_copied": rates["moved"] / rates["copied"],
        "moved_to_transformers": rates["moved"] / rates["transformers"],
        "same_tokens": all(bool((result == results["moved"]).all()) for result in results.values()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    machine = {
        "cores": len(os.sched_getaffinity(0)),
        "versions": {m.__name__: m.__version__ for m in (jax, torch, transformers, jaxgen)},
    }
    print(json.dumps(machine), flush=True)
    print(
        f"{'model':6} {'batch':>5} {'prompt':>6} {'moved tok/s':>12} {'copied':>8} {'transformers':>13}  same",
        flush=True,
    )
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        large = Path(directory) / "125M"
        jaxgen.MistralForCausalLM(SHAPE_125M, rngs=nnx.Rngs(0)).save_pretrained(large)
        for name, path, batch, prompt in (
            ("demo", jaxgen.demo.path(), 1, 16),
            ("demo", jaxgen.demo.path(), 4, 128),
            ("125M", large, 1, 16),
            ("125M", large, 1, 1000),
        ):
            row = {"model": name, "batch": batch, "prompt": prompt}
            row |= compare(path, batch, prompt, options.new_tokens, options.repeats)
            rows.append(row)
            print(
                f"{name:6} {batch:5} {prompt:6} {row['moved']:12.1f} {row['copied']:8.1f} {row['transformers']:13.1f}  "
                f"{'yes' if row['same_tokens'] else 'NO'}",
                flush=True,
            )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
