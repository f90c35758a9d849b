"""Make the golden tokens of the demo, or check them: `python -m tests.reference.golden [--check]`.

Writes `golden.json` next to this file: what the sampling stream of `SAMPLER_VERSION` (choosing/sample.py) is, from
the keys to the tokens. `noise` holds keys, random bits, gumbel numbers and draws from given logits, without any model;
`runs` holds prompts (ids), options and the demo's new tokens. `tests/test_golden.py` compares on every JAX in CI.

The tokens must not hang on a rounding: a run is refused where the two best of logits + noise are nearer than `LEAD`
at any step, or where tokens change when up to `LEAD` is added to or taken from every logit (`REPEATS` times; this also
covers what is no argmax: filters' cuts, beams). Speculation must give what is drawn without it. The JSON names the
smallest lead of each run.
"""

import argparse
import hashlib
import json
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import demo
from jaxgen.generation.choosing.sample import SAMPLER_VERSION, draw, random_key, row_id_words, row_keys
from jaxgen.text.tokenizer import load_tokenizer

GOLDEN = Path(__file__).parent / "golden.json"
LEAD = 1e-3  # of the best token over the next: a hundred times what float32 logits differ between versions
REPEATS = 8
NEW_TOKENS = 24
SPECULATION = ("prompt_lookup_num_tokens", "assistant")
BEAMS = "num_beams"

TEXTS = ["A list of colors: red, blue", "Portugal is", "I am a cat.", "A sequence of numbers: 1, 2, 3, 4"]
# The demo is sure of itself: at a lower temperature most seeds would give the greedy tokens.
HOT: dict[str, Any] = {"do_sample": True, "temperature": 2.0, "top_k": 0}
# `weights` and `assistant` name a form of the demo: float32 or int4. Runs that compile the same stand together.
RUNS: dict[str, dict[str, Any]] = {
    "greedy": {"do_sample": False},
    "seed 1": {**HOT, "seed": 1},
    "seed 3": {**HOT, "seed": 3},
    "seed -7": {**HOT, "seed": -7},
    "seed 2**32 + 5": {**HOT, "seed": 2**32 + 5},
    "row ids": {**HOT, "seed": 12, "row_ids": ["a", "row 417", 2**40 + 3, -1]},
    "eos": {**HOT, "seed": 8, "eos_token_id": 2, "max_new_tokens": 40},
    "seed per row": {**HOT, "seed": [1, 417, 2**40, -7]},
    "filters": {**HOT, "seed": 4, "top_k": 20, "top_p": 0.9, "min_p": 0.02},
    "num_return_sequences": {**HOT, "seed": 7, "num_return_sequences": 3},
    "beam sample": {**HOT, "num_beams": 3, "seed": 9},
    "prompt lookup": {**HOT, "seed": 10, "prompt_lookup_num_tokens": 4},
    "assistant": {**HOT, "seed": 11, "assistant": "int4", "num_assistant_tokens": 4},
    "int4": {**HOT, "seed": 1, "weights": "int4"},
}

Models = Callable[[str], Any]  # a form of the demo


def generate(models: Models, prompts: list[list[int]], run: dict[str, Any], **more: Any) -> Any:
    """The `GenerateOutput` of a run."""
    options = {"max_new_tokens": NEW_TOKENS, "eos_token_id": None, "pad_token_id": 2, **run, **more}
    model, assistant = models(options.pop("weights", "float32")), options.pop("assistant", None)
    if assistant is not None:
        options["assistant_model"] = models(assistant)
    width = max(map(len, prompts))
    ids, mask = np.zeros((2, len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :], mask[row, width - len(prompt) :] = prompt, 1
    return model.generate(ids, mask, return_dict_in_generate=True, **options)


def new_tokens(output: Any) -> list[str]:
    """One string per row: the ids up to the row's end."""
    width = output.sequences.shape[1] - output.logprobs.shape[1]
    return [
        " ".join(map(str, row[width : width + count]))
        for row, count in zip(output.sequences.tolist(), output.lengths.tolist(), strict=True)
    ]


def noise() -> dict[str, Any]:
    """The sampling stream without a model: each entry builds on the ones before it."""
    seeds: tuple[int, ...] = (0, 7, -1, 2**32, 2**64 - 1, 10**30)
    ids = [0, 1, 2**32 + 5, -1, "a", ""]
    roots = [random_key(None, seed)[0] for seed in seeds]
    rows = row_keys(roots[1], jnp.asarray(row_id_words(ids, len(ids))), 2)
    steps = jax.vmap(jax.random.fold_in, in_axes=(0, None))(rows, 41)
    bits = jax.random.bits(steps[3], (640,), jnp.uint32)
    gumbel = jax.random.gumbel(steps[3], (640,), jnp.float32, mode="low")
    # Logits on a coarse grid that sums and roundings of float32 leave alone.
    logits = jnp.asarray(np.random.PCG64(0).random_raw(12 * 640) % 32 / 8.0, jnp.float32).reshape(12, 640)
    draws = jax.jit(jax.vmap(draw, in_axes=(None, None, 0)))(logits, rows, jnp.tile(jnp.arange(40)[:, None], 12))
    return {
        "random_key": [_hex(jax.random.key_data(root)) for root in roots],
        "row_id_words": _hex(row_id_words(ids, len(ids))),
        "row_keys": [_hex(key) for key in np.asarray(jax.random.key_data(rows))],
        "fold_in": [_hex(key) for key in np.asarray(jax.random.key_data(steps))],
        "bits": _hex(bits[:16]),
        "bits_sha256": _sha256(bits),
        "gumbel": np.asarray(gumbel[:16], np.float64).round(6).tolist(),
        "draws": [" ".join(map(str, row)) for row in np.asarray(draws).T.tolist()],
    }


def _hex(array: Any) -> str:
    return " ".join(f"{word:08x}" for word in np.asarray(array, np.uint32).ravel().tolist())


def _sha256(array: Any) -> str:
    return hashlib.sha256(np.asarray(array).astype("<u4").tobytes()).hexdigest()


def smallest_lead(models: Models, prompts: list[list[int]], run: dict[str, Any], tokens: list[str]) -> float | None:
    """How far the best token of logits + noise is before the next, at the closest step; None for beams.

    The noise is computed here from the documented keys. Raises `ValueError` if a token is not the best one.
    """
    if BEAMS in run:
        return None
    plain = {name: value for name, value in run.items() if name not in (*SPECULATION, "num_assistant_tokens")}
    output = generate(models, prompts, plain, output_scores=True)
    if new_tokens(output) != tokens:
        raise ValueError("speculation drew other tokens than plain sampling")
    samples, closest = plain.get("num_return_sequences", 1), np.inf
    key, _ = random_key(None, plain.get("seed", 0))
    row_ids = plain.get("row_ids", [0] * len(prompts) if key.ndim else None)
    keys = row_keys(key, jnp.asarray(row_id_words(row_ids, len(prompts))), samples)
    for row, count in enumerate(output.lengths.tolist()):
        for step in range(count):
            values = np.asarray(output.scores[step][row], np.float64)
            if plain["do_sample"]:
                draw_key = jax.random.fold_in(keys[row], len(prompts[row // samples]) + step)
                values = values + np.asarray(jax.random.gumbel(draw_key, values.shape, jnp.float32))
            second, best = np.argsort(values)[-2:]
            if best != int(tokens[row].split()[step]):
                raise ValueError(f"row {row}, step {step}: the token is not the best of logits + noise")
            closest = min(closest, values[best] - values[second])
    return float(closest)


def moved(key_data: Any, _: Any, lengths: Any, logits: Any) -> Any:
    """A processor for `generate`: every logit moves by up to `LEAD`, as the key and the row's length say."""
    keys = jax.vmap(jax.random.fold_in, in_axes=(None, 0))(jax.random.wrap_key_data(key_data), lengths)
    return logits + jax.vmap(lambda key: jax.random.uniform(key, logits.shape[1:], minval=-LEAD, maxval=LEAD))(keys)


def survives_noise(models: Models, prompts: list[list[int]], run: dict[str, Any], tokens: list[str]) -> bool:
    """Whether the tokens stay when every logit moves by up to `LEAD`, another way each time and at each step."""

    for repeat in range(REPEATS):
        data = np.array([123, repeat], np.uint32)
        if new_tokens(generate(models, prompts, run, logits_processor=[jax.tree_util.Partial(moved, data)])) != tokens:
            return False
    return True


def load(form: str) -> Any:
    """The demo in a form: float32 or int4."""
    from jaxgen import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32", load_in_4bit=form == "int4")


def compute() -> dict[str, Any]:
    """Everything; raises `ValueError` for a run that hangs on less than `LEAD`."""
    loaded: dict[str, Any] = {form: load(form) for form in ("float32", "int4")}
    models = loaded.__getitem__
    tokenizer = load_tokenizer(demo.path())
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    runs, refused = {}, []
    for name, run in RUNS.items():
        tokens = new_tokens(generate(models, prompts, run))
        lead = smallest_lead(models, prompts, run, tokens)
        if lead is not None and lead < LEAD:
            refused.append(f"{name}: the closest decision leads by {lead}")
        elif not survives_noise(models, prompts, run, tokens):
            refused.append(f"{name}: other tokens when logits move by {LEAD}")
        jax.clear_caches()  # XLA:CPU runs out of memory maps
        runs[name] = {"options": run, "smallest_lead": lead and round(lead, 5), "rows": tokens}
    if refused:
        raise ValueError("choose other seeds for " + "; ".join(refused))
    versions = {name: version(name) for name in ("jaxgen", "jax", "jaxlib", "flax")}
    return {
        "sampler_version": SAMPLER_VERSION,
        "versions": versions,
        "prompts": prompts,
        "noise": noise(),
        "runs": runs,
    }


def main() -> int:
    """Command line; the exit code is 1 when `--check` finds a difference (versions may differ)."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is committed; write nothing")
    check = parser.parse_args().check
    computed = compute()
    if not check:
        GOLDEN.write_text(json.dumps(computed, indent=1) + "\n", encoding="utf-8")
        leads = {name: run["smallest_lead"] for name, run in computed["runs"].items()}
        sys.stdout.write(json.dumps(leads, indent=1) + "\n")
        return 0
    committed = json.loads(GOLDEN.read_text(encoding="utf-8"))
    wrong = [name for name in ("sampler_version", "prompts", "noise") if committed[name] != computed[name]]
    wrong += [
        name for name, run in computed["runs"].items() if committed["runs"].get(name, {}).get("rows") != run["rows"]
    ]
    sys.stdout.write("".join(f"differs: {name}\n" for name in wrong) or "the golden tokens match\n")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
