"""Plots: what is drawn are the numbers that a plain computation gives."""

import sys
from typing import Any

import jax.numpy as jnp
import matplotlib as mpl
import numpy as np
import pytest

mpl.use("Agg")

import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb, to_rgba

from jaxgen import AutoModelForCausalLM, JaxgenError, UnsupportedError, demo, plot
from jaxgen.display.axes import label_of, name_tokens
from jaxgen.display.measures import entropy_of
from jaxgen.display.rows import rows_of
from jaxgen.display.texts import Texts
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.results.output import GenerateOutput
from jaxgen.text.tokenizer import load_tokenizer

PROMPTS = ["A list of colors: red, blue", "Portugal is"]
SAMPLE: dict[str, Any] = {"do_sample": True, "temperature": 1.6, "max_new_tokens": 20, "return_dict_in_generate": True}


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")


@pytest.fixture(scope="module")
def int4():
    return AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32", load_in_4bit=True)


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(demo.path())


@pytest.fixture(scope="module")
def sampled(model, tokenizer):
    return model.generate(**tokenizer(PROMPTS, padding=True, return_tensors="np"), seed=5, output_logits=True, **SAMPLE)


@pytest.fixture(autouse=True)
def _draw_and_close():
    """Everything is really drawn: what matplotlib finds fault with then fails the test."""
    yield
    for number in plt.get_fignums():
        plt.figure(number).canvas.draw()
    plt.close("all")


def softmax(logits: Any) -> np.ndarray:
    shifted = np.exp(np.float64(logits) - np.max(logits, axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)


def labels(ax: Any) -> list[str]:
    return [label.get_text() for label in ax.get_xticklabels()]


@pytest.mark.slow
def test_token_probabilities(sampled, tokenizer):
    ax = plot.token_probabilities(sampled, row=1)
    count = sampled.lengths[1]
    np.testing.assert_allclose([bar.get_height() for bar in ax.patches], np.exp(sampled.logprobs[1, :count]), rtol=1e-6)
    [own] = ax.lines
    np.testing.assert_allclose(own.get_ydata(), np.exp(sampled.model_logprobs[1, :count]), rtol=1e-6)
    row = rows_of(sampled)[1]
    pieces = Texts(tokenizer).pieces(row.prompt_ids, row.new_ids)
    assert labels(ax) == [piece.replace(" ", "␣").replace("\n", "↵") for piece in pieces]


def test_greedy_has_no_second_mark_and_long_rows_have_fewer_names():
    table = np.log(np.linspace(0.1, 1, 170, dtype=np.float32))[None]
    out = GenerateOutput(
        sequences=np.arange(171, dtype=np.int32)[None],
        logprobs=table,
        model_logprobs=table,
        lengths=np.array([170], np.int32),
        finish_reason=["length"],
        generation_config=GenerationConfig(),
        seed=None,
    )
    ax = plot.token_probabilities(out)
    assert len(ax.patches) == 170 and len(ax.lines) == 0
    assert labels(ax) == [f"{token}␣" for token in range(1, 171, 3)]
    ax = plot.seeds(out)
    # 9 columns of 3 characters and 30 of 4 make 147; the next one would pass 150.
    assert ax.get_xlabel() == "the first 39 tokens; the longest row has 131 more"
    with pytest.raises(JaxgenError, match="output_logits=True"):
        plot.entropy(out)


def test_entropy_of_kept_logits(sampled):
    ax = plot.entropy(sampled, row=0)
    count = sampled.lengths[0]
    p = softmax(np.stack([step[0] for step in sampled.logits[:count]]))
    entropy, surprisal = ax.lines
    np.testing.assert_allclose(entropy.get_ydata(), -(p * np.log(p)).sum(axis=1), atol=1e-5)
    np.testing.assert_allclose(surprisal.get_ydata(), -sampled.model_logprobs[0, :count], atol=1e-6)
    assert ax.get_ylabel() == "nats"


@pytest.mark.slow
def test_entropy_of_a_row_that_is_read_again(model, tokenizer, sampled):
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="np")
    again = model.generate(**inputs, seed=5, **SAMPLE)
    np.testing.assert_array_equal(again.sequences, sampled.sequences)
    for row in (0, 1):  # the second one has padding in front
        kept, read = (plot.entropy(out, row).lines[0].get_ydata() for out in (sampled, again))
        np.testing.assert_allclose(read, kept, atol=1e-4)


def test_entropy_of_impossible_tokens_is_finite():
    assert float(entropy_of(jnp.array([[0.0, 0.0, -np.inf]]))[0]) == pytest.approx(np.log(2))


@pytest.mark.slow
def test_distribution_under_options():
    p = np.array([0.05, 0.4, 0.1, 0.3, 0.15])
    settings = {"own": {}, "cold": {"temperature": 0.5}, "p": {"top_p": 0.7}, "k": {"top_k": 3}}
    ax = plot.distribution(np.log(p) + 3, settings, top=3)
    expected = {
        "own": [0.4, 0.3, 0.15, 0.15],
        "cold": [0.16 / 0.285, 0.09 / 0.285, 0.0225 / 0.285, 0.0125 / 0.285],
        "p": [0.4 / 0.7, 0.3 / 0.7, 0, 0],
        "k": [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0],
    }
    drawn = {bars.get_label(): [bar.get_height() for bar in bars] for bars in ax.containers}
    assert drawn.keys() == expected.keys()
    for label, heights in expected.items():
        np.testing.assert_allclose(drawn[label], heights, atol=1e-6)
    assert labels(ax) == ["1", "3", "4", "all others"]


def test_distribution_names_tokens(sampled, tokenizer):
    ax = plot.distribution(sampled.logits[0][0], {"own": {}}, tokenizer, top=2)
    best = np.argsort(-sampled.logits[0][0])[:2]
    assert labels(ax) == [*(tokenizer.decode([token]).replace(" ", "␣") for token in best), "all others"]


def test_seeds_part_where_they_differ(model, tokenizer):
    inputs = tokenizer(PROMPTS[1:], return_tensors="np")
    outs = [model.generate(**inputs, seed=seed, **SAMPLE) for seed in (0, 1, 2, 4)]
    ax = plot.seeds(outs)
    assert [label.get_text() for label in ax.get_yticklabels()] == ["seed 0", "seed 1", "seed 2", "seed 4"]
    ids = [rows_of(out)[0].new_ids for out in outs]
    [mesh] = ax.collections
    shares = np.ma.filled(mesh.get_array().reshape(4, -1), np.nan)
    edges = mesh.get_coordinates()[0, :, 0]
    for out, drawn in zip(outs, shares, strict=True):
        expected = np.full(shares.shape[1], np.nan)
        expected[: out.lengths[0]] = np.exp(out.logprobs[0])
        np.testing.assert_allclose(drawn, expected, rtol=1e-6)
    parts = {int(line.get_ydata()[0]): float(line.get_xdata()[0]) for line in ax.lines}
    expected = {
        row: edges[next(i for i, (a, b) in enumerate(zip(new, ids[0], strict=False)) if a != b)]
        for row, new in enumerate(ids)
        if new != ids[0]
    }
    assert parts == expected and len(expected) > 1
    texts = {(text.get_position(), text.get_text(), text.get_alpha()) for text in ax.texts}
    assert len(ax.texts) == len(texts) == sum(map(len, ids))
    pale = {(int(y), x) for (x, y), _, alpha in texts if alpha < 1}
    assert all(y > 0 and x < parts.get(y, np.inf) for y, x in pale) and pale


def test_seeds_takes_rows_and_names(model, tokenizer, sampled):
    inputs = tokenizer(PROMPTS[1:], return_tensors="np")
    rows = model.generate(**inputs, seed=[3, 4], **SAMPLE)
    named = {
        "seeds": (rows, ["seed 3", "seed 4"]),
        "rows": (sampled, ["row 0", "row 1"]),
        "both": ([sampled, sampled], ["seed 5, row 0", "seed 5, row 1"] * 2),
        "names": ({"hot": sampled, "cold": sampled}, ["hot, row 0", "hot, row 1", "cold, row 0", "cold, row 1"]),
    }
    for outputs, expected in named.values():
        assert [label.get_text() for label in plot.seeds(outputs).get_yticklabels()] == expected
    assert plot.seeds(sampled).lines[:] == []  # other prompts do not part


def test_kl_of_a_model_with_itself_is_zero(model):
    np.testing.assert_array_equal(plot.kl(model, model, PROMPTS[0]).lines[0].get_ydata(), 0)


@pytest.mark.slow
def test_kl_of_int4(model, int4, tokenizer):
    """Of texts that are read in several blocks."""
    texts = [", ".join(map(str, range(first, 59))) for first in (1, 5)]
    ax = plot.kl(model, int4, texts)
    rows = tokenizer(texts, padding=True, padding_side="right", return_tensors="np")
    ours, theirs = (softmax(one(**rows).logits) for one in (model, int4))
    for line, p, q, real in zip(ax.lines, ours, theirs, rows["attention_mask"], strict=True):
        count = real.sum() - 1
        assert 192 < count < 256
        np.testing.assert_allclose(line.get_ydata(), (p * np.log(p / q)).sum(axis=1)[:count], atol=2e-6)
        np.testing.assert_array_equal(line.get_xdata(), np.arange(1, count + 1))
        assert line.get_ydata().max() > 1e-4
    ids = tokenizer(texts[1])["input_ids"]
    names = Texts(tokenizer).pieces(ids[:1], ids[1:])
    assert labels(plot.kl(model, int4, texts[1])) == [name.replace(" ", "␣") for name in names[::3]]


def test_an_axes_is_used_and_returned(sampled, model):
    _, axes = plt.subplots(5)
    assert plot.token_probabilities(sampled, ax=axes[0]) is axes[0]
    assert plot.entropy(sampled, ax=axes[1]) is axes[1]
    assert plot.distribution(sampled.logits[0][0], {"own": {}}, ax=axes[2]) is axes[2]
    assert plot.seeds(sampled, ax=axes[3]) is axes[3]
    assert plot.kl(model, model, PROMPTS[0], ax=axes[4]) is axes[4]
    assert len(plt.get_fignums()) == 1


def test_figures_can_be_read_on_any_page(sampled, tokenizer):
    """No background, and grey that stands out from white and from black; a style of the user's own stays."""

    def luminance(colour) -> float:
        red, green, blue = (x / 12.92 if x <= 0.04 else ((x + 0.055) / 1.055) ** 2.4 for x in to_rgb(colour))
        return 0.2126 * red + 0.7152 * green + 0.0722 * blue

    ax = plot.token_probabilities(sampled, tokenizer=tokenizer)
    assert to_rgba(ax.figure.get_facecolor())[3] == to_rgba(ax.get_facecolor())[3] == 0
    for text in (ax.xaxis.label, *ax.get_xticklabels(), *ax.get_yticklabels(), *ax.get_legend().get_texts()):
        assert 1.05 / (luminance(text.get_color()) + 0.05) > 4, text
        assert (luminance(text.get_color()) + 0.05) / 0.05 > 4, text
    plt.close("all")
    with plt.style.context("dark_background"):
        ax = plot.token_probabilities(sampled, tokenizer=tokenizer)
        assert to_rgb(ax.figure.get_facecolor()) == (0, 0, 0)
    plt.close("all")


def test_dollars_and_controls_are_no_mathematics():
    _, ax = plt.subplots()
    name_tokens(ax, range(3), [label_of(text) for text in ("$x_", "a$\n", "\x00 b")])
    assert labels(ax) == ["$x_", "a$↵", "\\x00␣b"]


def test_bad_input(sampled, model, reference_model, monkeypatch):
    with pytest.raises(JaxgenError, match="row=2 must be an int from 0 to 1"):
        plot.token_probabilities(sampled, 2)
    with pytest.raises(UnsupportedError, match="'repetition_penalty' is none of temperature"):
        plot.distribution([0.0, 1.0], {"own": {"repetition_penalty": 2.0}})
    with pytest.raises(JaxgenError, match="top_p"):
        plot.distribution([0.0, 1.0], {"own": {"top_p": 2.0}})
    for logits in ([[0.0, 1.0]], [], [np.nan, 1.0]):
        with pytest.raises(JaxgenError, match="one distribution"):
            plot.distribution(logits, {"own": {}})
    for wrong in ({}, [1], {"own": 1}):
        with pytest.raises(JaxgenError, match="settings"):
            plot.distribution([0.0, 1.0], wrong)
    with pytest.raises(JaxgenError, match="top=0"):
        plot.distribution([0.0, 1.0], {"own": {}}, top=0)
    with pytest.raises(JaxgenError, match="no outputs"):
        plot.seeds([])
    with pytest.raises(JaxgenError, match=r"texts\[1\] has 1 tokens"):
        plot.kl(model, model, [PROMPTS[0], ""])
    with pytest.raises(JaxgenError, match="no texts"):
        plot.kl(model, model, [])
    with pytest.raises(JaxgenError, match="vocabularies of"):
        plot.kl(model, reference_model("gqa_4"), PROMPTS)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(JaxgenError, match="pip install matplotlib"):
        plot.token_probabilities(sampled)
