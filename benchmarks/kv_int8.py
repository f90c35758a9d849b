"""What keys and values in 8 bits change: `cache_implementation="quantized"` against the cache as it is.

    python benchmarks/kv_int8.py [--model DIR --text FILE] [--json FILE]

Float32, on text that the demo was not trained on (or a file of your own). Every token reads the others through the
cache, so all logits of a text are those of a step of decoding. Distances are of the next-token distributions.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from quality import demo_ids

import jaxgen
from jaxgen.generation.programs.structure import split
from jaxgen.text.tokenizer import load_tokenizer


def logits_of(model: Any, ids: jax.Array, int8: bool) -> jax.Array:
    """Logits [T, V] of one text, read through a cache."""
    length = jnp.array([len(ids)])
    cache = model.empty_cache(1, len(ids), int8)
    hidden, _ = model.extend(ids[None], jnp.zeros_like(length), length, cache)
    return model.logits(hidden)[0]


def distances(exact: jax.Array, other: jax.Array) -> dict[str, jax.Array]:
    p, q = jax.nn.log_softmax(exact), jax.nn.log_softmax(other)
    return {
        "kl": jnp.sum(jnp.exp(p) * (p - q), axis=-1),
        "logit_rms": jnp.sqrt(jnp.mean((exact - other) ** 2, axis=-1)),
        "logit_max": jnp.abs(exact - other).max(axis=-1),
        "same_top": exact.argmax(-1) == other.argmax(-1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=jaxgen.demo.path())
    parser.add_argument("--text", type=Path, help="UTF-8 text; default: the demo's held-out documents")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = jaxgen.AutoModelForCausalLM.from_pretrained(options.model, dtype="float32")
    if options.text is None:
        texts = demo_ids()[0]
    else:
        ids = load_tokenizer(options.model)(options.text.read_text(encoding="utf-8"))["input_ids"]
        texts = np.array(ids[: len(ids) // 512 * 512], np.int32).reshape(-1, 512)
    structure, weights = split(model)

    @jax.jit
    def compare(weights: Any, ids: jax.Array) -> dict[str, jax.Array]:
        module = structure.module(weights)
        return distances(logits_of(module, ids, int8=False), logits_of(module, ids, int8=True))

    found: dict[str, Any] = {}
    for text in texts:
        for name, values in compare(weights, jnp.asarray(text)).items():
            found.setdefault(name, []).append(np.asarray(values, np.float64))
    exact = np.asarray(model(jnp.asarray(texts[:1])).logits[0])
    result = {
        "tokens": int(texts.size),
        "kl": float(np.mean(found["kl"])),
        "same_top": float(np.mean(found["same_top"])),
        "logit_rms": float(np.sqrt(np.mean(np.square(found["logit_rms"])))),
        "logit_max": float(np.max(found["logit_max"])),
        "logit_std": float(exact.std()),
        "bytes": (model.config.head_size + 4) / (model.config.head_size * 4),
    }
    print(json.dumps(result, indent=1))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
