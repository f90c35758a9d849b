"""Combinations of options against transformers on torch, live, greedy and with beams: hundreds of sets of options.

transformers runs each row alone, without padding; jaxgen runs the rows as one ragged batch. Hypothesis chooses which
options are present, which decides what jaxgen compiles; several draws of their numbers and of prompts share that.
"""

import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from safetensors.numpy import load_file, save_file

from jaxgen.convert.load import AutoModelForCausalLM
from tests.oracle.beams import Watched, compare
from tests.oracle.versions import OTHERWISE, OTHERWISE_IN_BEAMS
from tests.reference import live
from tests.reference.cases import CASES, left_padded
from tests.reference.weights import write_checkpoint
from tests.tokenizers import characters

pytestmark = pytest.mark.oracle

VOCAB, ROWS, LONGEST, NEW_TOKENS = 61, 3, 14, 10
# Below this lead of the best score over the second, float32 sums of another order may decide otherwise.
SMALLEST_LEAD = 1e-4
GREEDY_EXAMPLES, GREEDY_DRAWS = 52, 6
BEAM_EXAMPLES, BEAM_DRAWS = 24, 5
OURS_ONLY = ("prefill_chunk_size",)  # transformers has it too, and changes nothing by it
tally: Counter[str] = Counter()


class Scene:
    """One ragged batch, the tokens that greedy decoding meets in it, and what the options chosen so far rule out."""

    def __init__(self, rng: np.random.Generator, model: Any, present: frozenset[str], eos_count: int):
        self.rng, self.present, self.eos_count = rng, present, eos_count
        lengths = np.where(rng.random(ROWS) < 0.25, 1, rng.integers(1, LONGEST + 1, ROWS))
        if "forced_bos_token_id" in present:  # it is for prompts of one token
            lengths[0] = 1
        self.prompts = [rng.integers(0, VOCAB, length).tolist() for length in lengths]
        ids, mask = left_padded(self.prompts)
        self.new = model.generate(ids, mask, max_new_tokens=NEW_TOKENS, eos_token_id=None)[:, ids.shape[1] :].tolist()
        self.texts = [prompt + new for prompt, new in zip(self.prompts, self.new, strict=True)]
        most = int(rng.integers(2, NEW_TOKENS + 1))
        self.length = {"max_new_tokens": most}
        self.limits = [len(prompt) + most for prompt in self.prompts]
        if "max_length" in present:
            # No row gets more than the 16 tokens that jaxgen always has room to record the scores of.
            longest = min(max(map(len, self.prompts)) + most, min(map(len, self.prompts)) + 16)
            self.length, self.limits = {"max_new_tokens": None, "max_length": longest}, [longest] * ROWS
        self.eos = self.met(eos_count)
        self.forced = {name: self.met(1)[0] for name in ("forced_bos_token_id", "forced_eos_token_id")}

    def met(self, count: int) -> list[int]:
        """Different tokens that greedy decoding without options meets."""
        return [int(token) for token in self.rng.choice(np.unique(self.new), count, replace=False)]

    def free(self, count: int) -> list[int]:
        """The same, none of them forced: nothing would be left."""
        return [token for token in self.met(count) if token not in self.forced.values()] or [self.unforced()]

    def unforced(self) -> int:
        return next(token for token in range(VOCAB) if token not in self.forced.values())

    def gram(self, size: int) -> tuple[int, ...]:
        """Some consecutive tokens of a row as it would be without options."""
        text = self.texts[self.rng.integers(ROWS)]
        start = int(self.rng.integers(len(text) - size + 1))
        return tuple(text[start : start + size])

    def grams(self) -> list[tuple[int, ...]]:
        """Four at most, of three sizes: one shape of jaxgen's tables."""
        return list(dict.fromkeys([self.gram(1), self.gram(2), self.gram(2), self.gram(3)]))

    def uniform(self, low: float, high: float) -> float:
        return float(self.rng.uniform(low, high))

    def count(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def stop_strings(self) -> list[str]:
        tokenizer, strings = characters(), ["s"]
        for _ in range(2):
            known = [token for token in self.new[self.rng.integers(ROWS)] if token < len(tokenizer)]
            text = tokenizer.decode(known)
            start, size = self.count(0, max(len(text) - 1, 0)), self.count(1, 4)
            strings.append(text[start : start + size] or "a")
        return strings[self.count(0, 1) :]


# A growth that leaves room below float32's largest number for what remove_invalid_values makes of -inf: beyond it
# transformers gets inf, and jaxgen that number.
def decay(scene: Scene) -> tuple[int, float]:
    return scene.count(0, 4), scene.uniform(1.01, 1.05 if "remove_invalid_values" in scene.present else 1.4)


def least_new(scene: Scene) -> int:
    room = min(limit - len(prompt) for limit, prompt in zip(scene.limits, scene.prompts, strict=True))
    return scene.count(1, room)


VALUES: dict[str, Callable[[Scene], Any]] = {
    "min_length": lambda scene: scene.count(2, min(scene.limits)),
    "min_new_tokens": least_new,
    "repetition_penalty": lambda scene: scene.uniform(0.7, 1.8),
    "encoder_repetition_penalty": lambda scene: scene.uniform(0.7, 1.8),
    "no_repeat_ngram_size": lambda scene: scene.count(1, 4),
    "encoder_no_repeat_ngram_size": lambda scene: scene.count(1, 4),
    "bad_words_ids": lambda scene: [*map(list, scene.grams()[:3]), [*scene.eos[:1], *scene.gram(3)][:3]],
    "sequence_bias": lambda scene: {gram: scene.uniform(-6, 6) for gram in scene.grams()},
    "suppress_tokens": lambda scene: scene.free(4),
    "begin_suppress_tokens": lambda scene: scene.free(4),
    "forced_bos_token_id": lambda scene: scene.forced["forced_bos_token_id"],
    "forced_eos_token_id": lambda scene: scene.forced["forced_eos_token_id"],
    "exponential_decay_length_penalty": decay,
    "remove_invalid_values": lambda scene: True,
    "renormalize_logits": lambda scene: True,
    "guidance_scale": lambda scene: scene.uniform(0.4, 2.5),
    "stop_strings": Scene.stop_strings,
}
NEEDS_EOS = {"min_length", "min_new_tokens", "exponential_decay_length_penalty"}
NAMES = ("max_length", "eos_token_id", "prefill_chunk_size", "negative_prompt_ids", *VALUES)


def options_of(scene: Scene, chunk: int) -> dict[str, Any]:
    """Values for the options that are present, in a form that both libraries take."""
    options = dict(scene.length)
    options["eos_token_id"] = scene.eos or None
    if scene.eos and len(scene.eos) == 1 and scene.rng.random() < 0.5:
        options["eos_token_id"] = scene.eos[0]
    options |= {name: value(scene) for name, value in VALUES.items() if name in scene.present}
    if "prefill_chunk_size" in scene.present:
        options["prefill_chunk_size"] = chunk
    if "stop_strings" in scene.present:
        options["tokenizer"] = characters()
    return options


def completed(present: set[str], beams: bool) -> frozenset[str]:
    """Without what would be an error, or is wrong in transformers."""
    if beams:  # transformers does not reorder the negative rows' keys and values with the beams
        present = present - {"guidance_scale"} - OTHERWISE_IN_BEAMS
    present = present - OTHERWISE
    if "guidance_scale" not in present:
        present = present - {"negative_prompt_ids"}
    return frozenset(present | ({"eos_token_id"} if present & NEEDS_EOS else set()))


class Beams(Watched):
    """Without the options that only jaxgen has."""

    def generate(self, prompt: list[int], **options: Any) -> Any:
        """As `Watched.generate`."""
        return super().generate(prompt, **{k: v for k, v in options.items() if k not in OURS_ONLY})


@pytest.fixture(scope="module")
def pairs():
    """Small models of both libraries: with full attention, and with a window that most rows outgrow."""
    made = []
    for seed, window in ((5, None), (6, 8)):
        config = {**CASES["one_layer"].config, "vocab_size": VOCAB, "sliding_window": window}
        with tempfile.TemporaryDirectory() as directory:
            path = write_checkpoint(Path(directory), config, seed)
            ours = AutoModelForCausalLM.from_pretrained(path, dtype="float32")
        made.append((Beams(live.hf_model(config, seed)), ours))
    return made


@torch.no_grad()
def alone(model: Any, prompt: list[int], options: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    """New tokens [steps] and processed scores [steps, V] of transformers for one row."""
    result = model.generate(
        torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long), do_sample=False,
        return_dict_in_generate=True, output_scores=True,
        **{name: value for name, value in options.items() if name not in OURS_ONLY},
    )  # fmt: skip
    return result.sequences[0, len(prompt) :].numpy(), torch.cat(result.scores).numpy()


def clear_steps(scores: np.ndarray) -> int:
    """How many steps there are before the first close decision. Of equal scores both libraries take the first."""
    second, best = np.sort(scores.astype(np.float64), axis=1)[:, -2:].T
    close = (best > second) & (best - second < SMALLEST_LEAD)
    return int(close.argmax()) if close.any() else len(close)


def negatives(scene: Scene) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Negative prompts for the batch, and for each row alone: one for all rows, or one for each."""
    if "negative_prompt_ids" not in scene.present:
        return {}, [{}] * ROWS
    number = int(scene.rng.choice([1, ROWS]))
    prompts = [scene.rng.integers(0, VOCAB, scene.count(1, LONGEST)).tolist() for _ in range(number)]
    ids, mask = left_padded(prompts)
    rows = [{"negative_prompt_ids": torch.tensor([prompts[row % number]])} for row in range(ROWS)]
    return {"negative_prompt_ids": ids, "negative_prompt_attention_mask": mask}, rows


def compare_greedy(theirs: Any, ours: Any, scene: Scene, options: dict[str, Any]) -> None:
    """Tokens, processed scores, ends and filling of every row, up to its first close decision."""
    pad = scene.count(0, VOCAB - 1)
    batch, rows = negatives(scene)
    ids, mask = left_padded(scene.prompts)
    result = ours.generate(
        ids, mask, return_dict_in_generate=True, output_scores=True, pad_token_id=pad, **options, **batch
    )
    for row, prompt in enumerate(scene.prompts):
        said = f"{options}, row {row} of {scene.prompts}, {rows[row]}"
        expected, scores = alone(theirs, prompt, {**options, "pad_token_id": pad, **rows[row]})
        clear, new = clear_steps(scores), result.sequences[row, ids.shape[1] :]
        assert new[:clear].tolist() == expected[:clear].tolist(), said
        same = slice(0, min(clear + 1, len(scores)))
        actual = np.stack(result.scores[same])[:, row]
        np.testing.assert_allclose(actual, scores[same], atol=1e-3, rtol=1e-4, err_msg=said)
        tally["rows"] += 1
        if clear == len(scores):
            assert result.lengths[row] == len(expected), said
            assert (new[clear:] == pad).all(), said
            tally["rows to the end"] += 1
            tally[f"ended by {result.finish_reason[row]}"] += 1


sets_of_options = st.sets(st.sampled_from(NAMES), min_size=2, max_size=8)
# A failure is not made smaller: each attempt would compile, and it names its options anyway.
many = settings(deadline=None, derandomize=True, database=None, phases=[Phase.generate])


@settings(many, max_examples=GREEDY_EXAMPLES)
@given(sets_of_options, st.integers(0, 2**32))
def test_greedy_as_in_transformers(pairs, present: set[str], seed: int):
    names, rng = completed(present, beams=False), np.random.default_rng(seed)
    theirs, ours = pairs[rng.integers(2)]
    chunk = int(rng.integers(1, 6))
    for _ in range(GREEDY_DRAWS):
        scene = Scene(rng, ours, names, int(rng.integers(1, 4)) if "eos_token_id" in names else 0)
        compare_greedy(theirs.model, ours, scene, options_of(scene, chunk))
        tally.update(names)
        tally["greedy"] += 1


def compare_returned(theirs: Beams, ours: Any, prompts: list[list[int]], **options: Any) -> tuple[list[bool], int]:
    """As `compare`, but for the scores of beams that have no future.

    More candidates may meet a stop string than there are to spare; what ended then goes on at a score of -1e9, where
    floats lie 64 apart: such beams are in no particular order, and never come back.
    """
    ids, mask = left_padded(prompts)
    result = ours.generate(ids, mask, return_dict_in_generate=True, pad_token_id=0, **options)
    decided, returned = [], options["num_return_sequences"]
    for row, prompt in enumerate(prompts):
        expected, clear = theirs.generate(prompt, pad_token_id=0, **options)
        decided.append(clear)
        rows, count = slice(row * returned, (row + 1) * returned), expected.new.shape[1]
        if clear:
            new, lengths = result.sequences[rows, ids.shape[1] :], result.lengths[rows]
            assert lengths.tolist() == (expected.indices >= 0).sum(axis=1).tolist()
            inside = np.arange(count) < lengths[:, None]
            np.testing.assert_array_equal(new[:, :count][inside], expected.new[inside])
            assert (new[np.arange(new.shape[1]) >= lengths[:, None]] == 0).all()
            np.testing.assert_allclose(result.sequences_scores[rows], expected.totals, atol=1e-4, rtol=2e-6)
    return decided, result.finish_reason.count("eos")


@settings(many, max_examples=BEAM_EXAMPLES)
@given(
    sets_of_options, st.integers(2, 4), st.sampled_from([False, True, "never"]), st.integers(1, 2),
    st.integers(0, 2**32),
)  # fmt: skip
def test_beams_as_in_transformers(pairs, present: set[str], beams: int, early: Any, eos_count: int, seed: int):
    names, rng = completed(present, beams=True), np.random.default_rng(seed)
    watched, ours = pairs[rng.integers(2)]
    chunk = int(rng.integers(1, 6))
    check = compare_returned if "stop_strings" in names else compare
    for _ in range(BEAM_DRAWS):
        scene = Scene(rng, ours, names, eos_count if "eos_token_id" in names else 0)
        decided, ended = check(
            watched, ours, scene.prompts, num_beams=beams, early_stopping=early,
            length_penalty=float(rng.choice([-1.0, 0.0, 0.6, 1.0, 2.0])),
            num_return_sequences=int(rng.integers(1, beams + 1)), **options_of(scene, chunk),
        )  # fmt: skip
        tally.update(names)
        tally["beams"] += 1
        tally["searches"] += len(decided)
        tally["clear searches"] += sum(decided)
        tally["beams ended by eos"] += ended


def test_invalid_logits_as_in_transformers(pairs, tmp_path: Path):
    """One token's logit is always NaN and another's infinite, of either sign: all that is left is as in HF."""
    config = {**CASES["one_layer"].config, "vocab_size": VOCAB}
    path = write_checkpoint(tmp_path, config, seed=7)
    tensors = load_file(path / "model.safetensors")
    tensors["lm_head.weight"][3] = np.nan
    tensors["lm_head.weight"][5] = np.where(np.arange(config["hidden_size"]) == 0, np.inf, 0)
    save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="eager")
    ours, rng = AutoModelForCausalLM.from_pretrained(path, dtype="float32"), np.random.default_rng(0)
    for _ in range(4):
        scene = Scene(rng, pairs[0][1], frozenset({"repetition_penalty", "remove_invalid_values"}), eos_count=0)
        compare_greedy(theirs.eval(), ours, scene, {**options_of(scene, chunk=1), "suppress_tokens": scene.free(2)})


def test_enough_was_compared():
    if not tally["greedy"] or not tally["beams"]:
        pytest.skip("it counts what the other tests of this file did")
    assert tally["greedy"] + tally["beams"] >= 300
    assert tally["rows to the end"] > 0.95 * tally["rows"]
    assert tally["clear searches"] > 0.8 * tally["searches"]
    assert min(tally[f"ended by {reason}"] for reason in ("eos", "stop_string", "length")) > 20
    assert tally["beams ended by eos"] > 20
    assert min(tally[name] for name in NAMES if name not in OTHERWISE) >= 12, tally
