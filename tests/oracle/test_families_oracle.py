"""Families beside Mistral against transformers on torch, live: logits, tokens, beams, files, adapters, gradients."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

import jaxgen
from jaxgen.models.families import config_from_hf, families
from jaxgen.models.rope import LongRope
from tests.families import CONFIGS, HUB, ORIGINAL_CONTEXT
from tests.oracle.beams import Watched, compare
from tests.oracle.clear import agreed
from tests.reference import live
from tests.reference.cases import Run, left_padded, with_holes

pytestmark = pytest.mark.oracle

every = pytest.mark.parametrize("name", CONFIGS)
MOE = ["qwen3_moe, some layers, tied"]
LENGTHS = (3, 30, 17)
IGNORED = ("type", "attn_factor", "max_position_embeddings")  # of rope_parameters, by transformers too
NEW = 64  # beyond the original context of 32 that the scaled ones were stretched from


def prompts() -> list[list[int]]:
    generator = np.random.default_rng(7)
    return [generator.integers(3, 97, length).tolist() for length in LENGTHS]


def torch_model(name: str, directory: Path, **sizes: int) -> Any:
    """A model of transformers with random weights, biases and norms; its checkpoint is in `directory`."""
    given = json.loads(json.dumps(CONFIGS[name] | sizes))
    config = transformers.AutoConfig.for_model(**given)
    torch.manual_seed(3)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            parameter.normal_(1.0 if "norm" in key else 0.0, 0.3 if "norm" in key or "bias" in key else 0.12)
    model.generation_config.eos_token_id = None  # rows end by length: the longest comparison
    model.save_pretrained(directory)
    # As people have it: the file that the hub holds, in the spelling of the case.
    saved = json.loads((directory / "config.json").read_text())
    spelled = {key: value for key, value in saved.items() if key not in ("rope_parameters", "layer_types")}
    (directory / "config.json").write_text(json.dumps(spelled | CONFIGS[name] | sizes))
    return transformers.AutoModelForCausalLM.from_pretrained(
        directory, dtype=torch.float32, attn_implementation="eager"
    ).eval()


def of_experts(stacked: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What transformers 5 keeps in one array per layer, under the names that files have."""
    tensors = {}
    for key, array in stacked.items():
        layer = key.partition("mlp.")[0]
        if key.endswith("mlp.gate.weight"):  # by Mixtral's names too
            tensors[f"{layer}block_sparse_moe.gate.weight"] = array
        if key.endswith("mlp.experts.down_proj"):
            names = ("mlp.experts.{}.down_proj", "block_sparse_moe.experts.{}.w2")
            tensors |= {f"{layer}{n.format(e)}.weight": one for n in names for e, one in enumerate(array)}
        if key.endswith("mlp.experts.gate_up_proj"):
            for expert, both in enumerate(array):
                for names, one in zip((("gate_proj", "w1"), ("up_proj", "w3")), np.split(both, 2), strict=True):
                    tensors[f"{layer}mlp.experts.{expert}.{names[0]}.weight"] = one
                    tensors[f"{layer}block_sparse_moe.experts.{expert}.{names[1]}.weight"] = one
    return tensors


def ours(directory: Path, **options: Any) -> Any:
    return jaxgen.AutoModelForCausalLM.from_pretrained(directory, dtype="float32", device_map="cpu", **options)


def logits_of(model: Any, ids: np.ndarray, mask: np.ndarray) -> list[np.ndarray]:
    """Each row's at its real tokens."""
    logits = np.asarray(model(ids, mask).logits)
    return [row[real == 1] for row, real in zip(logits, mask, strict=True)]


def assert_close(actual: list[np.ndarray], expected: list[np.ndarray], atol: float = 1e-4) -> None:
    for row, (one, other) in enumerate(zip(actual, expected, strict=True)):
        np.testing.assert_allclose(one, other, atol=atol, rtol=0, err_msg=f"row {row}")


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
    names = [name for name in names_of(ours) if name not in UNKNOWN or getattr(theirs, name, None) is not None]
    limited = isinstance(ours.rope_scaling, LongRope)  # to the original context
    return [name for name in names if not (limited and name == "max_position_embeddings")]


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


@pytest.mark.parametrize("name", ["llama, all biases, linear", "qwen3", "ministral3", *MOE])
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")
def test_adapters_are_those_of_peft(name: str, tmp_path: Path):
    peft = pytest.importorskip("peft", reason="compares with peft")
    theirs = torch_model(name, tmp_path / "base")
    # "all-linear" means more to peft, beside experts: their stacked arrays.
    modules = ["q_proj", "k_proj", "v_proj", "o_proj"] if name in MOE else "all-linear"
    config = peft.LoraConfig(r=3, lora_alpha=5, target_modules=modules, task_type="CAUSAL_LM")
    adapted = peft.get_peft_model(theirs, config).eval()
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "lora_" in key:
                parameter.normal_(0, 0.1)
    adapted.save_pretrained(tmp_path / "lora")
    model = ours(tmp_path / "base", adapter=tmp_path / "lora")
    assert_close(logits_of(model, *left_padded(prompts())), live.prefill_logits(adapted, prompts()), atol=2e-4)


@pytest.mark.parametrize(
    "name",
    ["llama, all biases, linear", "qwen3, biases, yarn", "ministral", "ministral3, window", "mixtral, window", *MOE],
)
def test_gradients_equal_torch(name: str, tmp_path: Path):
    theirs = torch_model(name, tmp_path)
    model, ids = ours(tmp_path), np.array(prompts()[1])[None]
    from flax import nnx

    structure, weights = nnx.split(model)
    loss, gradients = jax.value_and_grad(lambda w: nnx.merge(structure, w)(ids, labels=ids).loss)(weights)
    expected = theirs(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss
    expected.backward()
    np.testing.assert_allclose(float(loss), expected.item(), rtol=1e-5)
    found = {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(gradients)}
    torch_gradients = {key: parameter.grad.numpy() for key, parameter in theirs.named_parameters()}
    torch_gradients |= of_experts(torch_gradients)
    from jaxgen.models.tensors import parameter_parts

    for key, parts in parameter_parts(model.config).items():
        for part in parts:
            actual = part.view(np.asarray(found[key])).reshape(part.shape)
            np.testing.assert_allclose(actual, torch_gradients[part.name], atol=2e-5, rtol=2e-3, err_msg=part.name)


@pytest.mark.parametrize("name", ["llama, as Llama 3.2", "llama, all biases, linear", "qwen2", "qwen3", "ministral3"])
def test_four_bits_of_transformers(name: str, tmp_path: Path):
    """bitsandbytes' NF4, of all linear layers: biases and norms beside it stay as they are."""
    bnb = pytest.importorskip("bitsandbytes", reason="compares with bitsandbytes")
    plain = torch_model(name, tmp_path / "plain", hidden_size=64, intermediate_size=128, head_dim=32)  # blocks of 64
    quantization = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "plain", quantization_config=quantization, dtype=torch.float32, device_map="cpu"
    )
    theirs.save_pretrained(tmp_path / "nf4")
    # Its own product rounds to bfloat16 on CPU; what the weights stand for is exact.
    for module, linear in theirs.named_modules():
        if isinstance(linear, bnb.nn.Linear4bit):
            weight = bnb.functional.dequantize_4bit(linear.weight, linear.weight.quant_state)
            plain.get_submodule(module).weight = torch.nn.Parameter(weight)
    expected = live.prefill_logits(plain, prompts())
    model = ours(tmp_path / "nf4")
    assert model.model.layers[1].mlp.down_proj.weight[...].packed.dtype == np.uint8
    assert_close(logits_of(model, *left_padded(prompts())), expected, atol=2e-4)


def test_jax_sees_the_logits_of_a_batch_under_jit(tmp_path: Path):
    theirs = torch_model("qwen3", tmp_path)
    model, (ids, mask) = ours(tmp_path), left_padded(prompts())
    from flax import nnx

    logits = nnx.jit(lambda m, i, a: m(i, a).logits)(model, jnp.asarray(ids), jnp.asarray(mask))
    expected = live.prefill_logits(theirs, prompts())
    assert_close([row[real == 1] for row, real in zip(np.asarray(logits), mask, strict=True)], expected)
