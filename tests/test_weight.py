"""The Weight protocol: what every kind of weight does, and a kind that the package does not know."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen import AutoModelForCausalLM, JaxgenError, UnsupportedError, demo
from jaxgen.generation.programs import stages
from jaxgen.generation.programs.structure import split
from jaxgen.quant import Int4, Lookup4, Quantization, Weight, as_weight, quantize
from jaxgen.quant.adapted import Adapted
from jaxgen.records.provenance import facts_of
from tests.hf_files import CONFIG, hf_tensors, write_hf

RANDOM = np.random.default_rng(0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8Weight(Weight):
    """One byte per weight and one scale per row: all that a new kind takes."""

    by_row = ("codes", "scale")

    codes: Any  # int8 [O, I]
    scale: Any  # float [O]

    @property
    def shape(self) -> tuple[int, int]:
        return self.codes.shape

    def dequantize(self, dtype: Any = jnp.float32) -> Any:
        return (jnp.asarray(self.codes, jnp.float32) * jnp.asarray(self.scale)[:, None]).astype(dtype)


@dataclasses.dataclass(frozen=True)
class Int8Config(Quantization):
    """How it is made."""

    lm_head: bool = False

    def check(self, shape: tuple[int, ...], name: str) -> None:
        if shape[1] > 100_000:
            raise JaxgenError(f"{name} is too wide")

    def quantize(self, weight: np.ndarray, name: str) -> Int8Weight:
        scale = np.abs(weight).max(axis=1).astype(np.float32) / 127
        return Int8Weight(np.round(weight / scale[:, None]).astype(np.int8), scale)


def floats(model: Any) -> dict[str, np.ndarray]:
    """The model's weights by path, dequantised; those of norms are no matrices."""
    flat = nnx.to_flat_state(nnx.state(model))
    weights = split(model)[1]
    return {
        ".".join(map(str, path)): np.asarray(weight if len(weight.shape) == 1 else as_weight(weight).dequantize())
        for (path, _), weight in zip(flat, weights, strict=True)
    }


@pytest.mark.slow
def test_a_new_kind_of_weight_loads_multiplies_and_generates():
    """Rows join into the fused parameters, the embedding stays; tokens are those of the same numbers as floats."""
    model = AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32", quantization_config=Int8Config())
    plain = AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    assert isinstance(model.model.layers[0].self_attn.qkv_proj.weight[...], Int8Weight)
    assert facts_of(model)["weights"] == ["Int8Weight", "float32"]
    assert model.get_memory_footprint() < 0.7 * plain.get_memory_footprint()
    exact = floats(plain)
    for name, values in floats(model).items():
        if name.endswith("_proj.weight"):
            assert 0 < np.abs(values - exact[name]).max() <= np.abs(exact[name]).max() / 127, name
        else:
            np.testing.assert_array_equal(values, exact[name])

    for layer, other in zip(plain.model.layers, model.model.layers, strict=True):
        for mine, theirs in (
            (layer.self_attn.qkv_proj, other.self_attn.qkv_proj),
            (layer.self_attn.o_proj, other.self_attn.o_proj),
            (layer.mlp.gate_up_proj, other.mlp.gate_up_proj),
            (layer.mlp.down_proj, other.mlp.down_proj),
        ):
            mine.weight[...] = as_weight(theirs.weight[...]).dequantize()
    ids = np.array([[5, 9, 2, 7]])
    np.testing.assert_allclose(model(ids).logits, plain(ids).logits, atol=1e-5)
    options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False}
    np.testing.assert_array_equal(model.generate(ids, **options), plain.generate(ids, **options))

    with pytest.raises(UnsupportedError, match="quantised weights \\(Int8Weight\\)"):
        model.save_pretrained("nowhere")


def test_a_new_kind_of_weight_on_every_other_way(tmp_path):
    """Under an adapter, in the head, and in a decode step of kernels, which have none for it."""
    write_hf(tmp_path / "base", CONFIG, hf_tensors(CONFIG))
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype="float32", quantization_config=Int8Config(lm_head=True)
    )
    assert isinstance(model.lm_head.weight[...], Int8Weight)
    weight = model.model.layers[0].mlp.down_proj.weight[...]
    assert weight.for_kernels() is weight.as_stored() is weight.bounded() is weight
    assert weight.kernels().row(jnp.ones((1, weight.shape[1]))) is None
    x = jnp.asarray(RANDOM.standard_normal((3, weight.shape[1])), jnp.float32)
    np.testing.assert_array_equal(weight.kernels().alone(x), weight.matmul(x))
    down, up = jnp.ones((2, weight.shape[1])), jnp.ones((weight.shape[0], 2))
    adapted = Adapted(weight, down, up)
    np.testing.assert_allclose(adapted.matmul(x), x @ adapted.dequantize().T, atol=1e-4)
    with pytest.raises(JaxgenError, match="Int8Config: lm_head=True, but this model's head is its embedding"):
        write_hf(tmp_path / "tied", config := CONFIG | {"tie_word_embeddings": True}, hf_tensors(config))
        AutoModelForCausalLM.from_pretrained(tmp_path / "tied", quantization_config=Int8Config(lm_head=True))


def of_every_kind() -> list[Weight]:
    dense = RANDOM.standard_normal((6, 64)).astype(np.float32)
    int4 = quantize(dense, 32)
    shifted = dataclasses.replace(int4, offset=np.full(int4.scale.shape, 0.25, np.float32))
    table = Lookup4(int4.packed, np.abs(int4.scale), np.linspace(-1, 1, 16, dtype=np.float32))
    factors = (RANDOM.standard_normal(shape).astype(np.float32) for shape in ((2, 64), (6, 2)))
    return [as_weight(dense), int4, shifted, table, Adapted(int4, *factors), Int8Config().quantize(dense, "")]


@pytest.mark.parametrize("weight", of_every_kind(), ids=lambda weight: weight.describe())
def test_rows_products_and_bytes_are_those_of_the_matrix(weight):
    matrix = np.asarray(weight.dequantize())
    assert matrix.shape == weight.shape == (6, 64)
    np.testing.assert_array_equal(weight.rows(slice(2, 5)).dequantize(), matrix[2:5])
    assert weight.nbytes == sum(leaf.nbytes for leaf in jax.tree.leaves(weight))
    x = RANDOM.standard_normal((3, 64)).astype(np.float32)
    on_device = jax.tree.map(jnp.asarray, weight)
    np.testing.assert_allclose(on_device.matmul(jnp.asarray(x)), x @ matrix.T, atol=1e-4)
    kernel_form = on_device.for_kernels()
    np.testing.assert_array_equal(kernel_form.dequantize(), matrix)
    for mine, stored in zip(jax.tree.leaves(kernel_form.as_stored()), jax.tree.leaves(weight), strict=True):
        np.testing.assert_array_equal(mine, stored)


@pytest.mark.parametrize("weight", of_every_kind(), ids=lambda weight: weight.describe())
def test_joining_is_concatenation_or_nothing(weight):
    """Whatever a kind's arrays are, its rows come back as they were; another kind has none of its rows."""
    first, second = weight.rows(slice(0, 2)), weight.rows(slice(2, 6))
    joined = first.join([second], np.concatenate)
    if isinstance(weight, Adapted):
        assert joined is None  # its base is joined, before it is put beside it
        return
    assert type(joined) is type(weight)
    np.testing.assert_array_equal(joined.dequantize(), weight.dequantize())
    for other in of_every_kind():
        if type(other) is not type(weight):
            assert first.join([other], np.concatenate) is None


def test_int4_rows_without_an_offset_join_those_that_have_one():
    _, plain, shifted, *_ = of_every_kind()
    assert isinstance(plain, Int4)
    for pieces in ([plain, shifted], [shifted, plain]):
        joined = pieces[0].join(pieces[1:], np.concatenate)
        assert joined is not None
        np.testing.assert_array_equal(joined.dequantize(), np.concatenate([x.dequantize() for x in pieces]))
    other = dataclasses.replace(plain, scale=plain.scale.astype(np.float32))
    permuted = dataclasses.replace(plain, permutation=np.arange(64, dtype=np.int32)[::-1].copy())
    wide = quantize(np.ones((6, 64), np.float32), 64)
    assert all(plain.join([x], np.concatenate) is None for x in (other, permuted, wide))
    assert all(shifted.join([x], np.concatenate) is None for x in (other, permuted, wide))


def test_xla_s_options_go_with_the_weight():
    """Of int4, also below an adapter; asked of the protocol, and not of the class."""

    class OnGpu:
        def devices(self):
            return [SimpleNamespace(platform="gpu")]

    def options(weight: Any) -> dict[str, Any]:
        return stages.stages_for(SimpleNamespace(), [OnGpu(), weight])[1]._options

    fuses = {type(weight).__name__ for weight in of_every_kind() if options(weight) == stages.FUSION_OPTIONS}
    assert fuses == {"Int4", "Adapted"}
