"""What four bits cost: `python benchmarks/quality.py --json benchmarks/results/quality.json` (the demo; a few minutes).

`--model DIR --text FILE --calibration FILE` does the same for another checkpoint: FILE is UTF-8 text, of which 8
sequences are evaluated and 128 calibrated with, up to 2048 tokens each. The demo is evaluated on documents that it
was neither trained on nor calibrated with.

For each way to store the linear layers, against the logits in float32: the Kullback-Leibler divergence (mean over
tokens, in nats, and its standard error over sequences), perplexity, how often the most likely token is the same, and
bits per weight. Four-bit weights are computed with in float32, so their rows show nothing but the weights' rounding.
"""

import argparse
import datetime
import importlib
import itertools
import json
import time
from collections.abc import Callable, Iterable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgen import AutoModelForCausalLM, demo
from jaxgen.convert.calibration import read_calibration
from jaxgen.convert.checkpoint import Checkpoint
from jaxgen.convert.quantize.blocks import quantized_blocks
from jaxgen.demo.corpus import Document, documents
from jaxgen.demo.tokenizer import EOS_ID
from jaxgen.models.mistral import MistralConfig
from jaxgen.models.tensors import Part, parameter_parts
from jaxgen.quant import quantize
from jaxgen.text.tokenizer import load_tokenizer

METHODS = ("absmax", "rtn", "gptq", "autoround")
GROUPS = (128, 64, 32)
TEXT_SEQUENCES = 8  # of a given file: their logits in float32 are kept in host memory
DEMO_SEQUENCES, DEMO_TOKENS = 128, 128
DEMO_TRAINING, DEMO_CALIBRATION, DEMO_TEXT = 1, 2, 3  # seeds of the corpus
DEMO_DOCUMENTS = 100_000  # more than training took from its seed
NF4_BLOCK = 64

Weights = dict[str, jax.Array]  # a model's parameters by dotted path


class Stored(NamedTuple):
    """One linear layer's HF tensor: as what the four bits say, and the bytes they take."""

    name: str
    weight: np.ndarray
    nbytes: int


class Row(NamedTuple):
    weights: str
    method: str
    group_size: int | None
    bits_per_weight: float
    kl: float
    kl_error: float
    perplexity: float
    agreement: float
    seconds: float  # to quantise


class Reference:
    """The text's log-probabilities in float32, and how far others are from them."""

    def __init__(self, graph: nnx.GraphDef, exact: Weights, text: np.ndarray):
        self._log_probabilities = jax.jit(lambda weights, ids: jax.nn.log_softmax(_merge(graph, weights)(ids).logits))
        self._compare = jax.jit(
            lambda weights, ids, exact: _distances(exact, self._log_probabilities(weights, ids), ids)
        )
        step = max(1, 2048 // text.shape[1])
        self._batches = [text[start : start + step] for start in range(0, len(text), step)]
        self._exact = [np.asarray(self._log_probabilities(exact, ids)) for ids in self._batches]

    def __call__(self, weights: Weights) -> dict[str, float]:
        pairs = zip(self._batches, self._exact, strict=True)
        kl, loss, agreement = np.concatenate([self._compare(weights, ids, exact) for ids, exact in pairs], axis=1)
        return {
            "kl": float(kl.mean()),
            "kl_error": float(kl.std() / np.sqrt(len(kl))),
            "perplexity": float(np.exp(loss.mean())),
            "agreement": float(agreement.mean()),
        }


def _merge(graph: nnx.GraphDef, weights: Weights) -> Any:
    state = {_path(name): nnx.Param(value) for name, value in weights.items()}
    return nnx.merge(graph, nnx.from_flat_state(state))


def _path(name: str) -> tuple[str | int, ...]:
    return tuple(int(step) if step.isdigit() else step for step in name.split("."))


def _distances(exact: jax.Array, other: jax.Array, ids: jax.Array) -> jax.Array:
    """Per sequence: mean KL divergence, loss, and agreement of the most likely tokens."""
    kl = (jnp.exp(exact) * (exact - other)).sum(-1).mean(-1)
    loss = -jnp.take_along_axis(other[:, :-1], ids[:, 1:, None], axis=-1).mean((1, 2))
    return jnp.stack([kl, loss, (exact.argmax(-1) == other.argmax(-1)).mean(-1)])


def measure(directory: Path, text: np.ndarray, calibration: np.ndarray, groups: Iterable[int]) -> Iterator[Row]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    checkpoint, config = Checkpoint(directory), model.config
    graph, state = nnx.split(model)
    exact = {".".join(map(str, path)): jnp.asarray(value[...]) for path, value in nnx.to_flat_state(state)}
    compare = Reference(graph, exact, text)
    yield Row("float32", "", None, 32, **compare(exact), seconds=0)
    rounded = {name: value.astype(jnp.bfloat16) for name, value in exact.items()}
    yield Row("bfloat16", "", None, 16, **compare(rounded), seconds=0)

    def row(weights: str, method: str, group: int, stored: Iterable[Stored]) -> Row:
        start = time.perf_counter()
        replaced, bits = _replace(exact, config, stored)
        seconds = time.perf_counter() - start
        return Row(weights, method, group, bits, **compare(replaced), seconds=seconds)

    try:
        yield row("nf4", "bitsandbytes", NF4_BLOCK, nf4(checkpoint, config))
    except ImportError:
        yield Row("nf4", "not installed", NF4_BLOCK, *[float("nan")] * 6)
    for group, method in itertools.product(groups, METHODS):
        yield row("int4", method, group, int4(checkpoint, config, calibration, method, group))


def _replace(exact: Weights, config: MistralConfig, stored: Iterable[Stored]) -> tuple[Weights, float]:
    """The parameters with the linear layers of `stored`, and the bits that one of its weights takes."""
    places = {part.name: (path, part) for path, parts in parameter_parts(config).items() for part in parts}
    buffers, bits, count = {}, 0, 0
    for name, weight, nbytes in stored:
        path, part = places[name]
        part.put(buffers.setdefault(path, np.empty(exact[path].shape, np.float32)), weight)
        bits, count = bits + 8 * nbytes, count + weight.size
    return exact | {path: jnp.asarray(buffer) for path, buffer in buffers.items()}, bits / count


def _linear_parts(config: MistralConfig) -> list[Part]:
    parts = itertools.chain.from_iterable(parameter_parts(config).values())
    return [part for part in parts if part.name.endswith("_proj.weight")]


def int4(
    checkpoint: Checkpoint, config: MistralConfig, calibration: np.ndarray, method: str, group: int
) -> Iterator[Stored]:
    if method in ("absmax", "rtn"):
        names = [part.name for part in _linear_parts(config)]
        layers = ({name: quantize(checkpoint.read(name), group, search=method == "rtn")} for name in names)
    else:
        blocks = quantized_blocks(checkpoint, config, calibration, group_size=group, method=method)
        layers = (quantized for _, quantized in blocks)
    for quantized in layers:
        yield from (Stored(name, np.asarray(weight.dequantize()), weight.nbytes) for name, weight in quantized.items())


def nf4(checkpoint: Checkpoint, config: MistralConfig) -> Iterator[Stored]:
    """bitsandbytes' NF4 without double quantisation, as `load_in_4bit=True` makes it in transformers."""
    import torch

    functional = importlib.import_module("bitsandbytes.functional")
    for part in _linear_parts(config):
        weight = torch.from_numpy(checkpoint.read(part.name).astype(np.float32))
        codes, state = functional.quantize_4bit(weight, blocksize=NF4_BLOCK, quant_type="nf4")
        exact = functional.dequantize_4bit(codes, state).numpy()
        yield Stored(part.name, exact, codes.nbytes + state.absmax.nbytes)


def demo_ids() -> tuple[np.ndarray, np.ndarray]:
    """Evaluation and calibration ids; no document of the first is in the second, or in the training text."""
    trained = {document.text for document in itertools.islice(documents(DEMO_TRAINING), DEMO_DOCUMENTS)}
    calibration, used = _pack(documents(DEMO_CALIBRATION), lambda text: True)
    text, _ = _pack(documents(DEMO_TEXT), lambda text: text not in trained and text not in used)
    return text, calibration


def _pack(source: Iterator[Document], wanted: Callable[[str], bool]) -> tuple[np.ndarray, set[str]]:
    """Sequences of documents, each beginning with a new one, as prompts do; and the documents' texts."""
    tokenizer, used = load_tokenizer(demo.path()), set()
    rows = np.empty((DEMO_SEQUENCES, DEMO_TOKENS), np.int32)
    for row in rows:
        ids: list[int] = []
        while len(ids) < DEMO_TOKENS:
            text, complete = next(source)
            if wanted(text):
                used.add(text)
                ids += tokenizer(text, add_special_tokens=not text.startswith("<|"))["input_ids"] + complete * [EOS_ID]
        row[:] = ids[:DEMO_TOKENS]
    return rows, used


def _versions() -> dict[str, str]:
    found = {}
    for name in ("jaxgen", "jax", "flax", "optax", "numpy", "bitsandbytes", "torch"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=demo.path(), help="directory of a checkpoint in floats")
    parser.add_argument("--text", type=Path, help="what to evaluate on; not needed for the demo")
    parser.add_argument("--calibration", type=Path, help="what gptq and autoround see; another text")
    parser.add_argument("--groups", type=int, nargs="+", default=GROUPS)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.model == demo.path():
        text, calibration = demo_ids()
    elif options.text is None or options.calibration is None or options.text.samefile(options.calibration):
        parser.error("--model needs --text and --calibration, which must be two different files")
    else:
        config, tokenizer = MistralConfig.from_hf(options.model), load_tokenizer(options.model)
        text = read_calibration(options.text, tokenizer, config, TEXT_SEQUENCES)
        calibration = read_calibration(options.calibration, tokenizer, config)
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "versions": _versions(),
        "device": jax.devices()[0].device_kind,
        "model": "demo" if options.model == demo.path() else options.model.name,
        "tokens": {"text": text.size, "calibration": calibration.size},
        "rows": [],
    }
    print(json.dumps({name: value for name, value in report.items() if name != "rows"}), flush=True)
    print(f"{'weights':8} {'method':13} group  bits/weight         KL (nats)            perplexity  same top  seconds")
    for row in measure(options.model, text, calibration, options.groups):
        print(
            f"{row.weights:8} {row.method:13} {row.group_size or '':>5}  {row.bits_per_weight:11.3f}  "
            f"{row.kl:11.8f} ± {row.kl_error:10.8f}  {row.perplexity:12.5f}  {row.agreement:8.2%}  {row.seconds:7.1f}",
            flush=True,
        )
        values = {name: None if value != value else value for name, value in row._asdict().items()}
        report["rows"].append(values)
        if options.json:
            options.json.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
