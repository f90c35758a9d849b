"""The logits processors against transformers', live: HF builds its own list for each row alone, without padding."""

from types import SimpleNamespace
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from transformers.generation import logits_process, watermarking
from transformers.generation.utils import GenerationMixin

from jaxgen.generation.processors import watermark
from jaxgen.generation.processors.watermark import WatermarkDetector, WatermarkingConfig
from jaxgen.generation.prompts.rows import Rows
from tests.helpers import assert_same, floats, processed, rows_of
from tests.oracle.versions import comparable, since_5_24
from tests.reference import filters

pytestmark = pytest.mark.oracle

VOCAB = filters.VOCAB
ROWS = 12
SAMPLING = {"temperature", "top_h", "top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"}
# Filters that cut where a sum or a product of floats crosses the option's value.
CUTS = ("top_h", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff")

SETTINGS: list[dict[str, Any]] = [
    {"sequence_bias": {(1,): 2.5, (2, 3): -1.5, (0, 1, 2): 4.0, (1, 2): 1.0, (3, 3, 3, 3, 3): -3.0}},
    {"encoder_repetition_penalty": 1.7},
    {"encoder_repetition_penalty": 0.6},
    {"repetition_penalty": 1.3},
    {"repetition_penalty": 0.7},
    *({"no_repeat_ngram_size": n} for n in (1, 2, 3, 4, 30)),
    *({"encoder_no_repeat_ngram_size": n} for n in (1, 2, 3, 30)),
    {"bad_words_ids": [[1], [7], [0, 1], [2, 3, 0], [1, 1]]},
    {"min_length": 9},
    {"min_new_tokens": 4},
    {"forced_bos_token_id": 5},
    {"forced_eos_token_id": 7},
    {"forced_eos_token_id": [7, 90]},
    {"remove_invalid_values": True},
    {"exponential_decay_length_penalty": (2, 1.01)},
    {"exponential_decay_length_penalty": (0, 1.9)},
    {"suppress_tokens": [0, 5, 130]},
    {"begin_suppress_tokens": [0, 5, 130]},
    {"begin_suppress_tokens": [0, 5, 130], "forced_bos_token_id": 2},
    *({"temperature": x} for x in (0.1, 0.7, 3.0)),
    *({"top_h": x} for x in (0.05, 0.4, 0.9)),
    *({"top_k": x} for x in (1, 5, 64, 100, 2000)),
    *({"top_p": x} for x in (0.001, 0.5, 0.9, 0.99)),
    *({"min_p": x} for x in (0.01, 0.5, 1.0)),
    *({"typical_p": x} for x in (0.05, 0.5, 0.95)),
    *({"epsilon_cutoff": x} for x in (1e-4, 0.01, 0.3)),
    *({"eta_cutoff": x} for x in (1e-4, 0.01, 0.3)),
    {"renormalize_logits": True, "temperature": 0.5},
]


class Model(GenerationMixin):
    """As much of a model as HF needs to make its list of processors."""

    config = SimpleNamespace(is_encoder_decoder=False, get_text_config=lambda: SimpleNamespace(vocab_size=VOCAB))


def batch(seed: int) -> tuple[np.ndarray, Rows, list[list[int]]]:
    """The rows of `filters.inputs` and a few more, over a small alphabet so that n-grams repeat; some about to end."""
    rng = np.random.default_rng(seed)
    logits = np.concatenate([filters.inputs(seed).logits, 3 * rng.standard_normal((4, VOCAB))]).astype(np.float32)
    lengths = [1, 2, 2, *rng.integers(3, 25, ROWS - 3).tolist()]
    histories = [rng.integers(0, 4, n).tolist() for n in lengths]
    new = [0, 1, 0, *[int(rng.integers(0, n)) for n in lengths[3:]]]
    limits = [n + int(rng.integers(1, 3)) for n in lengths]
    return logits, rows_of(histories, new, limits, slots=32, garbage=3), histories


def hf(options: dict[str, Any], logits: np.ndarray, rows: Rows, histories: list[list[int]], **arguments: Any):
    """Float32 `[R, V]`: HF's own list of processors for each row."""
    results = []
    for row, history in enumerate(histories):
        prompt = int(rows.prompt_lengths[row])
        config = transformers.GenerationConfig(**options)
        config.update(**transformers.GenerationConfig._get_default_generation_params(), defaults_only=True)
        if "top_k" not in options:
            config.top_k = 0
        config.max_length = int(rows.max_lengths[row])
        eos = options.get("eos_token_id")
        config._eos_token_tensor = None if eos is None else torch.tensor(np.atleast_1d(eos))
        ids = torch.tensor([history])
        processors = Model()._get_logits_processor(
            config, prompt, ids[:, :prompt], device="cpu", model_kwargs={}, **arguments
        )
        results.append(processors(ids, torch.tensor(logits[row : row + 1]))[0].numpy())
    return np.stack(results)


def hangs(options: dict[str, Any], *data: Any) -> np.ndarray:
    """bool [R]: rows where the last bits, of the logits or of a filter's number, change what HF removes."""
    logits, *rest = data
    outcome = np.isneginf(hf(options, *data))
    changed = (np.isneginf(hf(options, logits.astype(np.float64), *rest)) != outcome).any(axis=1)
    for name in CUTS:
        if name in options:
            for factor in (1 - 1e-5, 1 + 1e-5):
                # top_p compares with 1 - p.
                number = 1 - (1 - options[name]) * factor if name == "top_p" else options[name] * factor
                nearby = hf({**options, name: min(number, 1.0)}, *data)
                changed |= (np.isneginf(nearby).sum(axis=1) != outcome.sum(axis=1)) & (options[name] != 1.0)
    return changed


def compare(options: dict[str, Any], seed: int, beams: bool = False) -> int:
    """How many rows were compared."""
    options = {"eos_token_id": [7, 90], "do_sample": bool(SAMPLING & options.keys()), **options}
    logits, rows, histories = batch(seed)
    if "remove_invalid_values" in options:
        logits[0, :3] = [np.nan, np.inf, -np.inf]
    data = (logits, rows, histories)
    hf_options = {**options, "num_beams": 2} if beams else options
    expected = hf(hf_options, *data)
    actual = floats(processed(options, logits, rows, beams=beams))
    clear = ~hangs(hf_options, *data)
    assert_same(actual[clear], expected[clear], ties=bool({"top_p", "top_h"} & options.keys()))
    return int(clear.sum())


@pytest.mark.filterwarnings("ignore:.*generation flags")
@pytest.mark.parametrize("options", SETTINGS, ids=str)
def test_each_processor_equals_hf(options: dict[str, Any]):
    if comparable(options) != options:
        pytest.skip("transformers computes it since 5.24 (tests/oracle/versions.py)")
    assert sum(compare(options, seed) for seed in (1, 2, 3)) > 0.85 * 3 * ROWS


@pytest.mark.parametrize("name", ["top_k", "top_p", "min_p", "typical_p", "epsilon_cutoff", "eta_cutoff"])
@pytest.mark.parametrize("eos", [None, 7, [7, 90, 3]])
def test_beams_equal_hf(name: str, eos: int | list[int] | None):
    number = {"top_k": 1, "top_p": 0.001, "min_p": 0.9, "typical_p": 0.01}.get(name, 0.6)
    logits, *_ = batch(1)
    options = {name: number, "do_sample": True, "eos_token_id": eos}
    # Which of equal tokens count as the best is up to torch: only rows without equals.
    _, rows, histories = batch(1)
    distinct = [len(set(row)) == VOCAB for row in logits.tolist()]
    expected = hf({**options, "num_beams": 2}, logits, rows, histories)
    actual = floats(processed(options, logits, rows, beams=True))
    assert sum(distinct) > 6
    assert_same(actual[distinct], expected[distinct], ties=False)


def random_options(rng: np.random.Generator) -> dict[str, Any]:
    """A few options together, with random numbers."""
    options = {
        "sequence_bias": {tuple(rng.integers(0, 4, n).tolist()): float(rng.normal()) for n in (1, 2, 2, 3)},
        "encoder_repetition_penalty": float(rng.uniform(0.5, 2)),
        "repetition_penalty": float(rng.uniform(0.5, 2)),
        "no_repeat_ngram_size": int(rng.integers(1, 5)),
        "encoder_no_repeat_ngram_size": int(rng.integers(1, 5)),
        "bad_words_ids": [rng.integers(0, 4, n).tolist() for n in (1, 2, 3)],
        "min_length": int(rng.integers(1, 20)),
        "min_new_tokens": int(rng.integers(1, 9)),
        "exponential_decay_length_penalty": (int(rng.integers(0, 5)), float(rng.uniform(1.01, 1.5))),
        "suppress_tokens": rng.integers(0, VOCAB, 5).tolist(),
        "begin_suppress_tokens": rng.integers(0, VOCAB, 5).tolist(),
        "temperature": float(rng.uniform(0.2, 3)),
        "top_h": float(rng.uniform(0.3, 0.95)),
        "top_k": int(rng.integers(5, 100)),
        "top_p": float(rng.uniform(0.3, 0.99)),
        "min_p": float(rng.uniform(0.001, 0.3)),
        "typical_p": float(rng.uniform(0.3, 0.99)),
        "epsilon_cutoff": float(rng.uniform(0.0001, 0.01)),
        "eta_cutoff": float(rng.uniform(0.0001, 0.01)),
    }
    return {name: value for name, value in options.items() if rng.random() < 0.4}


def test_random_chains_equal_hf():
    rng = np.random.default_rng(0)
    compared = sum(compare(comparable(random_options(rng)), seed) for seed in range(8))
    assert compared > 0.7 * 8 * ROWS


@pytest.mark.parametrize("options", [{}, {"sequence_bias": {(5,): 3.0}, "temperature": 0.5, "top_k": 3}], ids=str)
def test_constraint_and_user_processor_stand_where_hf_has_them(options: dict[str, Any]):
    options = {**options, "do_sample": True, "forced_eos_token_id": 7, "remove_invalid_values": True}
    logits, rows, histories = batch(4)
    weights = np.random.default_rng(0).standard_normal(VOCAB).astype(np.float32)

    def allowed(prompt: int, ids: Any) -> list[int]:
        return [int(ids[-1]), (3 * len(ids)) % VOCAB, 5, 60]

    class Weigh(logits_process.LogitsProcessor):
        def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
            return scores * 0.5 + input_ids.shape[1] * torch.tensor(weights)

    def weigh(tokens: Any, lengths: Any, scores: Any) -> Any:
        return scores * 0.5 + lengths[:, None] * jnp.asarray(weights)

    mine = logits_process.LogitsProcessorList([Weigh()])
    expected = hf(options, logits, rows, histories, prefix_allowed_tokens_fn=allowed, logits_processor=mine)
    actual = processed(options, logits, rows, user=[weigh], prefix_allowed_tokens_fn=allowed)
    assert_same(np.float32(actual), expected, ties=False)


@since_5_24
def test_prefix_allowed_tokens_of_beams_equals_hf():
    rng = np.random.default_rng(5)
    histories = rng.integers(0, 4, (6, 5)).tolist()
    logits = rng.standard_normal((6, VOCAB)).astype(np.float32)

    def allowed(prompt: int, ids: Any) -> list[int]:
        return [10 * prompt + int(ids[-1]), 20]

    for row in (0, 1, 3, 4, 5):  # prompt 0 keeps one beam alive, prompt 1 none
        logits[row, allowed(row // 3, histories[row])] = -np.inf
    processor = logits_process.PrefixConstrainedLogitsProcessor(allowed, num_beams=3)
    expected = processor(torch.tensor(histories), torch.tensor(logits)).numpy()
    rows = rows_of(histories)
    rows.prompts = jnp.arange(6, dtype=jnp.int32) // 3
    actual = processed({}, logits, rows, prefix_allowed_tokens_fn=allowed, beams=True)
    np.testing.assert_array_equal(np.float32(actual), expected)


# Watermarks: torch's greenlists cannot be had, so HF's classes are given ours, and all else is theirs.


def our_greenlist(config: WatermarkingConfig):
    def greenlist(self: Any, input_seq: torch.Tensor) -> torch.Tensor:
        window = input_seq[-config.context_width :].numpy()
        if config.seeding_scheme == "selfhash":  # HF asks only about the last token
            hashes = watermark.selfhash_words(config.key_words, window[None].astype(np.int32))
            return input_seq[-1:] if np.asarray(hashes)[0] < config.threshold else input_seq[:0]
        windows = np.array([[window[-1], token] for token in range(VOCAB)], np.int32)
        return torch.from_numpy(
            np.flatnonzero(np.asarray(watermark.lefthash_words(config.key_words, windows)) < config.threshold)
        )

    return greenlist


CONFIGS = [
    WatermarkingConfig(),
    WatermarkingConfig(0.5, 1.5, 99, "lefthash", 3),
    WatermarkingConfig(0.4, 2.5, 7, "selfhash", 1),
    WatermarkingConfig(0.6, 2.5, 8, "selfhash", 3),
]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_watermark_equals_hf_on_the_same_greenlists(config: WatermarkingConfig, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(logits_process.WatermarkLogitsProcessor, "_get_greenlist_ids", our_greenlist(config))
    logits, rows, histories = batch(6)
    # Which of equal tokens are among the best 40 is up to torch.
    chosen = [row for row in range(ROWS) if len(set(logits[row].tolist())) == VOCAB]
    theirs = transformers.WatermarkingConfig(**config.to_dict())
    expected = hf({"watermarking_config": theirs, "do_sample": False}, logits, rows, histories)
    actual = floats(processed({"watermarking_config": theirs}, logits, rows))
    np.testing.assert_allclose(actual[chosen], expected[chosen], rtol=1e-6)
    assert (expected != logits).any()


@since_5_24
@pytest.mark.parametrize("ignore_repeated_ngrams", [False, True])
@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_detector_equals_hf_on_the_same_greenlists(
    config: WatermarkingConfig, ignore_repeated_ngrams: bool, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(logits_process.WatermarkLogitsProcessor, "_get_greenlist_ids", our_greenlist(config))
    model = SimpleNamespace(vocab_size=VOCAB, bos_token_id=1, is_encoder_decoder=False)
    ids = np.random.default_rng(0).integers(2, 9, (3, 40))
    theirs = watermarking.WatermarkDetector(model, "cpu", config.to_dict(), ignore_repeated_ngrams)
    ours = WatermarkDetector(model, config, ignore_repeated_ngrams=ignore_repeated_ngrams)
    for begin in (0, 1):  # with and without BOS
        ids[:, 0] = ids[:, 0] if begin == 0 else 1
        expected = theirs(torch.from_numpy(ids), z_threshold=0.3, return_dict=True)
        actual = ours(ids, z_threshold=0.3, return_dict=True)
        for name, value in vars(actual).items():
            np.testing.assert_allclose(value, getattr(expected, name), rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(ours(ids, z_threshold=0.3), theirs(torch.from_numpy(ids), z_threshold=0.3))


def test_hf_configurations_are_read():
    theirs = transformers.WatermarkingConfig(greenlist_ratio=0.3, bias=1.0, seeding_scheme="selfhash", context_width=2)
    assert WatermarkingConfig.from_hf(theirs) == WatermarkingConfig(0.3, 1.0, 15485863, "selfhash", 2)
    assert WatermarkingConfig.from_hf(transformers.WatermarkingConfig()) == WatermarkingConfig()
    with pytest.raises(ValueError, match="SynthID"):
        WatermarkingConfig.from_hf(transformers.SynthIDTextWatermarkingConfig(keys=[1, 2], ngram_len=5))
