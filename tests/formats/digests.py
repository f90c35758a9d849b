"""What every quantiser makes, and every file format's reader, in short: a digest of dtypes, shapes and bytes of each.

As a program it prints them as JSON: another process computes them from its imports on under switches of its own.
"""

import hashlib
import json
import tempfile
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgen import AutoModelForCausalLM
from jaxgen.convert.checkpoint import Checkpoint
from jaxgen.convert.formats import detect
from jaxgen.convert.formats.ggml_blocks import FLOATS, FOUR_BITS
from jaxgen.convert.formats.mlx import open_mlx
from jaxgen.convert.quantize.autoround import AutoRound
from jaxgen.convert.quantize.forward import advance
from jaxgen.convert.quantize.gptq import gptq
from jaxgen.convert.quantize.layers import Layers
from jaxgen.models.mistral import MistralConfig
from jaxgen.models.tensors import Part
from jaxgen.quant import quantize
from tests.formats.files import UNIFORM, load
from tests.gguf_files import write_gguf
from tests.hf_files import CONFIG, hf_tensors, write_hf

FIXTURES = UNIFORM.parent
SMALL = CONFIG | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "vocab_size": 40, "num_hidden_layers": 1}


def digests(directory: Path) -> dict[str, str]:
    """By quantiser or format and variant; `directory` is for files that are written only to be read."""
    found = {**_quantised(directory / "small"), **_read()}
    for kind in ("Q4_0", "F32"):
        path = write_gguf(directory / f"{kind}.gguf", kind=kind)
        model = AutoModelForCausalLM.from_pretrained(directory, gguf_file=path.name, device_map="cpu")
        found[f"GGUF file of {kind}"] = nnx.state(model)
    return {name: _digest(value) for name, value in found.items()}


def _quantised(directory: Path) -> dict[str, Any]:
    """A weight of a small model by each method, and by the one that needs a layer, the layer."""
    write_hf(directory, SMALL, hf_tensors(SMALL, "BF16"))
    checkpoint, config = Checkpoint(directory), MistralConfig.from_hf(SMALL)
    ids = np.random.default_rng(0).integers(3, SMALL["vocab_size"], (6, 12))
    hidden = checkpoint.read("model.embed_tokens.weight")[ids].astype(np.float32)
    layers, targets = Layers(checkpoint, config), hidden.copy()
    weights = layers.read(0)
    advance(config, weights, targets)
    down = weights["mlp.down_proj.weight"]
    return {
        "rtn": quantize(down, 16),
        "gptq": gptq(down, down.T @ down + jnp.eye(down.shape[1], dtype=jnp.float32), 16, "down"),
        "autoround": AutoRound(config, 16, iterations=12, batch=4)(weights, hidden, targets),
    }


def _read() -> dict[str, Any]:
    """The committed files of each format."""
    found: dict[str, Any] = {path.parent.name: nnx.state(load(path.parent)) for path in UNIFORM.glob("*/config.json")}
    tables = Checkpoint(FIXTURES, "bitsandbytes.safetensors")
    _, reader = detect({"quantization_config": {"load_in_4bit": True}}, tables)
    assert reader is not None
    for name in (name for name in tables.tensors if ".quant_state." in name and "across" not in name):
        weight, _ = name.split(".quant_state.")
        shape = tuple(json.loads(tables.read_bytes(name).tobytes())["shape"])
        found[f"bitsandbytes {weight}"] = reader.weight(Part(weight, shape, shape))
    affine = Checkpoint(FIXTURES, "mlx.safetensors")
    for name in (name.removesuffix(".scales") for name in affine.tensors if name.endswith(".scales")):
        reader = open_mlx({"group_size": int(name.split("_")[1]), "bits": 4}, affine)
        found[f"MLX {name}"] = reader.weight(Part(f"{name}.weight", (4, 128), (4, 128)))
    blocks = Checkpoint(FIXTURES, "ggml_blocks.safetensors")
    for name in (name.removesuffix(".rows") for name in blocks.tensors if name.endswith(".rows")):
        found[f"GGUF {name}"] = (FOUR_BITS.get(name) or FLOATS[name])(blocks.read(f"{name}.rows"))
    for name in ("bitsandbytes nf4.weight", "GGUF Q4_K"):  # the weights that a table and codes stand for
        found[f"{name}, dequantised"] = found[name].dequantize()
    return found


def _digest(value: Any) -> str:
    sha256 = hashlib.sha256()
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        array = np.asarray(leaf)
        sha256.update(f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}".encode() + array.tobytes())
    return sha256.hexdigest()


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        print(json.dumps(digests(Path(place))))
