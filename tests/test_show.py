"""A result as one looks at it: texts that add up, HTML that is safe and complete, tables and summaries."""

import dataclasses
import html.parser
import math
import re
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxgen import AutoModelForCausalLM, JaxgenError, demo
from jaxgen.display import notebook
from jaxgen.display.notebook import summary
from jaxgen.display.rows import rows_of, step_logits
from jaxgen.display.table import to_pandas
from jaxgen.display.texts import Texts
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.results.output import GenerateOutput
from jaxgen.text.tokenizer import continuation, load_tokenizer

PROMPTS = ["A list of colors: red, blue", "Portugal is"]


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(demo.path())


@pytest.fixture(scope="module")
def sampled(model, tokenizer):
    """Two prompts, two samples of each, filtered, with alternatives and logits."""
    inputs = tokenizer(PROMPTS, padding=True, return_tensors="np")
    return model.generate(
        **inputs,
        do_sample=True,
        seed=4,
        temperature=1.5,
        num_return_sequences=2,
        max_new_tokens=30,
        top_logprobs=3,
        output_logits=True,
        return_dict_in_generate=True,
    )


@pytest.fixture(scope="module")
def llama_tokenizer():
    """Of Llama's kind: spaces as U+2581, the first one dropped, bytes as tokens of their own."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "▁a", "▁word", "b", "é", "\n"]
    raw = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], byte_fallback=True))
    raw.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    raw.add_special_tokens([AddedToken(word, special=True, normalized=False) for word in words[:3]])
    return PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", bos_token="<s>", eos_token="</s>")


class Spelling:
    """A tokenizer of which every token is the text that it was made with."""

    def __init__(self, *words: str):
        self.words = words

    def decode(self, ids: list[int], skip_special_tokens: bool = True) -> str:
        return "".join(self.words[token] for token in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.words[token]


def result(ids: list[list[int]], prompt: int, logprobs: Any = None, **changes: Any) -> GenerateOutput:
    """An output made by hand: the first `prompt` ids of each row are the prompt."""
    sequences = np.array(ids, np.int32)
    shape = (len(ids), sequences.shape[1] - prompt)
    table = np.zeros(shape, np.float32) if logprobs is None else np.array(logprobs, np.float32)
    fields: dict[str, Any] = {
        "sequences": sequences,
        "logprobs": table,
        "model_logprobs": table,
        "lengths": np.full(shape[0], shape[1], np.int32),
        "finish_reason": ["length"] * shape[0],
        "generation_config": GenerationConfig(),
        "seed": 1,
    }
    return GenerateOutput(**(fields | changes))


class Page(html.parser.HTMLParser):
    """What a browser reads in the HTML: each row's prompt, its tokens with what they tell, and the notes."""

    def __init__(self, text: str):
        super().__init__()
        self.prompts: list[str] = []
        self.tokens: list[list[str]] = []
        self.about: list[list[str]] = []
        self.styles: list[list[str]] = []
        self.notes: list[str] = []
        self.tags: set[str] = set()
        self._open: list[str] = []
        self.feed(text)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = {name: value or "" for name, value in attrs}
        kind = given.get("class", tag)
        self.tags.add(tag)
        self._open.append(kind)
        if kind == "jaxgen-text":
            self.tokens.append([])
            self.about.append([])
            self.styles.append([])
            self.prompts.append("")
        elif kind == "jaxgen-token":
            self.tokens[-1].append("")
            self.about[-1].append(given["data-about"])
            self.styles[-1].append(given["style"])
        elif kind == "jaxgen-note":
            self.notes.append("")
        assert set(given) <= {"class", "style", "data-about", "dir"}

    def handle_endtag(self, tag: str) -> None:
        self._open.pop()

    def handle_data(self, data: str) -> None:
        if "jaxgen-token" in self._open:
            self.tokens[-1][-1] += data
        elif "jaxgen-prompt" in self._open:
            self.prompts[-1] += data
        elif "jaxgen-note" in self._open:
            self.notes[-1] += data


# Texts.


@settings(deadline=None, derandomize=True, max_examples=200)
@given(new=st.lists(st.integers(0, 639), max_size=60))
def test_texts_of_a_byte_level_tokenizer_add_up(tokenizer, new):
    prompt = tokenizer("Où est 世")["input_ids"]
    pieces = Texts(tokenizer).pieces(prompt, new)
    assert len(pieces) == len(new)
    assert "".join(pieces) == continuation(tokenizer, prompt, new, skip_special_tokens=False)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(new=st.lists(st.one_of(st.integers(0, 264), st.integers(259, 264), st.integers(190, 230)), max_size=60))
def test_texts_of_a_llama_tokenizer_add_up(llama_tokenizer, new):
    pieces = Texts(llama_tokenizer).pieces([1, 260], new)
    assert len(pieces) == len(new)
    assert "".join(pieces) == continuation(llama_tokenizer, [1, 260], new, skip_special_tokens=False)


def test_a_character_belongs_to_the_last_of_its_tokens(llama_tokenizer, tokenizer):
    snow = [3 + byte for byte in "☃".encode()]
    texts = Texts(llama_tokenizer)
    assert texts.pieces([1, 260], [*snow, 262, 260, *snow]) == ["", "", "☃", "b", " a", "", "", "☃"]
    assert texts.pieces([1], [260, 2]) == [" a", "</s>"]
    pair = tokenizer("é", add_special_tokens=False)["input_ids"]
    assert Texts(tokenizer).pieces(tokenizer("Hi")["input_ids"], pair) == ["", "é"]


def test_names_keep_their_space_and_halves_of_characters_have_the_vocabularys_name(llama_tokenizer):
    texts = Texts(llama_tokenizer)
    assert [texts.name(token) for token in (260, 262, 2, 3 + 0xE2, 3 + ord("A"))] == [" a", "b", "</s>", "<0xE2>", "A"]
    assert Texts(None).name(7) == "7"
    assert Texts(None).pieces([1], [7, 8]) == ["7 ", "8 "]


@pytest.mark.slow
def test_rows_know_their_prompts_samples_and_seeds(model, tokenizer, sampled):
    rows = rows_of(sampled)
    assert [(row.prompt, row.sample, row.seed) for row in rows] == [(0, 0, 4), (0, 1, 4), (1, 0, 4), (1, 1, 4)]
    for row in rows:
        assert row.prompt_ids == tokenizer(PROMPTS[row.prompt])["input_ids"]
        padded = tokenizer(PROMPTS, padding=True)["input_ids"][row.prompt]
        whole = sampled.sequences[row.index].tolist()
        assert padded + row.new_ids == whole[: len(padded) + len(row.new_ids)]
        assert len(row.new_ids) == sampled.lengths[row.index]
    by_seed = model.generate(**tokenizer(["1, 2"], return_tensors="np"), seed=[7, 8], return_dict_in_generate=True)
    assert [row.seed for row in rows_of(by_seed)] == [7, 8]


# HTML.


def test_the_html_holds_the_decoded_text(tokenizer, sampled):
    page = Page(notebook.html(sampled))
    assert page.tags == {"div", "span", "style"}
    for row, prompt, tokens in zip(rows_of(sampled), page.prompts, page.tokens, strict=True):
        assert len(tokens) == len(row.new_ids)
        assert prompt == tokenizer.decode(row.prompt_ids, skip_special_tokens=False)
        assert prompt + "".join(tokens) == tokenizer.decode(row.prompt_ids + row.new_ids, skip_special_tokens=False)
    assert page.notes[0] == f"row 0 · {sampled.finish_reason[0]} · {sampled.lengths[0]} tokens · seed 4"


def test_what_a_token_tells(sampled, tokenizer):
    page, texts = Page(notebook.html(sampled)), Texts(tokenizer)
    alternatives_seen = 0
    for row, lines in zip(rows_of(sampled), page.about, strict=True):
        for step, (token, about) in enumerate(zip(row.new_ids, lines, strict=True)):
            drawn, own = (math.exp(x[row.index, step]) for x in (sampled.logprobs, sampled.model_logprobs))
            assert f"id {token}, position {len(row.prompt_ids) + step}\n" in about
            [said] = re.findall(r"^probability (\S+)$", about, re.M)
            assert number(said) == pytest.approx(drawn, rel=0.05, abs=6e-4)
            for said in re.findall(r"^model's own (\S+)$", about, re.M):
                assert number(said) == pytest.approx(own, rel=0.05, abs=6e-4)
            rest = re.findall(r"^([> ]) *(\S+) ('.*'|\".*\")$", about.split("choices:\n")[1], re.M)
            ids = sampled.top_ids[row.index, step]
            assert [name for _, _, name in rest] == [repr(texts.name(int(other))) for other in ids]
            assert [mark == ">" for mark, _, _ in rest] == (ids == token).tolist()
            for (_, said, _), logprob in zip(rest, sampled.top_logprobs[row.index, step], strict=True):
                assert number(said) == pytest.approx(math.exp(logprob), rel=0.05, abs=6e-4)
            alternatives_seen += len(rest)
    assert alternatives_seen == 3 * sampled.lengths.sum()


def number(said: str) -> float:
    return float(said[:-1]) / 100 if said.endswith("%") else float(said)


def test_the_tint_is_stronger_for_less_probable_tokens():
    out = result([[0, 0, 0, 0]], 1, [np.log([1.0, 0.5, 0.001])])
    [styles] = Page(notebook.html(out)).styles
    strengths = [float(re.fullmatch(r"background:rgba\(240,110,0,(\S+)\)", style)[1]) for style in styles]  # pyright: ignore
    np.testing.assert_allclose(strengths, [0, 0.325, 0.64935], atol=6e-4)


def test_escapes():
    words = (
        "<script>alert('x')</script>",
        '&amp;"',
        "\n",
        "\x00",
        "\ud83d",
        "\u202eabc",
        "</span></div>",
        "\ta",
        "é\r",
    )
    out = result([[1, *range(9)]], 1)
    text = notebook.html(out, Spelling(*words))
    text.encode("utf-8")  # no lone surrogates
    assert "<script" not in text and "http" not in text and "url(" not in text and "@import" not in text
    assert not re.search("[\x00-\x08\x0b-\x1f\u202e]", text)
    page = Page(text)
    assert page.tokens == [
        [
            "<script>alert('x')</script>",
            '&amp;"',
            "\n",
            "\\x00",
            "\\ud83d",
            "\\u202eabc",
            "</span></div>",
            "\ta",
            "é\\r",
        ]
    ]
    assert page.prompts == ['&amp;"']
    assert '<span class="jaxgen-line"></span>\n' in text  # marked, and the line breaks
    assert [about.splitlines()[0] for about in page.about[0]] == [repr(word) for word in words]


def test_long_results_are_folded():
    short = result([[0, 0]] * 40, 1)
    page = Page(notebook.html(short, Spelling("a")))
    assert len(page.tokens) == 32
    assert page.notes[-1] == "8 more rows (8 new tokens) not shown"
    long = result([[0] * 1501] * 3, 1)
    page = Page(notebook.html(long, Spelling("a")))
    assert [len(tokens) for tokens in page.tokens] == [1500, 500]
    assert page.notes[1].endswith("1,500 tokens · 1,000 more tokens not shown")
    assert page.notes[-1] == "1 more row (1,500 new tokens) not shown"
    prompt = result([[0] * 5001], 5000)
    page = Page(notebook.html(prompt, Spelling("ab")))
    assert page.prompts == ["… " + "ab" * 1000]
    assert page.notes[-1].endswith("the first 8,000 characters of the prompt not shown")


def test_without_a_tokenizer_ids_are_shown(reference_model, tmp_path, monkeypatch):
    out = result([[5, 6, 7]], 1)
    assert Page(notebook.html(out)).tokens == [["6 ", "7 "]]
    assert repr(out) == "GenerateOutput: 1 row\n  row 0: length, 2 tokens, '6 7 '"
    assert to_pandas(out)["text"].tolist() == [None, None]
    model = reference_model("gqa_4")  # a checkpoint without a tokenizer
    real = model.generate([[1, 2, 3]], max_new_tokens=2, eos_token_id=None, return_dict_in_generate=True)
    assert Page(notebook.html(real)).tokens == [[f"{token} " for token in real.sequences[0, 3:]]]
    with pytest.raises(JaxgenError, match="tokenizer"):
        notebook.html(real, tmp_path)


# Terminal and table.


def test_summary(model, tokenizer, sampled):
    inputs = tokenizer(PROMPTS[:1], return_tensors="np")
    greedy = model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True)
    assert repr(greedy) == "GenerateOutput: 1 row\n  row 0: length, 5 tokens, ', green,'"
    first, *lines = summary(sampled).splitlines()
    assert first == "GenerateOutput: 4 rows; seed 4; with logits, top_logprobs"
    assert [line.split(",")[0] for line in lines] == [f"  row {i}: {sampled.finish_reason[i]}" for i in range(4)]
    config = GenerationConfig(do_sample=True)
    lines = repr(result([[0, 5]] * 10, 1, seed=tuple(range(7, 17)), generation_config=config)).splitlines()
    assert (
        len(lines) == 10 and lines[-1] == "  and 2 more rows" and lines[3] == "  row 2: seed 9, length, 1 token, '5 '"
    )
    long = dataclasses.replace(result([[0] * 9000], 1), seed=None)
    assert len(repr(long)) < 200


def test_the_table(tokenizer, sampled):
    table = to_pandas(sampled)
    assert len(table) == sampled.lengths.sum()
    for row in rows_of(sampled):
        part, count = table[table["row"] == row.index], len(row.new_ids)
        assert part["token_id"].tolist() == row.new_ids
        assert set(part["prompt"]) == {row.prompt} and set(part["sample"]) == {row.sample}
        assert part["position"].tolist() == [len(row.prompt_ids) + step for step in range(count)]
        assert "".join(part["text"]) == continuation(tokenizer, row.prompt_ids, row.new_ids, skip_special_tokens=False)
        np.testing.assert_array_equal(part["logprob"], sampled.logprobs[row.index, :count])
        np.testing.assert_array_equal(part["model_logprob"], sampled.model_logprobs[row.index, :count])
        np.testing.assert_allclose(part["probability"], np.exp(part["logprob"]), rtol=1e-6)
        assert part["finish_reason"].tolist() == [None] * (count - 1) + [sampled.finish_reason[row.index]]
        order = [np.argsort(-sampled.logits[step][row.index]).tolist() for step in range(count)]
        assert part["rank"].tolist() == [o.index(token) + 1 for o, token in zip(order, row.new_ids, strict=True)]
        assert part["top_ids"].tolist() == [tuple(o[:3]) for o in order]
        assert part["top_texts"].iloc[0] == tuple(Texts(tokenizer).name(token) for token in order[0][:3])
        assert part["top_logprobs"].tolist() == list(map(tuple, sampled.top_logprobs[row.index, :count].tolist()))


def test_a_rank_outside_the_alternatives_is_missing(sampled):
    ranks, all_ranks = (to_pandas(x)["rank"] for x in (dataclasses.replace(sampled, logits=None), sampled))
    assert (all_ranks > 3).any()
    assert ranks.isna().tolist() == (all_ranks > 3).tolist()
    assert ranks.dropna().tolist() == all_ranks[all_ranks <= 3].tolist()


@pytest.mark.slow
def test_beams_have_the_logits_of_their_own_row(model, tokenizer):
    options = {"num_beams": 3, "num_return_sequences": 2, "max_new_tokens": 8, "return_dict_in_generate": True}
    out = model.generate(**tokenizer(PROMPTS, padding=True, return_tensors="np"), output_logits=True, **options)
    table = to_pandas(out)
    assert table.groupby("row")["prompt"].first().tolist() == [0, 0, 1, 1]
    for line in table.itertuples():
        logits = step_logits(out, line.row, line.step).astype(np.float64)
        logprob = logits[line.token_id] - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert logprob == pytest.approx(line.model_logprob, abs=1e-4)


def test_without_pandas_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(JaxgenError, match="pip install pandas"):
        to_pandas(result([[5, 6, 7]], 1))


def test_looking_imports_neither_pandas_nor_matplotlib():
    code = (
        "import sys, jaxgen, jaxgen.display.notebook, jaxgen.plot; "
        "heavy = {'pandas', 'matplotlib', 'transformers', 'torch'} & set(sys.modules); assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
