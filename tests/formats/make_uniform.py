"""Make the committed checkpoints of formats with uniform codes, each packed by a library of its format.

    python -m tests.formats.make_uniform CASE...

Writes `uniform/CASE/` beside this file: a whole tiny checkpoint, and `expected.npz` with the logits for `IDS` of
transformers on torch, by a plain model with the weights as the library dequantises them (float32), and two of those
weights. No environment holds all libraries: the committed files are from

    compressed-*           compressed-tensors 0.20.0 (compressed-g-idx: 0.10.2, the last ones with g_idx)
    gptq-*, awq            gptqmodel 7.7.0, installed without its pinned dependencies
    autoround-*            auto-round 0.16.1
    with                   torch 2.13.0, transformers 5.23.0, Python 3.11
"""

import json
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

from tests.reference.weights import hf_weights

HERE = Path(__file__).parent / "uniform"
IDS = [1, 5, 9, 2, 7, 15, 3, 0, 11]
SHAPE: dict[str, Any] = {
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "vocab_size": 16, "num_hidden_layers": 1,
    "max_position_embeddings": 64, "sliding_window": None, "tie_word_embeddings": False,
}  # fmt: skip
EVEN: dict[str, Any] = SHAPE | {
    "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 16,
}  # fmt: skip
# Rows that do not fill their last word, and as many rows.
ODD: dict[str, Any] = SHAPE | {
    "hidden_size": 36, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 6,
}  # fmt: skip
GROUP = 16
KEPT = ("q_proj.weight", "down_proj.weight")
ATTENTION = "model.layers.0.self_attn."

Tensors = dict[str, torch.Tensor]


def weights(config: Mapping[str, Any], seed: int) -> Tensors:
    """A model in float32, whose linear layers have zero points all over the range, 0 and 15 among them."""
    tensors = {name: torch.from_numpy(array) for name, array in hf_weights(config, seed).items()}
    for index, name in enumerate(linears(tensors)):
        tensors[name][index % 4 :: 4, : GROUP // 2].abs_()
        tensors[name][index % 3 :: 5, -GROUP // 2 :].abs_().neg_()
    return tensors


def linears(tensors: Tensors) -> list[str]:
    return [name for name in tensors if name.endswith("_proj.weight")]


def save(directory: Path, config: Mapping[str, Any], quantization: Mapping[str, Any], tensors: Tensors) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    fields = {**config, "quantization_config": quantization}
    (directory / "config.json").write_text(json.dumps(fields, indent=1) + "\n", encoding="utf-8")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, directory / "model.safetensors",
              metadata={"format": "pt"})  # fmt: skip


def logits(config: Mapping[str, Any], tensors: Tensors) -> np.ndarray:
    """Of a plain torch model with these weights, in float32."""
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**config)).eval()
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    with torch.no_grad():
        return model(torch.tensor([IDS])).logits[0].numpy()


def columns_of_groups(width: int, group: int, seed: int | None) -> torch.Tensor:
    """The group of each column: contiguous, or in a random order."""
    groups = torch.arange(width, dtype=torch.int32) // group
    if seed is None:
        return groups
    return groups[torch.randperm(width, generator=torch.Generator().manual_seed(seed))]


def grid(weight: torch.Tensor, g_idx: torch.Tensor, symmetric: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Scales in float16's precision and zero points `[out, groups]`: of the range of each group, with zero in it."""
    low, high = (
        torch.stack([getattr(weight[:, g_idx == group], f"a{end}")(1) for group in range(int(g_idx.max()) + 1)], 1)
        for end in ("min", "max")
    )
    if symmetric:
        scale = torch.maximum(-low, high) / 7.5
        return scale.half().float(), torch.full_like(scale, 8)
    low, high = low.clamp(max=0), high.clamp(min=0)
    scale = ((high - low) / 15).half().float()
    return scale, (-low / scale).round()


def gptq(directory: Path, *, seed: int, symmetric: bool, version: int, act: bool, **more: Any) -> Tensors:
    """Packed by `TorchLinear`, and read by `convert_gptq_file`."""
    from gptqmodel.nn_modules.qlinear.torch import TorchLinear
    from gptqmodel.utils import model_dequant

    layout = "gptq" if version == 1 else "gptq_v2"
    quantization = {
        "bits": 4, "group_size": GROUP, "desc_act": act, "sym": symmetric, "lm_head": False, "quant_method": "gptq",
        "checkpoint_format": layout, "format": layout, "pack_dtype": "int32",
    } | more  # fmt: skip
    tensors = weights(EVEN, seed)
    packed = {name: tensor.half() for name, tensor in tensors.items()}
    chosen = linears(tensors) + ["lm_head.weight"] * quantization["lm_head"]
    for index, name in enumerate(chosen):
        if "-:.*o_proj" in more.get("dynamic", {}) and "o_proj" in name:
            continue
        weight, module = tensors[name], name.removesuffix(".weight")
        group = 32 if "+:.*mlp" in more.get("dynamic", {}) and "mlp" in name else GROUP
        g_idx = columns_of_groups(weight.shape[1], group, seed + index if act else None)
        scale, zero = grid(weight, g_idx, symmetric)
        linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
        linear.weight.data = weight
        made = TorchLinear(bits=4, group_size=group, sym=symmetric, desc_act=act, in_features=weight.shape[1],
                           out_features=weight.shape[0], bias=False, pack_dtype=torch.int32)  # fmt: skip
        made.pack_original(linear, scale, zero, g_idx)
        if version == 1:
            made.qzeros = model_dequant._revert_gptq_v1_qzeros_correction(made.qzeros, 4)
        del packed[name]
        packed |= {f"{module}.{suffix}": getattr(made, suffix) for suffix in ("qweight", "qzeros", "scales", "g_idx")}
    save(directory, EVEN, quantization, packed)
    return model_dequant.convert_gptq_file(directory / "model.safetensors", torch.float32, quantization, "cpu")


def awq(directory: Path) -> Tensors:
    """Packed by `AwqTorchLinear`, and read by `dequantize_gemm`."""
    from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    quantization = {
        "bits": 4, "group_size": GROUP, "quant_method": "awq", "version": "gemm", "zero_point": True,
        "modules_to_not_convert": ["v_proj", "lm_head"],
    }  # fmt: skip
    tensors = weights(EVEN, 20)
    packed = {name: tensor.half() for name, tensor in tensors.items()}
    expected = dict(packed)
    for name in linears(tensors):
        if "v_proj" in name:
            continue
        weight, module = tensors[name], name.removesuffix(".weight")
        scale, zero = grid(weight, columns_of_groups(weight.shape[1], GROUP, None), False)
        linear = torch.nn.Linear(*weight.shape[::-1], bias=False)
        linear.weight.data = weight
        made = AwqTorchLinear(bits=4, group_size=GROUP, sym=False, desc_act=False, in_features=weight.shape[1],
                              out_features=weight.shape[0], bias=False)  # fmt: skip
        made.pack(linear, scale.half(), zero)
        del packed[name]
        packed |= {f"{module}.{suffix}": getattr(made, suffix) for suffix in ("qweight", "qzeros", "scales")}
        expected[name] = dequantize_gemm(made.qweight, made.qzeros, made.scales.float(), 4, GROUP).T
    save(directory, EVEN, quantization, packed)
    return expected


def autoround(directory: Path, *, seed: int, layout: str, symmetric: bool) -> Tensors:
    """Exported by `AutoRound` after plain rounding, and read by the layers it makes when transformers loads it."""
    from auto_round import AutoRound
    from auto_round.export.export_to_awq.utils import dequantize_gemm

    original = weights(EVEN, seed)
    model = transformers.MistralForCausalLM(transformers.MistralConfig(**EVEN)).eval()
    model.load_state_dict(original)
    demo = Path(__file__).parents[2] / "jaxgen" / "demo" / "checkpoint"
    exceptions = {f"{ATTENTION}o_proj": {"bits": 16}, f"{ATTENTION}v_proj": {"group_size": 32}}
    rounding = AutoRound(
        model.half(), transformers.AutoTokenizer.from_pretrained(demo), bits=4, group_size=GROUP, sym=symmetric,
        iters=0, disable_opt_rtn=True, device_map="cpu", layer_config=exceptions,
    )  # fmt: skip
    with tempfile.TemporaryDirectory() as place:
        rounding.quantize_and_save(place, format=layout)
        made = next(Path(place).rglob("model.safetensors")).parent
        fields = json.loads((made / "config.json").read_text(encoding="utf-8"))
        save(directory, EVEN, fields["quantization_config"], load_file(made / "model.safetensors"))
        loaded = transformers.AutoModelForCausalLM.from_pretrained(made, dtype=torch.float32, device_map="cpu")
    expected = {}
    for name, weight in original.items():
        module: Any = loaded.get_submodule(name.removesuffix(".weight"))
        if not hasattr(module, "qweight"):
            expected[name] = module.weight.detach()
        elif "awq" in layout:  # whose layer rounds to float16
            size = weight.shape[1] // len(module.scales)
            expected[name] = dequantize_gemm(module.qweight, module.qzeros, module.scales.float(), 4, size).T
        else:
            with torch.no_grad():
                expected[name] = module.float()(torch.eye(weight.shape[1])).T
    return expected


def compressed(directory: Path, config: Mapping[str, Any], seed: int, groups: Mapping[str, Any]) -> Tensors:
    """Compressed and decompressed by `PackedQuantizationCompressor`; `groups` are the config_groups."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationScheme
    from compressed_tensors.quantization.utils import calculate_qparams

    tensors = weights(config, seed)
    packed = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    expected = dict(packed)
    for name in linears(tensors):
        weight, module = tensors[name].bfloat16(), name.removesuffix(".weight")
        group = next(
            group for group in groups.values()
            if any(target == "Linear" or target.removeprefix("re:.*") in name for target in group["targets"])
        )  # fmt: skip
        scheme = QuantizationScheme(**group)
        rows = weight.reshape(len(weight), -1, group["weights"].get("group_size") or weight.shape[1])
        scale, zero = calculate_qparams(rows.amin(2), rows.amax(2), scheme.weights)
        state = {"weight": weight, "weight_scale": scale.bfloat16(), "weight_zero_point": zero.to(torch.int8)}
        state = PackedQuantizationCompressor.compress(state, scheme)
        expected[name] = PackedQuantizationCompressor.decompress(
            {**state, "weight_scale": state["weight_scale"].float()}, scheme
        )["weight"]
        del packed[name]
        packed |= {f"{module}.{suffix}": tensor for suffix, tensor in state.items()}
    save(directory, config, compressed_config(groups), packed)
    return expected


def compressed_config(groups: Mapping[str, Any]) -> dict[str, Any]:
    return {
        "quant_method": "compressed-tensors", "format": "pack-quantized", "quantization_status": "compressed",
        "ignore": ["lm_head"], "config_groups": groups, "kv_cache_scheme": None,
    }  # fmt: skip


def group(targets: list[str], **weights: Any) -> dict[str, Any]:
    return {"targets": targets, "weights": {"num_bits": 4, "type": "int"} | weights}


def compressed_g_idx(directory: Path) -> Tensors:
    """By releases that kept columns in their order and stored the group of each."""
    from compressed_tensors.compressors import PackedQuantizationCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig

    scheme = group(["Linear"], symmetric=True, strategy="group", group_size=GROUP, actorder="group")
    arguments = QuantizationArgs(**scheme["weights"])
    compressor = PackedQuantizationCompressor(config=QuantizationConfig(config_groups={"group_0": scheme}))
    tensors = weights(EVEN, 50)
    packed = {name: tensor.bfloat16() for name, tensor in tensors.items()}
    expected = dict(packed)
    for index, name in enumerate(linears(tensors)):
        weight, module = tensors[name], name.removesuffix(".weight")
        g_idx = columns_of_groups(weight.shape[1], GROUP, 60 + index)
        if "gate_proj" in name:
            g_idx.fill_(-1)  # how they marked that there is no order
        real = g_idx if g_idx.min() >= 0 else columns_of_groups(weight.shape[1], GROUP, None)
        scale = grid(weight, real, True)[0].bfloat16()
        state = compressor.compress_weight(weight, scale.float(), arguments, torch.zeros_like(scale), g_idx)
        state |= {"weight_scale": scale.float(), "weight_g_idx": g_idx}
        expected[name] = compressor.decompress_weight(state, arguments)
        del packed[name]
        state["weight_scale"] = scale
        packed |= {f"{module}.{suffix}": tensor for suffix, tensor in state.items()}
    save(directory, EVEN, compressed_config({"group_0": scheme}), packed)
    return expected


SYMMETRIC = {
    "group_0": group(["re:.*self_attn"], symmetric=True, strategy="group", group_size=6),
    "group_1": group(["Linear"], symmetric=True, strategy="channel"),
}
ASYMMETRIC = {
    "group_0": group(["Linear"], symmetric=False, strategy="group", group_size=6),
    "group_1": group(["re:.*down_proj"], symmetric=False, strategy="channel"),
}

CASES: dict[str, Callable[[Path], Tensors]] = {
    "compressed-symmetric": lambda place: compressed(place, ODD, 1, SYMMETRIC),
    "compressed-asymmetric": lambda place: compressed(place, ODD, 2, dict(reversed(ASYMMETRIC.items()))),
    "compressed-g-idx": compressed_g_idx,
    "gptq-v1-symmetric": lambda place: gptq(place, seed=10, symmetric=True, version=1, act=False),
    "gptq-v1-asymmetric": lambda place: gptq(place, seed=11, symmetric=False, version=1, act=True),
    "gptq-v2-asymmetric": lambda place: gptq(
        place, seed=12, symmetric=False, version=2, act=False, lm_head=True,
        dynamic={"-:.*o_proj": {}, "+:.*mlp": {"group_size": 32}},
    ),
    "awq": awq,
    "autoround-gptq": lambda place: autoround(place, seed=30, layout="auto_round:auto_gptq", symmetric=True),
    "autoround-gptqmodel": lambda place: autoround(place, seed=31, layout="auto_round:gptqmodel", symmetric=False),
    "autoround-awq": lambda place: autoround(place, seed=32, layout="auto_round:auto_awq", symmetric=False),
}  # fmt: skip


def main() -> None:
    for case in sys.argv[1:]:
        expected = CASES[case](HERE / case)
        config = json.loads((HERE / case / "config.json").read_text(encoding="utf-8"))
        config.pop("quantization_config")
        arrays: dict[str, Any] = {name: expected[name].float().numpy() for name in expected if name.endswith(KEPT)}
        np.savez_compressed(HERE / case / "expected.npz", logits=logits(config, expected), **arrays)


if __name__ == "__main__":
    main()
