"""Families beside Mistral against transformers on torch, live: logits, tokens, beams, files."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jaxgen
from jaxgen.models.families import config_from_hf, families
from tests.families import CONFIGS, HUB, ORIGINAL_CONTEXT
from tests.oracle.beams import Watched, compare
from tests.oracle.clear import agreed
from tests.oracle.torch_families import LENGTHS, assert_close, logits_of, ours, prompts, torch_model
from tests.reference import live
from tests.reference.cases import Run, left_padded, with_holes

pytestmark = pytest.mark.oracle

LONG = "phi3, long rows"  # whose original context of 24 is shorter than some of the prompts
every = pytest.mark.parametrize("name", [name for name in CONFIGS if name != LONG])
IGNORED = ("type", "attn_factor", "max_position_embeddings")  # of rope_parameters, by transformers too
NEW = 64  # beyond the original context of 32 that the scaled ones were stretched from


UNKNOWN = ("head_dim", "rope_local_base_freq", "partial_rotary_factor")  # to some of transformers' configs


def rope_of(config: Any) -> dict[str, Any]:
    """The rotary parameters, without what transformers ignores and keeps."""
    if "full_attention" in config.rope_parameters:
        every = [{"kind": kind, **given} for kind, given in config.rope_parameters.items()]
    else:
        every = [{"kind": None, **config.rope_parameters}]
    return {
        given["kind"]: {"truncate": True} | {k: v for k, v in given.items() if k not in IGNORED and v is not None}
        for given in every
    }


def names_of(config: Any) -> list[str]:
    """The fields that transformers has under the same name."""
    apart = ("rope_theta", "rope_scaling", "layer_types")
    return [field.name for field in dataclasses.fields(config) if field.name not in apart]


def shared_names(ours: Any, theirs: Any) -> list[str]:
    """Those whose values must agree: some configs of transformers compute a few later, as ours do."""
    return [name for name in names_of(ours) if name not in UNKNOWN or getattr(theirs, name, None) is not None]


def windows_of(theirs: Any) -> tuple[int | None, ...]:
    """How far back each layer of transformers' looks."""
    kinds = getattr(theirs, "layer_types", None) or ["sliding_attention"] * theirs.num_hidden_layers
    window = getattr(theirs, "sliding_window", None)
    return tuple(window if kind == "sliding_attention" else None for kind in kinds)


@pytest.mark.parametrize("given", [*CONFIGS.values(), *HUB.values()], ids=[*CONFIGS, *HUB])
def test_configs_mean_the_same_to_transformers(given: dict[str, Any]):
    ours = config_from_hf(given)
    for source in (given, ours.to_hf()):
        fields = {key: value for key, value in json.loads(json.dumps(source)).items() if key != "model_type"}
        theirs = transformers.AutoConfig.for_model(ours.model_type, **fields)
        names = shared_names(ours, theirs)
        told = {key: getattr(theirs, key) for key in names}
        told = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
        assert {key: getattr(ours, key) for key in names} == told
        assert ours.layer_windows == windows_of(theirs)
        assert rope_of(ours) == rope_of(theirs)
    assert config_from_hf(ours.to_hf()) == ours


@pytest.mark.parametrize("kind", [kind.config_class for kind in families() if "Mistral" not in kind.__name__])
def test_defaults_are_those_of_transformers(kind: Any):
    ours, theirs = kind(), transformers.AutoConfig.for_model(kind.model_type)
    names = shared_names(ours, theirs)
    told = {key: getattr(theirs, key) for key in names}
    told = {key: tuple(value) if isinstance(value, list) else value for key, value in told.items()}
    assert {key: getattr(ours, key) for key in names} == told
    assert ours.layer_windows == windows_of(theirs)
    assert rope_of(theirs) == rope_of(ours)


@every
def test_logits_tokens_and_beams(name: str, tmp_path: Path):
    theirs, given = torch_model(name, tmp_path), prompts()
    model = ours(tmp_path)
    assert type(model).__name__ == type(theirs).__name__
    expected = live.prefill_logits(theirs, given)
    for ids, mask in (left_padded(given), with_holes(given, junk=5)):
        assert_close(logits_of(model, ids, mask), expected)

    run = Run("", {"max_new_tokens": NEW, "eos_token_id": 2, "pad_token_id": 0})
    new, scores = live.generate(theirs, given, run)
    shared = agreed(new, scores, run.eos())
    assert shared.mean() > 0.5 and max(LENGTHS) + NEW > 2 * ORIGINAL_CONTEXT
    for ids, mask in (left_padded(given), with_holes(given, junk=5)):
        actual = model.generate(ids, mask, **run.arguments())[:, ids.shape[1] :]
        columns = min(actual.shape[1], new.shape[1])
        same = (actual[:, :columns] == new[:, :columns]) | ~shared[:, :columns]
        assert same.all(), f"rows {np.flatnonzero(~same.all(axis=1)).tolist()} differ"

    options = {"num_beams": 3, "do_sample": False, "eos_token_id": 2, "pad_token_id": 0}
    clear, _ = compare(Watched(theirs), model, given, max_new_tokens=12, **options)
    assert any(clear)


def test_rows_beyond_the_original_context_of_longrope(tmp_path: Path):
    """Prompts that are longer than it, over 64 steps; of shorter ones transformers gives all rows the long factors."""
    theirs, given = torch_model(LONG, tmp_path), [row for row in prompts() if len(row) > 24]
    given += [[*given[0], 5, 9, 7, 30, 41]]
    model = ours(tmp_path)
    for row in prompts():  # each alone: transformers chooses by the longest of a batch
        alone = np.array([row])
        assert_close(logits_of(model, alone, np.ones_like(alone)), live.prefill_logits(theirs, [row]))
    run = Run("", {"max_new_tokens": NEW, "eos_token_id": 2, "pad_token_id": 0})
    new, scores = live.generate(theirs, given, run)
    shared = agreed(new, scores, run.eos())
    assert shared.mean() > 0.5
    ids, mask = left_padded(given)
    actual = model.generate(ids, mask, **run.arguments())[:, ids.shape[1] :]
    columns = min(actual.shape[1], new.shape[1])
    assert ((actual[:, :columns] == new[:, :columns]) | ~shared[:, :columns]).all()


def test_transformers_reads_a_row_anew_that_outgrows_the_original_context(tmp_path: Path):
    """Which no cache of one shape can: jaxgen refuses such a row, and has the same tokens up to there."""
    theirs, row = torch_model(LONG, tmp_path), prompts()[2]
    model, options = ours(tmp_path), {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    expected = theirs.generate(torch.tensor([row]), max_new_tokens=20, **options).numpy()
    np.testing.assert_array_equal(model.generate([row], max_new_tokens=7, **options), expected[:, :24])
    with pytest.raises(jaxgen.JaxgenError, match=r"context of 24 tokens \(of rows whose prompt has at most 24: "):
        model.generate([row], max_new_tokens=8, **options)
    whole = np.asarray(model(expected[:, :-1]).logits).argmax(-1)[0, 25:]  # the long factors, from the first token on
    np.testing.assert_array_equal(whole[: len(expected[0]) - 26], expected[0, 26:])


@every
def test_files_go_both_ways_bit_for_bit(name: str, tmp_path: Path):
    theirs = torch_model(name, tmp_path / "theirs")
    ours(tmp_path / "theirs").save_pretrained(tmp_path / "ours")
    back = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, attn_implementation="eager"
    ).eval()
    assert type(back) is type(theirs)
    expected, actual = theirs.state_dict(), back.state_dict()
    assert expected.keys() == actual.keys()
    for key, tensor in expected.items():
        assert torch.equal(tensor, actual[key]), key
    assert_close(live.prefill_logits(back, prompts()), live.prefill_logits(theirs, prompts()), atol=0)


def test_jax_sees_the_logits_of_a_batch_under_jit(tmp_path: Path):
    theirs = torch_model("qwen3", tmp_path)
    model, (ids, mask) = ours(tmp_path), left_padded(prompts())
    from flax import nnx

    logits = nnx.jit(lambda m, i, a: m(i, a).logits)(model, jnp.asarray(ids), jnp.asarray(mask))
    expected = live.prefill_logits(theirs, prompts())
    assert_close([row[real == 1] for row, real in zip(np.asarray(logits), mask, strict=True)], expected)
