"""Experts: what is computed of them, rows on their own, four bits, adapters of single experts, and what is refused.

Their numbers are compared with transformers in tests/oracle/test_families_oracle.py.
"""

import dataclasses
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen import Int4Config
from jaxgen.convert import convert_checkpoint
from jaxgen.convert.inspect import describe
from jaxgen.errors import CheckpointError, JaxgenError, UnsupportedError
from jaxgen.models.experts import Routing, SparseMLP, block_rows, blocks
from jaxgen.models.families import config_from_hf
from jaxgen.quant import Int4
from tests.families import CONFIGS
from tests.family_files import load, logits, tensors_of, written
from tests.helpers import padded
from tests.hf_files import write_hf
from tests.rows import BATCH, rows_of, same

IDS = [[5, 9, 7, 30, 41, 2], [8, 8, 1, 90, 3, 11]]


def layer_of(experts: int = 8, chosen: int = 2, normalized: bool = True) -> Any:
    routing = Routing(experts, chosen, 24, normalized, "gate", ("{}.gate", "{}.up", "{}.down"))
    return SparseMLP(32, routing, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0))


def of_all(layer: Any, x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Every expert of every token in float64, added by shares; and which experts were chosen."""
    routing, width = layer.routing, x.shape[-1]
    first, second = (
        np.asarray(getattr(layer.experts, name).weight[...], np.float64) for name in ("gate_up_proj", "down_proj")
    )
    shares, chosen = map(np.asarray, layer.choose(jnp.asarray(x)))
    weights = np.zeros((len(x), routing.experts))
    np.put_along_axis(weights, chosen, shares, axis=1)
    pairs = np.einsum("efci,mi->emfc", first.reshape(routing.experts, routing.size, 2, width), x)
    hidden = pairs[..., 0] / (1 + np.exp(-pairs[..., 0])) * pairs[..., 1]
    outputs = np.einsum("eof,emf->emo", second.reshape(routing.experts, width, routing.size), hidden)
    return np.einsum("emo,me->mo", outputs, weights), chosen


@pytest.mark.parametrize("tokens", [1, 3, 64])
def test_only_the_chosen_experts_are_computed(tokens: int):
    """The others are NaN, which any use of them would show."""
    layer = layer_of(experts=40)
    x = np.random.default_rng(tokens).standard_normal((tokens, 1, 32)).astype(np.float32)
    x[:] = x[:1] + 0.01 * x  # nearly alike, so that some experts are nobody's
    expected, chosen = of_all(layer, x[:, 0])
    unused = np.setdiff1d(np.arange(40), chosen)
    assert len(unused) > 8
    for linear in (layer.experts.gate_up_proj, layer.experts.down_proj):
        stacked = np.asarray(linear.weight[...])
        stacked = stacked.reshape(40, -1, stacked.shape[1]).copy()
        stacked[unused] = np.nan
        linear.weight = nnx.Param(jnp.asarray(stacked.reshape(linear.weight[...].shape)))
    np.testing.assert_allclose(np.asarray(layer(jnp.asarray(x)))[:, 0], expected, atol=1e-5)


def work(jaxpr: Any) -> int:
    """Multiplications of a program: a loop's as often as it runs, the dearest branch of a choice."""
    total = 0
    for equation in jaxpr.eqns:
        inner = [
            value
            for value in jax.tree.leaves(list(equation.params.values()))
            if hasattr(value, "jaxpr") or hasattr(value, "eqns")
        ]
        counts = [work(getattr(value, "jaxpr", value)) for value in inner]
        if equation.primitive.name == "dot_general":
            (axes, _), _ = equation.params["dimension_numbers"]
            total += int(np.prod(equation.outvars[0].aval.shape)) * int(
                np.prod([equation.invars[0].aval.shape[axis] for axis in axes])
            )
        elif equation.primitive.name == "scan":
            total += equation.params["length"] * sum(counts)
        else:
            total += max(counts, default=0) if equation.primitive.name == "cond" else sum(counts)
    return total


@pytest.mark.parametrize("tokens, most", [(1, 2), (4, 32), (64, 16 * 16), (2048, 128 * 40)])
def test_work_does_not_grow_with_the_number_of_experts(tokens: int, most: int):
    """Rows that are multiplied, of blocks that may be empty or half full: never `tokens` times all experts."""
    layer = layer_of()
    graph, state = nnx.split(layer)
    closed = jax.make_jaxpr(lambda state, x: nnx.merge(graph, state)(x))(state, jnp.zeros((tokens, 1, 32)))
    rows = (work(closed.jaxpr) - tokens * 8 * 32) / (3 * 24 * 32)
    assert rows <= min(most, 2 * tokens * 8)
    if tokens in (1, 2048):
        assert rows < 0.4 * tokens * 8


@pytest.mark.parametrize("tokens, most", [(1, 1 << 15), (200, 1 << 18)])
def test_a_cpu_copies_a_part_of_an_expert_at_a_time(tokens: int, most: int):
    """It copies what it takes out of a matrix; of one token, no more than one thread copies and reads best."""
    routing = Routing(4, 2, 1024, True, "gate", ("{}.gate", "{}.up", "{}.down"))
    graph, state = nnx.split(
        nnx.eval_shape(lambda: SparseMLP(512, routing, dtype=jnp.dtype("float32"), rngs=nnx.Rngs(0)))
    )
    x = jax.ShapeDtypeStruct((tokens, 1, 512), jnp.float32)
    text = jax.jit(lambda state, x: nnx.merge(graph, state)(x)).lower(state, x).as_text()
    taken = [
        int(rows) * int(columns) for rows, columns in re.findall(r"dynamic_slice .*sizes = \[(\d+), (\d+)\]", text)
    ]
    assert most // 2 <= max(taken) <= most


@pytest.mark.parametrize("tokens, chosen, experts", [(1, 2, 4), (2, 4, 4), (5, 1, 3), (33, 3, 40), (300, 2, 3)])
def test_every_choice_has_a_place_of_its_own_in_a_block_of_its_expert(tokens: int, chosen: int, experts: int):
    rng = np.random.default_rng(0)
    for weights in (np.ones(experts), 0.01 ** np.arange(experts)):  # evenly, and nearly all to a few
        picked = np.stack(
            [rng.choice(experts, chosen, replace=False, p=weights / weights.sum()) for _ in range(tokens)]
        )
        read, owners, places = map(np.asarray, blocks(jnp.asarray(picked), experts))
        rows = block_rows(tokens, chosen, experts)
        assert read.shape == (len(owners), rows)
        assert len(np.unique(places)) == tokens * chosen and places.max() < read.size
        np.testing.assert_array_equal(owners[places // rows], picked)
        np.testing.assert_array_equal(read.reshape(-1)[places], np.arange(tokens)[:, None].repeat(chosen, 1))


@pytest.mark.parametrize("tokens", [2, 8, 64])
def test_a_token_depends_on_itself_only_bit_for_bit(tokens: int):
    layer = nnx.jit(layer_of())
    rng = np.random.default_rng(1)
    x, others = rng.standard_normal((2, tokens, 1, 32)).astype(np.float32)
    order = rng.permutation(tokens)
    alone, shuffled = np.asarray(layer(jnp.asarray(x))), np.asarray(layer(jnp.asarray(x[order])))
    np.testing.assert_array_equal(shuffled, alone[order])
    others[tokens // 2] = x[0]
    np.testing.assert_array_equal(np.asarray(layer(jnp.asarray(others)))[tokens // 2], alone[0])


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_a_row_of_a_batch_depends_on_itself_only(name: str, tmp_path: Path):
    model, rng = load(written(tmp_path, name)), np.random.default_rng(0)
    names = [f"row {index}" for index in range(BATCH)]
    rows = [rng.integers(0, 97, length).tolist() for length in (3, 14, 1, 9)]
    expected = rows_of(model, "few", *padded(rows, "left", 0), names)
    others = [rows[0], *(rng.integers(0, 97, 14).tolist() for _ in range(3))]
    mixed = rows_of(model, "few", *padded(others, "right", 1), [names[0], "a", "b", "c"])
    assert same(mixed[0], expected[0], exactly=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_int4_is_the_model_of_the_rounded_weights(name: str, tmp_path: Path):
    sizes = {"hidden_size": 64, "head_dim": 32, "intermediate_size": 64}
    sizes |= {"moe_intermediate_size": 64} if name == "qwen3_moe" else {}
    path = written(tmp_path / "plain", name, **sizes)
    loaded, plain = load(path, quantization_config=Int4Config(group_size=64)), load(path)
    rounded = logits(loaded, IDS)
    for here, there in zip(plain.model.layers, loaded.model.layers, strict=True):
        for owner in (lambda layer: layer.self_attn, lambda layer: layer.mlp.experts):
            for linear in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
                if hasattr(owner(there), linear):
                    weight = getattr(owner(there), linear).weight[...]
                    assert isinstance(weight, Int4)
                    getattr(owner(here), linear).weight = nnx.Param(weight.dequantize())
    np.testing.assert_allclose(rounded, logits(plain, IDS), atol=1e-4)
    converted = convert_checkpoint(path, tmp_path / "int4", group_size=64)
    np.testing.assert_allclose(logits(load(converted), IDS), rounded, atol=1e-4)
    ignored = json.loads((converted / "config.json").read_text())["quantization_config"]["ignore"]
    assert any(module.endswith(".gate") for module in ignored) and "lm_head" in ignored
    with pytest.raises(UnsupportedError, match="models with experts"):
        convert_checkpoint(path, tmp_path / "gptq", method="gptq", calibration=tmp_path / "none.txt")


def test_a_damaged_number_of_experts_is_one_problem(tmp_path: Path):
    path = written(tmp_path, "mixtral")
    config = json.loads((path / "config.json").read_text()) | {"num_local_experts": 10**9, "num_experts_per_tok": 10**8}
    (path / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match="num_local_experts=1000000000, the weights have 4"):
        load(path)


@pytest.mark.parametrize("fields, message", [
    ({"model_type": "mixtral", "num_experts_per_tok": 9}, "num_experts_per_tok=9 is more than num_local_experts=8"),
    ({"model_type": "mixtral", "output_router_logits": True}, "output_router_logits=True is not supported"),
    ({"model_type": "qwen3_moe", "num_experts": 4, "num_local_experts": 5}, "num_experts=4, but num_local_experts=5"),
    ({"model_type": "qwen3_moe", "mlp_only_layers": [-1]}, "mlp_only_layers.* must be a list of layers"),
    ({"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step=0 must be a positive int"),
    ({"model_type": "qwen3_moe", "use_sliding_window": True}, "use_sliding_window=True is not supported"),
    ({"model_type": "qwen3_moe", "norm_topk_prob": 1}, "norm_topk_prob=1 must be true or false"),
])  # fmt: skip
def test_what_is_refused(fields: dict[str, Any], message: str):
    with pytest.raises(JaxgenError, match=message):
        config_from_hf(fields)


def test_inspect_says_how_many_experts_there_are(tmp_path: Path):
    assert "2 of 6 experts of 24 in 1 of 4 layers" in describe(written(tmp_path, "qwen3_moe, some layers, tied"))
    assert config_from_hf(CONFIGS["qwen3_moe"] | {"num_local_experts": 16}) == config_from_hf(CONFIGS["qwen3_moe"])


@pytest.mark.slow
def test_an_adapter_of_single_experts_is_merged(tmp_path: Path):
    """As PEFT wrote them while experts were linear layers, with transformers 4."""
    path = written(tmp_path / "base", "mixtral")
    rng, tensors, changed = np.random.default_rng(3), {}, tensors_of(config_from_hf(CONFIGS["mixtral"]))
    for name in [name for name in changed if name.endswith(("q_proj.weight", "w2.weight"))]:
        down, up = (
            rng.standard_normal(size).astype(np.float32)
            for size in ((2, changed[name].shape[1]), (changed[name].shape[0], 2))
        )
        module = f"base_model.model.{name.removesuffix('.weight')}"
        tensors |= {f"{module}.lora_A.weight": down, f"{module}.lora_B.weight": up}
        changed[name] = changed[name] + 2 * up @ down
    (tmp_path / "lora").mkdir()
    lora = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 4, "target_modules": ["q_proj", "w2"]}
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(lora))
    from safetensors.numpy import save_file

    save_file(tensors, tmp_path / "lora" / "adapter_model.safetensors")
    write_hf(tmp_path / "merged", CONFIGS["mixtral"], changed)
    adapted = load(path, adapter=tmp_path / "lora")
    np.testing.assert_allclose(logits(adapted, IDS), logits(load(tmp_path / "merged"), IDS), atol=1e-4)


def test_shares_add_up_to_one_only_where_the_config_says_so():
    x = jnp.asarray(np.random.default_rng(2).standard_normal((3, 32)), jnp.float32)
    whole, part = (layer_of(normalized=normalized).choose(x) for normalized in (True, False))
    np.testing.assert_allclose(whole[0].sum(-1), 1, rtol=1e-6)
    assert (part[0].sum(-1) < 0.99).all()
    np.testing.assert_array_equal(whole[1], part[1])
    assert dataclasses.replace(layer_of().routing).names(3) == ["3.gate", "3.up", "3.down"]
