"""One line per family: tokens per second of a 125M-like shape, here and in transformers on torch, in one run.

    python benchmarks/families.py               every family
    python benchmarks/families.py --tiny        sizes that take seconds, to see that it runs
    python benchmarks/families.py --only llama  these; may be repeated
    python benchmarks/families.py --json FILE   what was measured, also as JSON

Random weights, float32, greedy, on the CPU; of each side the best of three calls after one that compiles or warms up.
"""

import argparse
import dataclasses
import json
import os
import platform
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import transformers
from flax import nnx

from jaxgen.models.families import families

SHAPE = {"vocab_size": 32000, "hidden_size": 768, "intermediate_size": 2048, "num_hidden_layers": 12}
TINY = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 12, "num_key_value_heads": 4}
FEW_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
EXPERTS = {"num_experts": 8, "num_local_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 1024}


def config_of(kind: Any, tiny: bool) -> Any:
    """The shape in a family's own fields; what else it has stays at its default, per layer for the first layers."""
    sizes = {**(TINY | FEW_HEADS if tiny else SHAPE | HEADS), "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = kind.config_class
    fields = {field.name for field in dataclasses.fields(config)}
    if config.experts_field is not None:
        sizes |= {name: value for name, value in EXPERTS.items() if name in fields}
    head = sizes["hidden_size"] // sizes["num_attention_heads"]
    return config.from_hf({"model_type": config.model_type, **sizes, "head_dim": head})


def best(generate: Any) -> float:
    """Seconds of the fastest of three calls."""
    generate()
    times = []
    for _ in range(3):
        start = time.perf_counter()
        generate()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    """Print the lines."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--only", action="append", metavar="MODEL_TYPE")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    new, prompt = (8, 6) if arguments.tiny else (64, 32)
    ids = np.random.default_rng(0).integers(3, 97, (1, prompt))
    print(f"{'family':<12} {'jaxgen':>10} {'torch':>10} {'ratio':>7}   tokens/s, {new} after {prompt}, one row")
    rows = []
    for kind in families():
        name = kind.config_class.model_type
        if arguments.only and name not in arguments.only:
            continue
        config = config_of(kind, arguments.tiny)
        ours = kind(config, rngs=nnx.Rngs(0))
        options: dict[str, Any] = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False}
        here = new / best(lambda ours=ours, options=options: ours.generate(ids, **options))
        del ours
        fields = {key: value for key, value in config.to_hf().items() if key not in ("model_type", "architectures")}
        theirs: Any = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(name, **fields))
        theirs.eval()
        with torch.no_grad():
            there = new / best(lambda theirs=theirs, options=options: theirs.generate(torch.from_numpy(ids), **options))
        print(f"{name:<12} {here:>10.1f} {there:>10.1f} {here / there:>7.2f}", flush=True)
        rows.append({"family": name, "jaxgen": round(here, 1), "transformers": round(there, 1)})
    if arguments.json:
        versions = {"jax": jax.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
        machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), **versions}
        measured = {"machine": machine, "prompt": prompt, "new_tokens": new, "rows": rows}
        arguments.json.write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
