"""Tokens per second on this CPU: jaxgen against transformers on torch, same weights, same prompts, one run.

    python benchmarks/decode_cpu.py [--json FILE] [--new-tokens 64] [--repeats 5]

Needs the extra `oracle`. Greedy, float32, prompts of 16 tokens; the median over the repeats, after a warm-up,
jaxgen and transformers taking turns. Also how much of this machine's memory bandwidth decoding at batch 1 uses:
the bytes of all weights that a token needs, per second, against a plain read of a large array on all cores.
"""

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import flax
import jax
import numpy as np
import torch
import transformers
from flax import nnx
from shapes import SHAPE_125M

import jaxgen

PROMPT = 16


def checkpoints(directory: Path) -> dict[str, Path]:
    jaxgen.MistralForCausalLM(SHAPE_125M, rngs=nnx.Rngs(0)).save_pretrained(directory / "125M")
    return {"demo": jaxgen.demo.path(), "125M": directory / "125M"}


def compare(path: Path, batch: int, new_tokens: int, repeats: int) -> dict[str, float | bool]:
    ours = jaxgen.AutoModelForCausalLM.from_pretrained(path, dtype="float32", device_map="cpu")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    ids = np.random.default_rng(0).integers(3, ours.config.vocab_size, (batch, PROMPT))
    options = {"max_new_tokens": new_tokens, "eos_token_id": None, "do_sample": False}
    tensor, mask = torch.tensor(ids), torch.ones(ids.shape, dtype=torch.long)

    def run_ours() -> np.ndarray:
        return ours.generate(ids, **options)

    def run_theirs() -> np.ndarray:
        with torch.inference_mode():
            return theirs.generate(tensor, attention_mask=mask, **options).numpy()

    same = bool((run_ours() == run_theirs()).all())  # also the warm-up
    rates: dict[str, list[float]] = {"jaxgen": [], "transformers": []}
    for _ in range(repeats):
        for name, run in (("jaxgen", run_ours), ("transformers", run_theirs)):
            time.sleep(0.3)  # the other one's worker threads spin on for a while after their last task
            start = time.perf_counter()
            run()
            rates[name].append(batch * new_tokens / (time.perf_counter() - start))
    medians = {name: statistics.median(values) for name, values in rates.items()}
    weights = sum(x.nbytes for x in jax.tree.leaves(nnx.state(ours)))
    if not ours.config.tie_word_embeddings:
        weights -= ours.model.embed_tokens.weight.nbytes  # a token reads one row of it
    return {
        **medians,
        "ratio": medians["jaxgen"] / medians["transformers"],
        "same_tokens": same,
        "weight_bytes_per_second": medians["jaxgen"] / batch * weights,
    }


def read_bandwidth() -> float:
    """Bytes per second that all cores together read from memory, far beyond the caches."""
    cores = len(os.sched_getaffinity(0))
    parts = np.array_split(np.ones(1 << 27, np.float64), cores)  # 1 GiB

    def once() -> float:
        start = time.perf_counter()
        with ThreadPoolExecutor(cores) as pool:
            list(pool.map(np.sum, parts))
        return (1 << 30) / (time.perf_counter() - start)

    return max(once() for _ in range(5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args()
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    bandwidth = read_bandwidth()
    machine = {
        "cpu": platform.processor() or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "read_gb_per_second": round(bandwidth / 1e9, 1),
        "versions": {m.__name__: m.__version__ for m in (jax, flax, torch, transformers, jaxgen)},
    }
    print(json.dumps(machine), flush=True)
    print(
        f"{'model':6} {'batch':>5} {'jaxgen tok/s':>13} {'transformers':>13} {'ratio':>6}  same  bandwidth", flush=True
    )
    rows = []
    with tempfile.TemporaryDirectory() as directory:
        for name, path in checkpoints(Path(directory)).items():
            for batch in (1, 8, 32):
                row = {"model": name, "batch": batch, **compare(path, batch, options.new_tokens, options.repeats)}
                rows.append(row)
                share = f"{row['weight_bytes_per_second'] / bandwidth:.0%}" if batch == 1 else ""
                print(
                    f"{name:6} {batch:5} {row['jaxgen']:13.0f} {row['transformers']:13.0f} {row['ratio']:6.1f}  "
                    f"{'yes' if row['same_tokens'] else 'NO':4}  {share}",
                    flush=True,
                )
    if options.json:
        options.json.write_text(json.dumps({"machine": machine, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
