"""Options that do nothing: as in transformers no errors, and the logger names each once, in a call and in a file."""

import json
import logging
from typing import Any

import numpy as np
import pytest

import jaxgen
from jaxgen import GenerationConfig, JaxgenError, cli
from jaxgen.generation.options import unused
from tests.helpers import counted

IDS = [[1, 5, 9]]
GREEDY: Any = {"max_new_tokens": 3}


@pytest.fixture(scope="module")
def model():
    return jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path())


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """What the logger says from now on, as if nothing had been said before."""
    monkeypatch.setattr(unused, "_said", set())
    with caplog.at_level(logging.WARNING, logger="jaxgen"):
        yield lambda: [record.getMessage() for record in caplog.records if record.name == "jaxgen"]


@pytest.mark.parametrize(("name", "value"), [("temperature", 0.0), ("top_p", 0.0), ("top_k", -1), ("min_p", -0.5)])
def test_greedy_search_takes_what_only_sampling_cannot_use(model, said, tmp_path, name, value):
    expected = model.generate(IDS, **GREEDY)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({name: value, **GREEDY}))
    stored = GenerationConfig.from_hf(tmp_path)
    [message] = said()
    assert str(path) in message and f"{name}={value}" in message and "do_sample" in message
    for options in (
        {name: value, "do_sample": False, **GREEDY},
        {name: value, **GREEDY},
        {"generation_config": GenerationConfig(**{name: value}), **GREEDY},
        {"generation_config": stored},
    ):
        np.testing.assert_array_equal(model.generate(IDS, **options), expected)
    assert said()[1:] == [f"{name}={value} changes nothing without do_sample=True"]
    for options in ({name: value}, {"generation_config": stored}):
        with pytest.raises(JaxgenError, match=f"{name}={value} must be"):
            model.generate(IDS, do_sample=True, **options)
    path.write_text(json.dumps({name: value, "do_sample": True}))
    with pytest.raises(JaxgenError, match=rf"generation_config\.json: {name}={value} must be"):
        GenerationConfig.from_hf(tmp_path)
    json.dumps(model.generate(IDS, **{name: value}, return_dict_in_generate=True).generation_config.to_hf())


def test_a_stored_value_that_sampling_cannot_use_says_where_it_is_from():
    with pytest.raises(JaxgenError, match=r"temperature=0\.0 must be.*; the model's generation_config says so"):
        jaxgen.generation.options.config.resolve({"do_sample": True}, None, GenerationConfig(temperature=0.0))


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": 0.1},
        {"top_p": 0.5},
        {"seed": 1},
        {"length_penalty": 2.0},
        {"early_stopping": True},
    ],
)
def test_what_a_strategy_does_not_use_is_named_once(model, said, options):
    expected = model.generate(IDS, **GREEDY)
    with counted() as compilations:
        for _ in range(2):
            np.testing.assert_array_equal(model.generate(IDS, **GREEDY, **options), expected)
    assert not compilations
    [(name, value)] = options.items()
    [message] = said()
    assert message.startswith(f"{name}={value} changes nothing without ")


def test_nothing_is_said_of_what_is_used_neutral_or_not_asked_for(model, said):
    model.generate(IDS, **GREEDY, temperature=1.0, top_p=1.0, top_k=50, early_stopping=False, do_sample=False)
    model.generate(IDS, **GREEDY, temperature=0.5, do_sample=True, seed=1)
    jaxgen.generation.options.config.resolve({}, None, GenerationConfig(temperature=0.6, top_p=0.9))  # a model's own
    generator = jaxgen.pipeline("text-generation", model=model)
    generator("1, 2", do_sample=False, **GREEDY)
    assert said() == []


def test_on_the_command_line(monkeypatch, capsys):
    monkeypatch.setattr(unused, "_said", set())
    arguments = ["generate", "1, 2", "--temperature", "0.1", "--seed", "3", "--max-new-tokens", "2", "--model", "demo"]
    assert cli.main(arguments[:-2]) in (0, None)
    error = capsys.readouterr().err
    assert error.count("temperature=0.1 changes nothing without do_sample=True") == 1
    assert error.count("seed=3 changes nothing without do_sample=True") == 1


def test_what_changes_no_token_in_a_file_is_passed_over(said, tmp_path):
    path = tmp_path / "generation_config.json"
    odd = {
        "use_cache": False, "cache_implementation": "dynamic", "num_assistant_tokens_schedule": "heuristic",
        "pad_token_id": -1, "chat_format": "chatml",
    }  # fmt: skip
    nothing = {"forced_decoder_ids": None, "diversity_penalty": 0.0, "num_beam_groups": 1, "use_mtp": False}
    path.write_text(json.dumps({**odd, **nothing, "max_new_tokens": 7}))
    for _ in range(2):
        assert GenerationConfig.from_hf(tmp_path) == GenerationConfig(max_new_tokens=7)
    [message] = said()
    assert all(f"{name}={value!r}" in message for name, value in odd.items())
    assert not any(name in message for name in nothing)
    for name, value in odd.items():
        with pytest.raises(JaxgenError, match=name):
            GenerationConfig(**{name: value})


@pytest.mark.parametrize(("name", "value"), [("penalty_alpha", 0.6), ("num_beam_groups", 2), ("num_beams", 0)])
def test_what_changes_tokens_in_a_file_is_an_error_that_names_it(tmp_path, name, value):
    (tmp_path / "generation_config.json").write_text(json.dumps({name: value}))
    with pytest.raises(JaxgenError, match=rf"generation_config\.json: {name}={value}"):
        GenerationConfig.from_hf(tmp_path)
