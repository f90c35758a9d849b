"""Models on a mesh of simulated devices: the tokens of one device, what devices say to each other, what is refused.

`conftest.py` asks JAX for eight devices. A model on one device is what the reference and the oracle tests compare with
transformers.
"""

import re
from collections import Counter
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import transformers
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

import jaxgen
from jaxgen import GenerationConfig, Int4Config, Strict
from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.generation import execute
from jaxgen.models.families import config_from_hf
from jaxgen.models.tensors import parameter_parts
from jaxgen.parallel.layout import Layout
from jaxgen.quant import Int4, Lookup4, quantize
from jaxgen.quant.adapted import Adapted
from jaxgen.quant.weight import as_weight
from tests.families import CONFIGS
from tests.family_files import load, written
from tests.helpers import counted, padded, some_slow
from tests.hf_files import CONFIG, hf_tensors, write_hf
from tests.rows import OPTIONS, PROCESSORS

IDS, MASK = padded([[5, 9, 7, 30, 41, 2, 8], [8, 8, 1], [3, 20, 4, 60]], "left", 1)
MESHES = [{"model": 2}, {"data": 2}, {"model": 2, "data": 2}, {"model": 4}, {"model": 4, "data": 2}]
TABLES = "scores", "hidden_states", "attentions"
# One of each kind of block: biases, norms of heads and of all heads, windows, tied heads, limits, scales, experts,
# projections stacked in the files.
KINDS = [
    "llama, all biases, linear", "qwen2, windows", "qwen3, tied", "mixtral", "qwen3_moe, some layers, tied", "smollm3",
    "granite", "gemma2", "gemma3", "olmo2", "olmo3", "ministral3, window", "phi3", "phi3, longrope",
]  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return written(tmp_path_factory.mktemp("llama"), "llama, as Llama 3.2", vocab_size=96)


@pytest.fixture(scope="module")
def pair(llama: Path) -> tuple[Any, Any]:
    return load(llama), load(llama, device_map={"model": 2, "data": 2})


def same_tokens(one: Any, other: Any, ids: Any = IDS, mask: Any = MASK, **options: Any) -> Any:
    """Both models' rows have the same tokens; log-probabilities differ by rounding."""
    options = {"max_new_tokens": 8, "return_dict_in_generate": True, **options}
    first, second = (model.generate(ids, mask, **options) for model in (one, other))
    np.testing.assert_array_equal(second.sequences, first.sequences)
    if first.logprobs is not None:
        np.testing.assert_allclose(second.logprobs, first.logprobs, atol=2e-4)
    return second


# Each kind on one mesh, and experts, which are divided too, on each.
PLACED = [(name, MESHES[place % len(MESHES)]) for place, name in enumerate(KINDS) if name != "mixtral"]
PLACED += [("mixtral", sizes) for sizes in MESHES]
FOR_A_SOAK = ("llama, all biases, linear", "qwen3, tied", "smollm3", "gemma2")


@pytest.mark.parametrize(
    ("name", "sizes"),
    some_slow(
        PLACED,
        lambda placed: placed[0] != "olmo2" and placed != ("mixtral", {"model": 4}),
        lambda placed: placed[0] in FOR_A_SOAK or placed == ("mixtral", {"data": 2}),
    ),
)
def test_a_mesh_changes_no_token(name: str, sizes: dict[str, int], tmp_path: Path):
    written(tmp_path, name)
    model = load(tmp_path, device_map=sizes)
    assert len(model.model.norm.weight.devices()) == np.prod([*sizes.values()])
    same_tokens(load(tmp_path), model)


def test_eight_devices_share_two_heads_in_copies(llama: Path, caplog: pytest.LogCaptureFixture):
    model = load(llama, device_map={"model": 8})
    assert model.layout.mesh.shape == {"data": 1, "model": 2, "copies": 4}
    assert "2 key-value heads are not to be divided by 8 devices: each is kept, and attended to, on 4" in caplog.text
    layer = model.model.layers[0]
    assert layer.self_attn.qkv_proj.weight.sharding.shard_shape((128, 48)) == (64, 48)
    assert layer.mlp.down_proj.weight.sharding.shard_shape((48, 72)) == (48, 9)
    same_tokens(load(llama), model)


ASKED: dict[str, dict[str, Any]] = {
    "sampled": OPTIONS | PROCESSORS | {"prefix_allowed_tokens_fn": lambda row, ids: range(1 + len(ids), 96)},
    "samples": {"do_sample": True, "seed": 1, "num_return_sequences": 3},
    "beams": {"num_beams": 3, "num_return_sequences": 2},
    "lookup": {"prompt_lookup_num_tokens": 3},
    "guided": {"guidance_scale": 1.5},
    "int8": {"cache_implementation": "quantized"},
    "chunks": {"prefill_chunk_size": 4},
    "strict": {"strict": Strict(rows=4, tokens=48), "do_sample": True, "seed": 3},
    "tables": {"output_scores": True, "output_hidden_states": True, "output_attentions": True},
}


@pytest.mark.parametrize("name", some_slow(ASKED, lambda name: name not in ("sampled", "beams", "lookup", "strict")))
def test_every_option_works_on_a_mesh(pair: tuple[Any, Any], name: str):
    out = same_tokens(*pair, **ASKED[name])
    if name == "tables":
        first = pair[0].generate(IDS, MASK, max_new_tokens=8, return_dict_in_generate=True, **ASKED[name])
        tables = [[leaf for name in TABLES for leaf in jax.tree.leaves(getattr(x, name))] for x in (out, first)]
        for table, expected in zip(*tables, strict=True):
            np.testing.assert_allclose(table, expected, atol=2e-4)


def test_one_row_and_rows_that_do_not_divide(pair: tuple[Any, Any]):
    same_tokens(*pair, ids=IDS[:1], mask=MASK[:1])
    same_tokens(*pair, ids=np.repeat(IDS, 3, axis=0)[:7], mask=np.repeat(MASK, 3, axis=0)[:7])


def test_an_assistant_on_the_same_mesh(pair: tuple[Any, Any]):
    one, other = pair
    tokens = one.generate(IDS, MASK, max_new_tokens=8)
    np.testing.assert_array_equal(other.generate(IDS, MASK, max_new_tokens=8, assistant_model=other), tokens)


def test_a_prefix_is_continued(pair: tuple[Any, Any]):
    texts = []
    for model in pair:
        first = model.generate(IDS, MASK, max_new_tokens=4, return_dict_in_generate=True)
        again: dict[str, Any] = {"past_key_values": first.past_key_values, "max_new_tokens": 4}
        texts.append(model.generate(first.sequences, np.asarray(first.attention_mask), **again))
    np.testing.assert_array_equal(*texts)


def test_scores_are_those_of_one_device_and_strict_ones_exact(pair: tuple[Any, Any]):
    options: dict[str, Any] = {"do_sample": True, "temperature": 1.4, "strict": Strict(rows=4, tokens=48)}
    out = pair[1].generate(IDS, MASK, seed=0, max_new_tokens=8, return_dict_in_generate=True, **options)
    given = out.sequences, out.prompt_lengths, out.attention_mask
    np.testing.assert_array_equal(jaxgen.score_tokens(pair[1], *given, **options).logprobs, out.logprobs)
    fast, other = (jaxgen.score_tokens(model, *given).model_logprobs for model in pair)
    np.testing.assert_allclose(fast, other, atol=2e-4)
    np.testing.assert_allclose(pair[1](IDS, MASK).logits[MASK == 1], pair[0](IDS, MASK).logits[MASK == 1], atol=2e-4)


def test_a_record_names_the_mesh_and_replays(pair: tuple[Any, Any]):
    out = pair[1].generate(IDS, MASK, do_sample=True, seed=5, max_new_tokens=6, return_dict_in_generate=True)
    assert out.record.environment["mesh"] == {"devices": 4, "axes": {"data": 2, "model": 2}}
    assert str(jaxgen.replay(out.record, pair[1])) == "identical"


def test_an_engine_on_a_mesh(pair: tuple[Any, Any]):
    results = []
    for model in pair:
        with jaxgen.Engine(model, rows=2, slots=48, chunk=16) as engine:
            handles = [engine.submit(IDS[0], max_new_tokens=5, do_sample=True, seed=seed) for seed in range(3)]
            results.append([handle.result().token_ids for handle in handles])
    assert results[0] == results[1]


def test_inside_a_users_jit(pair: tuple[Any, Any]):
    """Also with the mesh's own model: what lies where is part of its structure."""
    config = GenerationConfig(max_new_tokens=6, do_sample=True)
    run = nnx.jit(lambda model, key: jaxgen.generate(model, IDS, MASK, key, config))
    one, other = (np.asarray(run(model, jax.random.key(1))) for model in pair)
    np.testing.assert_array_equal(one, other)


def test_weights_may_change_and_nothing_compiles(llama: Path):
    model = load(llama, device_map={"model": 2})
    before = model.generate(IDS, MASK, max_new_tokens=4)
    with counted() as compilations:
        weight = model.model.layers[0].self_attn.o_proj.weight
        weight[...] = jax.device_put(-np.asarray(weight[...]), weight[...].sharding)
        after = model.generate(IDS, MASK, max_new_tokens=4)
    assert not compilations
    assert (before != after).any()


# Four bits.


@pytest.fixture(scope="module")
def mistral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Heads and feed-forward of whole groups of 32."""
    place = tmp_path_factory.mktemp("mistral")
    config = CONFIG | {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    write_hf(place, config, {name: 0.3 * x for name, x in hf_tensors(config).items()})
    return place


@pytest.mark.parametrize("low", [False, True])
def test_four_bits_are_divided_as_they_are_packed(mistral: Path, low: bool):
    asked: dict[str, Any] = {"quantization_config": Int4Config(group_size=32, low_cpu_memory=low)}
    model = load(mistral, device_map={"model": 2}, **asked)
    weight = model.model.layers[0].mlp.down_proj.weight[...]
    assert weight.packed.sharding.shard_shape(weight.packed.shape) == (64, 32)
    assert weight.scale.sharding.shard_shape(weight.scale.shape) == (64, 2)
    same_tokens(load(mistral, **asked), model)


def test_whole_rows_have_one_scale_everywhere(mistral: Path):
    asked: dict[str, Any] = {"quantization_config": Int4Config(group_size=-1)}
    same_tokens(load(mistral, **asked), load(mistral, device_map={"model": 2}, **asked))


@pytest.mark.parametrize("columns", [(), ("model",)])
@pytest.mark.parametrize("kind", ["floats", "int4", "offset", "lookup", "adapted"])
def test_the_parts_of_a_weight_make_up_its_product(kind: str, columns: tuple[str, ...]):
    """By columns parts are added, by rows they are joined: against the whole product in float64."""
    random = np.random.default_rng(0)
    dense = random.standard_normal((16, 128)).astype(np.float32)
    int4 = quantize(dense, group_size=32)
    weight: Any = {
        "floats": as_weight(dense),
        "int4": int4,
        "offset": Int4(int4.packed, int4.scale, random.standard_normal(int4.scale.shape).astype(np.float32)),
        "lookup": Lookup4(int4.packed, np.asarray(int4.scale, np.float32), np.linspace(-1, 1, 16, dtype=np.float32)),
        "adapted": Adapted(int4, *(random.standard_normal(s).astype(np.float32) for s in ((3, 128), (16, 3)))),
    }[kind]
    rows = () if columns else ("model",)
    mesh, specs = Mesh(np.array(jax.devices()[:4]), ("model",)), weight.divided(rows, columns, 4)
    x = random.standard_normal((5, 128)).astype(np.float32)

    def part(weight: Any, x: Any) -> Any:
        result = weight.matmul(x)
        return jax.lax.psum(result, "model") if columns else result

    ins, out = (specs, PartitionSpec(None, columns or None)), PartitionSpec(None, rows or None)
    product = jax.shard_map(part, mesh=mesh, in_specs=ins, out_specs=out, check_vma=False)
    expected = x.astype(np.float64) @ np.asarray(weight.dequantize(), np.float64).T
    np.testing.assert_allclose(jax.jit(product)(weight, x), expected, rtol=1e-4, atol=1e-4)


# What devices say to each other.


def collectives(model: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[Counter[str], int]:
    """Of the compiled decode step, and the bytes that it does not keep in place."""
    seen: list[Any] = []
    advance = execute.advance

    def looked_at(program: Any, request: Any, state: Any, until: Any = None) -> Any:
        args = (*program.models, state, np.int32(9), request.traced, request.layout.static)
        seen.append(program.decode._jitted.lower(*args).compile())
        return advance(program, request, state, until)

    monkeypatch.setattr(execute, "advance", looked_at)
    model.generate(IDS, MASK, max_new_tokens=4, do_sample=True, seed=0)
    kinds = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = Counter(re.findall(rf"= \S+ ({kinds})(?:-start)?\(", seen[0].as_text()))
    memory = seen[0].memory_analysis()
    return found, memory.output_size_in_bytes - memory.alias_size_in_bytes


@pytest.mark.parametrize("sizes, gathers", [
    ({"model": 2}, 1), ({"model": 4}, 1), ({"model": 2, "data": 2}, 2), ({"data": 2}, 1),
])  # fmt: skip
def test_layers_sum_twice_and_the_head_is_joined(
    llama: Path, sizes: dict[str, int], gathers: int, monkeypatch: pytest.MonkeyPatch
):
    """And the embedding is one more sum, its rows being divided. Nothing else, and nothing of a weight or a cache."""
    model = load(llama, device_map=sizes)
    found, copied = collectives(model, monkeypatch)
    sums = 2 * model.config.num_hidden_layers + 1 if "model" in sizes else 0
    assert found == Counter({"all-reduce": sums, "all-gather": gathers}) - Counter()
    assert copied < 1000  # the cache stays where it is


PLANNED = {CONFIGS[name]["model_type"]: name for name in CONFIGS} | {"mistral": "llama, as Llama 2", "phi3": "phi3"}


@pytest.mark.parametrize(
    "family", ["llama", "mistral", "qwen2", "qwen3", "gemma2", "granite", "olmo2", "olmo3", "phi3", "smollm3"]
)
def test_the_plan_is_that_of_transformers(family: str):
    """Hugging Face calls it `colwise` where the outputs of a matrix are divided, and `rowwise` where the inputs are.

    Of stacked projections (`phi3`) it gathers the outputs and divides them again, where ours lie by heads and units.
    """
    plan = transformers.AutoConfig.for_model(family).base_model_tp_plan or {}
    config = config_from_hf(CONFIGS[PLANNED[family]])
    layout = Layout.of(Mesh(np.array(jax.devices()[:2]), ("model",)), config)
    ours = {}
    for parameter, parts in parameter_parts(config).items():
        if parameter.startswith("model.layers.0.") and parameter.endswith("_proj.weight"):
            rows, columns = layout.specs(config, parameter, np.zeros((2, 2)))
            for part in parts:
                ours[part.name.removeprefix("model.layers.0.").removesuffix(".weight")] = (rows, columns)
    kinds = {"colwise": ("model", None), "rowwise": (None, "model")}
    theirs = {name.removeprefix("layers.*."): how.split("_")[0] for name, how in plan.items()}
    assert plan
    assert ours == {name: kinds[how] for name, how in theirs.items() if name.endswith("_proj") and how in kinds}


# What is asked for, and what is refused.


def test_a_mesh_of_the_users(llama: Path):
    devices = np.array(jax.devices()[4:8]).reshape(2, 2)
    model = load(llama, device_map=Mesh(devices, ("data", "model")))
    assert model.layout.mesh.devices.tolist() == devices.tolist()
    assert model.device == devices[0, 0]
    same_tokens(load(llama), model)


@pytest.mark.parametrize("wanted, message", [
    ({"model": 16}, r"device_map=\{'model': 16\} needs 16 devices, and JAX has 8"),
    ({"model": 0}, r"device_map=\{'model': 0\}: how many devices 'model' and 'data' have"),
    ({"model": 2, "pipe": 2}, "device_map="),
    (Mesh(np.array(jax.devices()), ("x",)), r"a mesh with the axes \('x',\); name them 'data' \(rows\) and 'model'"),
])  # fmt: skip
def test_what_is_no_mesh(llama: Path, wanted: Any, message: str):
    with pytest.raises(JaxgenError, match=message):
        load(llama, device_map=wanted)


def test_parts_that_hold_no_whole_groups_are_refused(mistral: Path):
    message = (
        "device_map: model.layers.0.self_attn.o_proj.weight: 128 columns in groups of 128|"
        "device_map: model.layers.0.*columns in groups of 64 are not to be divided by 4: .*'model' may be 1, 2"
    )
    with pytest.raises(JaxgenError, match=message):
        load(mistral, device_map={"model": 4}, quantization_config=Int4Config(group_size=64))


def test_permuted_columns_are_refused():
    int4 = quantize(np.eye(64, dtype=np.float32), group_size=32)
    with pytest.raises(UnsupportedError, match=r"permuted .*desc_act=false"):
        Int4(int4.packed, int4.scale, None, np.arange(64, dtype=np.int32)).divided((), ("model",), 2)


def test_what_does_not_divide_is_kept_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    model = load(written(tmp_path, "qwen3"), device_map={"model": 2})  # 97 tokens
    assert "97 (vocab) are not to be divided by 2: each device has all" in caplog.text
    assert model.model.embed_tokens.weight[...].sharding == NamedSharding(model.layout.mesh, PartitionSpec(None, None))


def test_saved_from_a_mesh_as_from_one_device(llama: Path, tmp_path: Path):
    load(llama, device_map={"model": 2, "data": 2}).save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == _saved(llama, tmp_path / "one")


def _saved(place: Path, at: Path) -> bytes:
    load(place).save_pretrained(at)
    return (at / "model.safetensors").read_bytes()
