"""LoRA adapters that peft writes, against peft on torch: the same logits, or a refusal."""

import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
import torch
import transformers

from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from jaxgen.quant import Lookup4
from jaxgen.quant.adapted import Adapted
from tests.hf_files import CONFIG, hf_tensors, write_hf
from tests.lora_files import FUSED, LINEAR, linear, load, use_quarters, write_quarters

peft = pytest.importorskip("peft", reason="compares with peft")

pytestmark = [
    pytest.mark.oracle,
    # peft warns of what it is made to do here, and calls old names of transformers.
    pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning"),
]

IDS = np.array([[1, 5, 9, 2, 7, 10, 3]])
VARIANTS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "defaults": {"r": 8, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"]},
    "regex": {"target_modules": r"model\.layers\.\d\.(self_attn\.[qo]|mlp\.down)_proj"},
    "rslora": {"use_rslora": True},
    "patterns": {
        "rank_pattern": {"layers.0.self_attn.q_proj": 5, "self_attn.q_proj": 1, "^model.layers.1.mlp.*": 2},
        "alpha_pattern": {"mlp.(up|down)_proj": 1, "model.layers.*": 9},
    },
    "rslora with patterns": {"use_rslora": True, "rank_pattern": {"q_proj": 1}, "alpha_pattern": {"[kv]_proj": 40}},
    "layers": {"layers_to_transform": [1]},
    "layers of a pattern": {"layers_to_transform": 0, "layers_pattern": "layers"},
    "excluded": {"target_modules": "all-linear", "exclude_modules": ["k_proj", "layers.0.mlp.up_proj"]},
    "excluded by regex": {"exclude_modules": r".*layers\.0\..*"},
    "dropout": {"lora_dropout": 0.5, "init_lora_weights": "gaussian"},
    "orthogonal": {"init_lora_weights": "orthogonal", "r": 4},
    "mica": {"init_lora_weights": "mica"},
    "fan_in_fan_out": {"fan_in_fan_out": True},
}


def write(directory: Path, base: Path, config: Any, torch_dtype: Any = torch.float32, **saving: Any) -> Any:
    """A model of peft with random factors, in evaluation mode; its adapter is in `directory`."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch_dtype)
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_" in name:
                parameter.normal_()
    adapted.save_pretrained(directory, **saving)
    return adapted


def torch_logits(model: Any) -> np.ndarray:
    with torch.no_grad():
        return model(torch.from_numpy(IDS)).logits.float().numpy()


def lora(**fields: Any) -> Any:
    return peft.LoraConfig(
        **{"r": 3, "lora_alpha": 2, "target_modules": list(LINEAR), "task_type": "CAUSAL_LM"} | fields
    )


@pytest.mark.parametrize("kept", [False, True], ids=["merged", "beside"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_are_those_of_peft(tmp_path, monkeypatch, variant, kept):
    write_quarters(tmp_path / "base")
    theirs = write(tmp_path / "lora", tmp_path / "base", lora(**VARIANTS[variant]))
    if kept:
        use_quarters(monkeypatch)
    ours = load(tmp_path / "base", adapter=tmp_path / "lora", dtype="float32")
    assert isinstance(linear(ours, "self_attn.qkv_proj"), Adapted) == (kept and variant != "layers of a pattern")
    expected = torch_logits(theirs)
    np.testing.assert_allclose(ours(jnp.asarray(IDS)).logits, expected, atol=1e-4, rtol=0)
    with theirs.disable_adapter():
        assert abs(torch_logits(theirs) - expected).max() > 0.1


def test_the_head_can_be_adapted(tmp_path):
    write_hf(tmp_path / "base", CONFIG, hf_tensors(CONFIG))
    theirs = write(tmp_path / "lora", tmp_path / "base", lora(target_modules=["lm_head"]), save_embedding_layers=False)
    ours = load(tmp_path / "base", adapter=tmp_path / "lora", dtype="float32")
    np.testing.assert_allclose(ours(jnp.asarray(IDS)).logits, torch_logits(theirs), atol=1e-4, rtol=0)


@pytest.mark.parametrize("code", ["F32", "BF16"])
@pytest.mark.parametrize("saved", [torch.float32, torch.bfloat16])
def test_an_adapted_head_is_saved_with_a_copy_of_the_base(tmp_path, code, saved):
    write_hf(tmp_path / "base", CONFIG, hf_tensors(CONFIG, code))
    config = lora(target_modules=["lm_head", "q_proj"])
    theirs = write(tmp_path / "lora", tmp_path / "base", config, torch_dtype=saved)
    assert "base_model.model.lm_head.base_layer.weight" in safetensors.numpy.load_file(
        tmp_path / "lora" / "adapter_model.safetensors"
    )
    ours = load(tmp_path / "base", adapter=tmp_path / "lora", dtype="float32")
    atol = 1e-4 if saved == torch.float32 else 0.6  # bfloat16 of numbers up to 24
    np.testing.assert_allclose(ours(jnp.asarray(IDS)).logits, torch_logits(theirs), atol=atol, rtol=0)
    with torch.no_grad():
        theirs.base_model.model.lm_head.base_layer.weight[3, 4] *= 1.5
    theirs.save_pretrained(tmp_path / "lora")
    with pytest.raises(CheckpointError, match=r"lm_head\.base_layer\.weight' differs from the base's 'lm_head.weight'"):
        load(tmp_path / "base", adapter=tmp_path / "lora")


# Fields, and what tensors: lost, added or changed, one or two at a time.
DAMAGE: dict[str, dict[str, Any]] = {
    "layers_to_transform lost": {"layers_to_transform": None, "layers_pattern": "layers"},
    "layers of a regex": {"target_modules": r".*\.[qv]_proj", "layers_to_transform": [1]},
    "layers of all-linear": {"target_modules": "all-linear", "layers_to_transform": [1]},
    "pattern of a regex": {"target_modules": r".*\.[qv]_proj", "layers_pattern": "layers"},
    "no layer of a regex": {"target_modules": r".*\.[qv]_proj", "layers_to_transform": []},
    "head and layers": {"target_modules": ["q_proj", "lm_head"], "layers_to_transform": [1]},
    "a whole name and layers": {
        "target_modules": ["model.layers.0.mlp.up_proj", "q_proj"], "layers_to_transform": [1],
    },
    "a layer that is not there": {"layers_to_transform": [1, 7]},
    "a name that is not there": {"target_modules": ["q_proj", "nothing"]},
    "an excluded whole name": {"target_modules": ["lm_head", "q_proj"], "exclude_modules": ["lm_head"]},
    "patterns of nothing": {"rank_pattern": {"nothing": 1}, "alpha_pattern": {"nothing": 5}},
}  # fmt: skip
LOST = ("r", "lora_alpha", "use_rslora", "rank_pattern", "alpha_pattern", "bias", "layers_to_transform", "peft_type")


def peft_loads(base: Path, adapter: Path) -> np.ndarray | None:
    """peft's logits; None where it complains: raises, or warns that tensors are missing."""
    model = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            loaded = peft.PeftModel.from_pretrained(model, adapter)
        except Exception:
            return None
    return None if any("missing adapter keys" in str(warning.message) for warning in caught) else torch_logits(loaded)


def check_against_peft(base: Path, adapter: Path) -> bool:
    """Whether jaxgen loads the adapter; then peft does, without a complaint, and has the same logits."""
    try:
        ours = load(base, adapter=adapter, dtype="float32")
    except JaxgenError:
        return False
    expected = peft_loads(base, adapter)
    assert expected is not None, "peft complains"
    np.testing.assert_allclose(ours(jnp.asarray(IDS)).logits, expected, atol=1e-4, rtol=0)
    return True


def test_no_adapter_is_accepted_of_which_peft_complains(tmp_path):
    write_hf(tmp_path / "base", CONFIG, hf_tensors(CONFIG))
    config = lora(target_modules=[*LINEAR, "lm_head"], rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 7})
    write(tmp_path / "lora", tmp_path / "base", config, save_embedding_layers=False)
    config_path, weights_path = (
        tmp_path / "lora" / name for name in ("adapter_config.json", "adapter_model.safetensors")
    )
    fields, tensors = json.loads(config_path.read_text()), safetensors.numpy.load_file(weights_path)
    assert check_against_peft(tmp_path / "base", tmp_path / "lora")
    accepted = 0
    for lost in itertools.combinations(LOST, 2):
        config_path.write_text(json.dumps({name: value for name, value in fields.items() if name not in lost}))
        accepted += check_against_peft(tmp_path / "base", tmp_path / "lora")
    for changes in DAMAGE.values():
        config_path.write_text(json.dumps(fields | changes))
        for part in ("", "layers.1.", "q_proj", "layers.1.self_attn.q_proj"):  # the tensors of these only
            kept = {name: tensor for name, tensor in tensors.items() if part in name}
            safetensors.numpy.save_file(kept, weights_path)
            accepted += check_against_peft(tmp_path / "base", tmp_path / "lora")
    config_path.write_text(json.dumps(fields))
    for lost in itertools.combinations(list(tensors)[:3] + list(tensors)[-3:], 2):
        safetensors.numpy.save_file({name: tensors[name] for name in tensors if name not in lost}, weights_path)
        assert not check_against_peft(tmp_path / "base", tmp_path / "lora")
    assert accepted > 5


def test_merging_with_peft_as_the_refusals_advise(tmp_path):
    write_hf(tmp_path / "base", CONFIG, hf_tensors(CONFIG))
    theirs = write(tmp_path / "dora", tmp_path / "base", lora(use_dora=True))
    expected = torch_logits(theirs)
    with pytest.raises(UnsupportedError, match="use_dora=True"):
        load(tmp_path / "base", adapter=tmp_path / "dora")
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    peft.PeftModel.from_pretrained(base, tmp_path / "dora").merge_and_unload().save_pretrained(tmp_path / "merged")
    ours = load(tmp_path / "merged", dtype="float32")
    np.testing.assert_allclose(ours(jnp.asarray(IDS)).logits, expected, atol=1e-4, rtol=0)


def other(kind: str, **fields: Any) -> Any:
    return getattr(peft, kind)(task_type="CAUSAL_LM", **fields)


REFUSED = {
    "IA3": lambda: other("IA3Config", target_modules=["k_proj"], feedforward_modules=[]),
    "LoHa": lambda: other("LoHaConfig", target_modules=["q_proj"]),
    "AdaLoRA": lambda: other("AdaLoraConfig", target_modules=["q_proj"], total_step=10),
    "prompts": lambda: other("PromptTuningConfig", num_virtual_tokens=3),
    "modules_to_save": lambda: lora(modules_to_save=["lm_head"]),
    "embedding": lambda: lora(target_modules=["embed_tokens", "q_proj"]),
    "bias": lambda: lora(bias="all"),
    "layer_replication": lambda: lora(layer_replication=[[0, 2], [1, 2]]),
    "target_parameters": lambda: lora(target_parameters=["mlp.up_proj.weight"], target_modules=["q_proj"]),
    "tokens": lambda: lora(trainable_token_indices=[1, 2]),
    "pissa": lambda: lora(init_lora_weights="pissa"),
    "olora": lambda: lora(init_lora_weights="olora"),
    "alora": lambda: lora(alora_invocation_tokens=[5, 9]),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_peft_writes_otherwise_is_refused(tmp_path, kind):
    write_hf(tmp_path / "base", CONFIG, hf_tensors(CONFIG))
    write(tmp_path / "adapter", tmp_path / "base", REFUSED[kind]())
    with pytest.raises(JaxgenError, match=r"is not supported|not supported; jaxgen|no LoRA factor"):
        load(tmp_path / "base", adapter=tmp_path / "adapter")


def test_adapters_of_another_base_are_refused(tmp_path):
    for name, width in (("base", 8), ("other", 16)):
        config = CONFIG | {"hidden_size": width}
        write_hf(tmp_path / name, config, hf_tensors(config))
    write(tmp_path / "lora", tmp_path / "other", lora())
    with pytest.raises(CheckpointError, match=r"has shape \[3, 16\]; base and adapter_config\.json imply \[3, 8\]"):
        load(tmp_path / "base", adapter=tmp_path / "lora")


def test_beside_nf4_as_in_qlora(tmp_path):
    bitsandbytes = pytest.importorskip("bitsandbytes", reason="writes the quantised base")
    config = CONFIG | {"hidden_size": 64, "intermediate_size": 128, "head_dim": 16}
    hf = hf_tensors(config)
    write_hf(tmp_path / "floats", config, hf)
    nf4 = transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "floats", quantization_config=nf4, dtype=torch.float32, device_map="cpu"
    )
    base.save_pretrained(tmp_path / "base")
    # bitsandbytes multiplies in bfloat16 on CPUs; what it means is this, with peft in float32 on top.
    for name, module in base.named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit):
            state = module.weight.quant_state
            state.dtype = torch.float32
            hf[f"{name}.weight"] = bitsandbytes.functional.dequantize_4bit(module.weight.data, state).numpy()
    write_hf(tmp_path / "dequantized", config, hf)
    theirs = write(tmp_path / "lora", tmp_path / "dequantized", lora())
    ours = load(tmp_path / "base", adapter=tmp_path / "lora", dtype="float32")
    for path in FUSED:
        weight = linear(ours, path)
        assert isinstance(weight, Adapted) and isinstance(weight.base, Lookup4)
    np.testing.assert_allclose(ours(jnp.asarray(IDS)).logits, torch_logits(theirs), atol=1e-4, rtol=0)
