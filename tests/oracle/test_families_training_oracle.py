"""Families beside Mistral against transformers, peft and bitsandbytes: adapters, gradients, training, four bits."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers
from flax import nnx

from jaxgen.models.tensors import parameter_parts
from tests.oracle.torch_families import assert_close, logits_of, ours, prompts, torch_model
from tests.reference import live
from tests.reference.cases import left_padded

pytestmark = pytest.mark.oracle

MOE = ["qwen3_moe, some layers, tied"]
# One of every other kind of block.
KINDS = ["smollm3", "granite, biases", "gemma2", "gemma3", "phi3, longrope", "olmo2", "olmo3"]


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


@pytest.mark.parametrize("name", ["llama, all biases, linear", "qwen3", "ministral3", *KINDS, *MOE])
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
    [
        "llama, all biases, linear",
        "qwen3, biases, yarn",
        "ministral",
        "ministral3, window",
        "mixtral, window",
        *KINDS,
        *MOE,
    ],
)
def test_gradients_equal_torch(name: str, tmp_path: Path):
    theirs = torch_model(name, tmp_path)
    model, ids = ours(tmp_path), np.array(prompts()[1])[None]
    structure, weights = nnx.split(model)
    compute = jax.jit(jax.value_and_grad(lambda w: nnx.merge(structure, w)(ids, labels=ids).loss))
    loss, gradients = compute(weights)
    # A step along them that takes a hundredth of the loss away, where it falls as they say.
    length = 0.01 * loss / sum(jnp.vdot(gradient, gradient) for gradient in jax.tree.leaves(gradients))
    after, _ = compute(jax.tree.map(lambda weight, gradient: weight - length * gradient, weights, gradients))
    assert 0.98 * loss < after < 0.995 * loss
    expected = theirs(torch.from_numpy(ids), labels=torch.from_numpy(ids)).loss
    expected.backward()
    np.testing.assert_allclose(float(loss), expected.item(), rtol=1e-5)
    found = {".".join(map(str, path)): value[...] for path, value in nnx.to_flat_state(gradients)}
    torch_gradients = {key: parameter.grad.numpy() for key, parameter in theirs.named_parameters()}
    torch_gradients |= of_experts(torch_gradients)
    for key, parts in parameter_parts(model.config).items():
        for part in parts:
            actual = part.take(np.asarray(found[key])).reshape(part.shape)
            np.testing.assert_allclose(actual, torch_gradients[part.name], atol=2e-5, rtol=2e-3, err_msg=part.name)
            assert actual.any() or ".experts." in part.name, part.name  # not every expert is chosen


# Of experts, bitsandbytes leaves the stacked arrays of transformers 5 as they are.
FOUR_BITS = ["llama, as Llama 3.2", "llama, all biases, linear", "qwen2", "qwen3", "ministral3", *KINDS, "mixtral"]


@pytest.mark.parametrize("name", ["phi3" if name == "phi3, longrope" else name for name in FOUR_BITS])
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
    assert model.model.layers[1].self_attn.o_proj.weight[...].packed.dtype == np.uint8
    assert_close(logits_of(model, *left_padded(prompts())), expected, atol=2e-4)
