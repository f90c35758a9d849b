"""What constraints cost on this machine: to build, to hold, and per decode step, by vocabulary and batch.

    python benchmarks/constraints.py [--vocab 32000 131072] [--batch 1 8] [--repeats 15] [--json FILE]

The vocabulary is byte-level: the commonest words in the source of Python's library, with a space in front of half of
them. "first" is the time to build a constraint where nothing is known of the vocabulary, "next" where it has been read.
The step is the mask alone, compiled alone, beside the same program without it: the median over the repeats.
"""

import argparse
import collections
import json
import os
import re
import statistics
import sysconfig
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import jaxgen
from jaxgen.generation.choosing import constrained, vocabulary
from jaxgen.generation.choosing.constrained import Automata
from jaxgen.generation.processors.regular import Constrained
from jaxgen.generation.prompts.rows import Rows

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "tags": {"type": "array", "items": {"type": "string"}},
    },
    "required": ["name", "age"],
}
CONSTRAINTS = {
    "choice of 3": jaxgen.choice(["yes", "no", "maybe"]),
    "date": jaxgen.regex(r"[0-9]{4}-[0-9]{2}-[0-9]{2}"),
    "JSON schema": jaxgen.json_schema(PERSON),
}


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    words: collections.Counter[str] = collections.Counter()
    for file in sorted(Path(sysconfig.get_paths()["stdlib"]).glob("**/*.py")):
        words.update(re.findall(r"[A-Za-z]+|[0-9]+|[^\sA-Za-z0-9]+", file.read_text(encoding="utf-8", errors="ignore")))
    known = dict.fromkeys(sorted(pre_tokenizers.ByteLevel.alphabet()))
    for word, _ in words.most_common():
        spelled = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(word)[0][0]
        known |= dict.fromkeys((spelled, f"Ġ{spelled}"))
        if len(known) >= size - 1:
            break
    if len(known) < size - 1:
        raise SystemExit(f"there are only {len(known)} words")
    tokens = {word: index for index, word in enumerate([*known][: size - 1])}
    backend = Tokenizer(models.BPE(vocab=tokens, merges=[]))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    backend.add_special_tokens(["</s>"])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


@jax.jit
def run(chain: tuple[Any, ...], logits: jax.Array, rows: Rows) -> jax.Array:
    for entry in chain:
        logits = entry(logits, rows)
    return logits


def microseconds(chain: tuple[Any, ...], logits: jax.Array, rows: Rows, repeats: int) -> float:
    run(chain, logits, rows).block_until_ready()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run(chain, logits, rows).block_until_ready()
        times.append(time.perf_counter() - start)
    return 1e6 * statistics.median(times)


def measure(vocab: int, batches: list[int], repeats: int) -> list[dict[str, Any]]:
    tokenizer, rows = tokenizer_of(vocab), []
    eos = tokenizer.get_vocab()["</s>"]
    for name, constraint in CONSTRAINTS.items():
        vocabulary._vocabularies.clear()
        constrained.byte_automaton.cache_clear()
        seconds = {}
        for when in ("first", "next"):
            constrained._automaton.cache_clear()
            start = time.perf_counter()
            automata = Automata.of(constraint, tokenizer, 1, vocab, (eos,))
            seconds[when] = time.perf_counter() - start
        built = constrained._automaton(
            constraint, vocabulary.vocabulary_of(tokenizer, ""), frozenset({eos}), vocab, (eos,)
        )
        held = sum(x.nbytes for x in jax.tree.leaves(automata))
        row = {"vocab": vocab, "constraint": name, "states": built.table.shape[0], "classes": built.table.shape[1]}
        row |= {"first_seconds": seconds["first"], "next_seconds": seconds["next"], "kilobytes": held / 1000}
        for batch in batches:
            lengths = jnp.full(batch, 100, jnp.int32)
            prompts = jnp.arange(batch, dtype=jnp.int32)
            state = Rows(
                jnp.zeros((batch, 256), jnp.int32), lengths, lengths - 9, lengths + 100, prompts, lengths > 0,
                automata.start(prompts),
            )  # fmt: skip
            logits = jnp.asarray(np.random.default_rng(0).standard_normal((batch, vocab)), jnp.float32)
            row[f"microseconds_{batch}"] = microseconds((Constrained(automata, None, False),), logits, state, repeats)
            row[f"nothing_{batch}"] = microseconds((), logits, state, repeats)
        rows.append(row)
        print(", ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vocab", type=int, nargs="+", default=[32000, 131072])
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = [row for vocab in arguments.vocab for row in measure(vocab, arguments.batch, arguments.repeats)]
    if arguments.json:
        device = {"device": jax.devices()[0].device_kind, "cores": len(os.sched_getaffinity(0)), "jax": jax.__version__}
        found = {"machine": device, "rows": rows}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
