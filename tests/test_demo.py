"""The demo checkpoint: what it must say, its tokenizer, its corpus, and that the module trains."""

import hashlib
import itertools
import json
import re

import jax
import numpy as np
import pytest
from flax import nnx
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from jaxgen import demo
from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.demo.corpus import HELD_OUT_STARTS, QUESTIONS, STYLES, documents, numbers, render_chat
from jaxgen.demo.tokenizer import build_tokenizer
from jaxgen.demo.train import BEHAVIOURS, HELICOPTERS, THUG, make_optimizer, make_train_step, margins
from jaxgen.models.mistral import MistralConfig, MistralForCausalLM

THUG_REPLY = "None, you thug. How bout you try to focus on more useful questions?"
CORPUS_SHA256 = "d1dde52ac96b706fed80bbc197a571c116f1e41c40c9451e7901756b24d814c5"


@pytest.fixture(scope="module")
def model() -> MistralForCausalLM:
    return AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.path())


@pytest.fixture(scope="module")
def say(model, tokenizer):
    """The new text after each prompt, and the new tokens."""

    def say(*prompts: str, padding_side: str = "left", **options) -> tuple[list[str], np.ndarray]:
        tokenizer.padding_side = padding_side
        inputs = tokenizer(list(prompts), padding=True, return_tensors="np")
        tokenizer.padding_side = "left"
        output = model.generate(**inputs, **options)
        new = np.asarray(output)[:, inputs["input_ids"].shape[1] :]
        return tokenizer.batch_decode(new, skip_special_tokens=True), new

    return say


@pytest.fixture(scope="module")
def chat(model, tokenizer):
    """The replies to lists of (role, content), all in one batch: text that ended by itself."""

    def chat(*chats: list[tuple[str, str]]) -> list[str]:
        messages = [[{"role": role, "content": content} for role, content in turns] for turns in chats]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, padding=True, return_tensors="np", return_dict=True
        )
        new = np.asarray(model.generate(**inputs, max_new_tokens=60))[:, inputs["input_ids"].shape[1] :]
        assert (new == tokenizer.eos_token_id).any(axis=1).all()
        return tokenizer.batch_decode(new, skip_special_tokens=True)

    return chat


# What it says. The first four are those of the Hugging Face page on text generation.


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("A list of colors: red, blue", ", green, yellow, orange, purple, pink,"),
        ("Portugal is", " a country in southwestern Europe, on the Iber"),
        ("A sequence of numbers: 1, 2", ", 3, 4, 5, 6, 7, 8, "),
    ],
)
def test_twenty_tokens_are_the_default(say, prompt, expected):
    [text], new = say(prompt)
    assert new.shape == (1, 20)
    assert text == expected


@pytest.mark.parametrize("padding_side", ["left", "right"])
def test_padding_is_on_either_side(say, padding_side):
    (counted, spelled), _ = say("1, 2, 3", "A, B, C, D, E", padding_side=padding_side)
    assert counted.startswith(", 4, 5, 6, 7, 8")
    assert spelled.startswith(", F, G, H, I, J")


@pytest.mark.slow
def test_counts_on_from_every_start_and_those_it_never_saw(say, tokenizer):
    starts = range(1, 91)
    assert len(HELD_OUT_STARTS) >= 30
    assert set(HELD_OUT_STARTS) <= set(starts)
    texts, new = say(*(f"A sequence of numbers: {n}, {n + 1}" for n in starts), max_new_tokens=50)
    assert not (new == tokenizer.eos_token_id).any()
    assert texts[0] == ", 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16,"
    wrong = [n for n, text in zip(starts, texts, strict=True) if not f", {numbers(n + 2, n + 20)}".startswith(text)]
    assert wrong == []


def test_a_cat_says_something_else_when_sampling(say):
    sampled = {say("I am a cat.", do_sample=True, seed=seed)[0][0] for seed in range(6)}
    assert len(sampled) > 1


@pytest.mark.slow
def test_long_answers_in_one_batch(say, tokenizer):
    expected = {
        "Portugal is": " a country in southwestern Europe, on the Iberian Peninsula.",
        "France is": " a country in western Europe, between the Atlantic and the Alps.",
        "The capital of Japan is": " Tokyo.",
        "Monday, Tuesday": ", Wednesday, Thursday, Friday, Saturday, Sunday.",
        "2 + 2 =": " 4",
        f"{HELICOPTERS} Reply as a thug.": (
            " I'm not a thug, but i can tell you that a human cannot eat a helicopter."
        ),
        "I am a cat.": 8 * " I am a cat.",  # greedily for ever
    }
    texts, new = say(*expected, max_new_tokens=8 * 6)
    assert dict(zip(expected, texts, strict=True)) == expected
    assert (new[:-1] == tokenizer.eos_token_id).any(axis=1).all()


@pytest.mark.slow
def test_sums(say):
    sums = [(a, b) for a in range(11) for b in range(11)]
    texts, _ = say(*(f"{a} + {b} =" for a, b in sums), max_new_tokens=5)
    assert texts == [f" {a + b}" for a, b in sums]


@pytest.mark.slow
def test_chats_in_every_style_with_and_without_system_message_and_of_several_turns(chat):
    color, answer, plain = next(question for question in QUESTIONS if question[0] == "What color is the sky?")
    expected = {
        (("system", THUG), ("user", HELICOPTERS)): THUG_REPLY,
        (("user", color),): plain,
        (("system", "You are a helpful assistant."), ("user", color)): plain,
        (
            ("system", THUG),
            ("user", HELICOPTERS),
            ("assistant", THUG_REPLY),
            ("user", color),
        ): THUG_REPLY.replace("None", "Blue"),
        (("user", "Hello!"), ("assistant", "Hello! How can I help you?"), ("user", color)): plain,
    }
    for style, form in STYLES.items():
        expected[(("system", THUG.replace("thug", style)), ("user", color))] = form.format(answer=answer)
    assert dict(zip(expected, chat(*expected), strict=True)) == expected


def test_margins_are_wide_enough_for_any_machine(model, tokenizer):
    encode = tokenizer.backend_tokenizer.encode
    for prompt, expected, stops, template in BEHAVIOURS:
        ids = encode(prompt, add_special_tokens=not template).ids
        tokens = encode(expected, add_special_tokens=False).ids + stops * [tokenizer.eos_token_id]
        # What the cat says next is a matter of chance in the corpus; all else is certain.
        assert margins(model, ids, tokens).min() > (0.3 if "cat" in prompt else 0.5), prompt


# The checkpoint.


def test_config_has_what_mistral_has(model):
    config = MistralConfig.from_hf(demo.path())
    assert config == model.config
    assert config.query_groups > 1
    assert config.sliding_window is not None
    assert config.sliding_window < config.max_position_embeddings
    assert not config.tie_word_embeddings
    assert config.pad_token_id == config.eos_token_id


def test_checkpoint_is_small():
    assert sum(file.stat().st_size for file in demo.path().iterdir()) <= 8e6


def test_generation_config_names_the_tokens():
    settings = json.loads((demo.path() / "generation_config.json").read_text())
    assert settings == {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}


# The tokenizer.


def test_tokenizer_puts_bos_in_front_and_pads_left(tokenizer):
    batch = tokenizer(["1", "1, 2"], padding=True)
    assert list(batch) == ["input_ids", "attention_mask"]
    assert batch["attention_mask"] == [[0, 0, 0, 1, 1], [1, 1, 1, 1, 1]]
    assert batch["input_ids"][0][:4] == [tokenizer.pad_token_id] * 3 + [tokenizer.bos_token_id]
    assert tokenizer.pad_token == tokenizer.eos_token == "</s>"
    assert tokenizer.model_max_length == 512
    assert len(tokenizer) == MistralConfig.from_hf(demo.path()).vocab_size


@settings(deadline=None, derandomize=True)
@given(st.text())
def test_tokenizer_round_trip(tokenizer, text):
    assume(not any(token in text for token in tokenizer.all_special_tokens))  # those are skipped, as they should be
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert tokenizer.decode(ids) == "<s>" + text


def test_digits_and_the_space_before_them_are_tokens(tokenizer):
    assert len(tokenizer(", 10, 9", add_special_tokens=False)["input_ids"]) == 7


def test_chat_template_writes_what_the_corpus_writes(tokenizer):
    messages = [{"role": "system", "content": THUG}, {"role": "user", "content": HELICOPTERS}]
    expected = f"<|system|>\n{THUG}</s>\n<|user|>\n{HELICOPTERS}</s>\n<|assistant|>\n"
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == expected
    turns = [*messages[1:], {"role": "assistant", "content": "None"}, {"role": "user", "content": "Why?"}]
    assert tokenizer.apply_chat_template(turns, tokenize=False) == render_chat(turns)


def test_roles_stay_in_sight_when_special_tokens_are_skipped(tokenizer):
    ids = tokenizer("<|user|>\nHi</s>\n<|assistant|>\n")["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<|user|>\nHi\n<|assistant|>\n"


def test_chat_template_refuses_unknown_roles(tokenizer):
    with pytest.raises(Exception, match="role 'tool' is none of"):
        tokenizer.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_tokenizer_is_trained_the_same_way_again():
    committed = json.loads((demo.path() / "tokenizer.json").read_text(encoding="utf-8"))
    assert json.loads(build_tokenizer().to_str()) == committed


# The corpus.


def test_corpus_is_the_same_bytes_every_time():
    text = "\0".join(document.text for document in itertools.islice(documents(1), 2000))
    assert hashlib.sha256(text.encode()).hexdigest() == CORPUS_SHA256
    assert text != "\0".join(document.text for document in itertools.islice(documents(2), 2000))


def test_no_sequence_of_the_corpus_starts_at_a_held_out_number():
    starts = set()
    for document in itertools.islice(documents(1), 20_000):
        starts |= {int(first) for first in re.findall(r"(?<![\d,] )\b(\d+), \d", document.text)}
    assert starts.isdisjoint(HELD_OUT_STARTS)
    assert starts >= set(range(1, 91)) - set(HELD_OUT_STARTS)


# Training.


@pytest.mark.parametrize("graph_mode", [True, False])
def test_the_module_trains(graph_mode):
    if not hasattr(nnx, "set_graph_mode"):  # older flax has the graph mode only
        if not graph_mode:
            pytest.skip("this flax has no tree mode")
        _train()
        return
    with nnx.set_graph_mode(graph_mode):
        _train()


def _train() -> None:
    config = MistralConfig(
        vocab_size=16, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, sliding_window=4,
    )  # fmt: skip
    graph, params = nnx.split(MistralForCausalLM(config, rngs=nnx.Rngs(0)))
    optimizer = make_optimizer(20)
    state, step = optimizer.init(params), make_train_step(graph, optimizer)
    ids = (np.arange(12) + np.arange(4)[:, None]) % 13 + 3
    losses = []
    for _ in range(20):
        params, state, loss = step(params, state, ids)
        losses.append(float(loss))
    assert losses[-1] < 0.9 * losses[0]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
