"""The table of options: a class and a row are all that a new filter takes, and what the table says is true."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

import jaxgen
from jaxgen import GenerationConfig, JaxgenError, plot
from jaxgen.arguments import parser, settings_of
from jaxgen.generation.options import support, unused
from jaxgen.generation.options.checks import number
from jaxgen.generation.options.table import ARGUMENTS, OPTIONS, Option
from jaxgen.generation.processors.chain import chain_of
from jaxgen.generation.processors.filters import Temperature, remove
from jaxgen.generation.processors.processor import Filter, Logits, Number
from jaxgen.generation.prompts.rows import Rows
from tests.helpers import counted

IDS = [[1, 5, 9]]


class TypicalP2(Filter):
    """Remove tokens less likely than `share` times the most likely one."""

    share: Number

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        return remove(logits, logits - logits.max(axis=1, keepdims=True) < jnp.log(self.share))


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> str:
    """An option that transformers does not have, by a class and a row."""
    option = Option("Sampling", number("(0, 1]"), "tokens at least so likely", TypicalP2, off=1.0)
    monkeypatch.setitem(OPTIONS, "typical_p2", option)
    return "typical_p2"


def test_a_new_filter_is_a_class_and_a_row(row: str):
    model: Any = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path())  # who knows of the new option
    options: Any = {"max_new_tokens": 6, "do_sample": True, "seed": 3, "temperature": 5.0}
    drawn = model.generate(IDS, **options, typical_p2=1e-6)
    greedy = model.generate(IDS, max_new_tokens=6)
    with counted() as compilations:
        only_the_best = model.generate(IDS, **options, typical_p2=0.999)
    assert not compilations  # another number
    np.testing.assert_array_equal(only_the_best, greedy)
    assert (drawn != greedy).any()


def test_it_is_checked_stored_and_read_as_any_other(row: str, tmp_path):
    config = GenerationConfig(typical_p2=0.5, do_sample=True)
    assert GenerationConfig.from_hf(config.to_hf()).to_hf() == {"typical_p2": 0.5, "do_sample": True}
    with pytest.raises(JaxgenError, match=r"typical_p2=2 must be a number in \(0, 1\]"):
        config.typical_p2 = 2
    with pytest.raises(JaxgenError, match=r"'ypical_p2' is not a generation option; did you mean 'typical_p2'"):
        GenerationConfig(ypical_p2=0.5)
    config.typical_p2 = 1  # off
    assert not any(isinstance(entry, TypicalP2) for entry in chain_of(config, 4))


def test_greedy_search_says_that_it_is_unused(row: str, monkeypatch, caplog):
    monkeypatch.setattr(unused, "_said", set())
    config = jaxgen.generation.options.config.resolve({"typical_p2": 7.0}, None, GenerationConfig())
    assert chain_of(config, 4) == ()
    assert caplog.messages == ["typical_p2=7.0 changes nothing without do_sample=True"]


def test_the_documentation_the_command_line_and_plots_have_it(row: str):
    assert "| `typical_p2` | supported: tokens at least so likely |" in support.table()
    arguments = parser().parse_args(["generate", "1", "--set", "typical_p2=0.5"])
    assert settings_of(arguments)["typical_p2"] == 0.5
    [bars] = plot.distribution(np.log([0.6, 0.3, 0.1]), {"cut": {"typical_p2": 0.4}}, top=3).containers
    np.testing.assert_allclose([bar.get_height() for bar in bars], [2 / 3, 1 / 3, 0, 0], atol=1e-6)


@pytest.mark.parametrize("name", [name for name, option in OPTIONS.items() if option.off is not None])
def test_what_is_called_off_is_off(name: str):
    """In both senses: no processor, and nothing said of it."""
    option = OPTIONS[name]
    fields = {"do_sample": True, "top_k": None, "temperature": None, "eos_token_id": 2, name: option.off}
    chain = chain_of(GenerationConfig(**fields), 4)
    always = option.processor is not None and option.processor.always
    assert [type(entry) for entry in chain] == ([option.processor] if always else [])


def test_arguments_stand_where_transformers_has_them():
    """A constraint before what is forced, the user's processors before the temperature."""
    config = GenerationConfig(suppress_tokens=[0], forced_eos_token_id=1, do_sample=True, temperature=2.0)
    user = {"user": [lambda tokens, lengths, logits: logits], "prefix_allowed_tokens_fn": lambda row, ids: [0]}
    names = [type(entry).__name__ for entry in chain_of(config, 4, **user)]
    assert names == ["AllowedPrefixes", "ForcedEos", "SuppressTokens", "UserProcessors", "Temperature"]
    assert {option.before for option in ARGUMENTS.values() if option.processor} <= OPTIONS.keys()


def test_a_processor_is_a_pytree_of_its_numbers():
    """Its settings are part of the compiled program, its numbers are not."""
    import jax

    entry = Temperature(np.array(2.0, np.float32))
    [(path, leaf)], tree = jax.tree_util.tree_flatten_with_path(entry)
    assert (jax.tree_util.keystr(path), leaf) == (".value", 2.0)
    assert jax.tree.structure(Temperature(np.array(1.0, np.float32))) == tree
    config = {"do_sample": True, "temperature": None}
    few, many = (chain_of(GenerationConfig(**config, top_k=k), 4)[0] for k in (10, 200))
    assert jax.tree.structure(few) != jax.tree.structure(many)


def test_an_option_that_is_switched_off_is_one_that_does_nothing():
    """What the rest of the library asks: None, and the number at which an option does nothing, are the same."""
    for off in (GenerationConfig(), GenerationConfig(num_beams=1, num_return_sequences=1, guidance_scale=1.0)):
        assert (off.beams, off.sequences_per_prompt, off.is_guided) == (1, 1, False)
    on = GenerationConfig(num_beams=4, num_return_sequences=2, guidance_scale=1.5)
    assert (on.beams, on.sequences_per_prompt, on.is_guided) == (4, 2, True)
