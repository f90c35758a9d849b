"""Offline quantisation: GPTQ against the paper's equations, AutoRound's promises, and the order of quality."""

import functools
import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen import AutoModelForCausalLM, CheckpointError, JaxgenError, demo
from jaxgen.convert.checkpoint import Checkpoint
from jaxgen.convert.quantize import blocks, cost
from jaxgen.convert.quantize.autoround import AutoRound
from jaxgen.convert.quantize.blocks import quantized_blocks
from jaxgen.convert.quantize.forward import advance, gram_of_inputs, linear_names, output
from jaxgen.convert.quantize.gptq import column_order, gptq
from jaxgen.convert.quantize.layers import Layers
from jaxgen.demo.train import batches
from jaxgen.models.mistral import MistralConfig
from jaxgen.models.tensors import parameter_parts
from jaxgen.quant import Int4, quantize
from jaxgen.quant.nibbles import unpack
from jaxgen.text.tokenizer import load_tokenizer
from tests.helpers import some_slow
from tests.hf_files import CONFIG, hf_tensors, write_hf

SMALL = CONFIG | {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8, "vocab_size": 40}


def correlated(columns: int, seed: int = 0, samples: int = 600) -> np.ndarray:
    """Inputs [samples, columns] that go together, of very different energy, as a language model's are."""
    rng = np.random.default_rng(seed)
    mixed = rng.standard_normal((samples, columns // 4)) @ rng.standard_normal((columns // 4, columns))
    return (mixed + rng.standard_normal((samples, columns))) * np.exp(rng.standard_normal(columns))


def codes_by_the_paper(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, group: int) -> np.ndarray:
    """Optimal brain surgeon, column by column: equations (2) and (3) of the paper, without its Cholesky shortcut."""
    weight, energy = weight.astype(np.float64), np.diag(gram)
    groups = sorted(range(scale.shape[1]), key=lambda g: -energy[g * group : (g + 1) * group].sum())
    order = [i for g in groups for i in sorted(range(g * group, (g + 1) * group), key=lambda i: -energy[i])]
    inverse = np.linalg.inv(gram + 0.01 * energy.mean() * np.eye(len(gram)))
    codes = np.zeros(weight.shape, int)
    for i in order:
        own = scale[:, i // group]
        codes[:, i] = np.clip(np.round(weight[:, i] / own), -8, 7)
        error = (weight[:, i] - codes[:, i] * own) / inverse[i, i]
        weight -= np.outer(error, inverse[i])
        inverse -= np.outer(inverse[:, i], inverse[i]) / inverse[i, i]
        inverse[i, i] = 1  # done: nothing answers for it any more
    return codes


@pytest.mark.parametrize(
    ("columns", "group"), some_slow([(32, 8), (64, -1), (160, 32), (160, -1), (256, 128)], lambda case: case[0] != 160)
)
def test_gptq_is_the_papers(columns, group):
    inputs = correlated(columns)
    gram = inputs.T @ inputs
    weight = np.random.default_rng(1).standard_normal((6, columns)).astype(np.float32)
    ours = gptq(weight, gram.astype(np.float32), group, "w")
    scale = np.asarray(ours.scale, np.float64)
    expected = codes_by_the_paper(weight, gram, scale, ours.group_size)
    different = (np.asarray(unpack(ours.packed)) != expected).mean()
    assert different < 0.01, "more than what float32 rounds the other way"


def test_columns_go_by_energy_within_groups_and_groups_by_theirs():
    np.testing.assert_array_equal(column_order(np.array([1.0, 5, 2, 9, 0, 30, 1, 0]), 4), [5, 6, 4, 7, 3, 1, 2, 0])


@pytest.mark.slow
@pytest.mark.parametrize("group", [32, 64, -1])
def test_gptq_costs_the_output_less_than_rounding(group):
    inputs = correlated(128)
    weight = np.random.default_rng(1).standard_normal((32, 128)).astype(np.float32)
    ours = gptq(weight, (inputs.T @ inputs).astype(np.float32), group, "w")

    def error(quantized: Int4) -> float:
        return float(np.square(inputs @ (weight - np.asarray(quantized.dequantize())).T).sum())

    assert error(ours) < 0.5 * error(quantize(weight, group))


@pytest.mark.slow
def test_gptq_with_inputs_that_say_nothing_is_rounding():
    weight = np.random.default_rng(0).standard_normal((4, 64)).astype(np.float32)
    plain = quantize(weight, 32)
    for gram in (np.zeros((64, 64), np.float32), np.eye(64, dtype=np.float32)):
        ours = gptq(weight, gram, 32, "w")
        np.testing.assert_array_equal(ours.packed, plain.packed)
        np.testing.assert_array_equal(ours.scale, plain.scale)


@pytest.mark.slow
def test_gptq_adds_damping_until_the_inputs_can_be_inverted():
    rng = np.random.default_rng(0)
    rotation = np.linalg.qr(rng.standard_normal((32, 32)))[0]
    gram = (rotation * np.linspace(-0.1, 2.1, 32)) @ rotation.T  # as rounding can leave it: not quite positive
    weight = rng.standard_normal((4, 32)).astype(np.float32)
    error = np.asarray(gptq(weight, gram.astype(np.float32), 32, "w").dequantize()) - weight
    assert np.sqrt(np.square(error).mean()) < 0.5
    with pytest.raises(JaxgenError, match="w: the calibration text leads to inputs that are not finite"):
        gptq(weight, np.full((32, 32), np.nan, np.float32), 32, "w")


# Layers, on a small random checkpoint.


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> tuple[Checkpoint, MistralConfig]:
    directory = tmp_path_factory.mktemp("small")
    write_hf(directory, SMALL, hf_tensors(SMALL, "BF16"))
    return Checkpoint(directory), MistralConfig.from_hf(SMALL)


def ids(rows: int = 6, columns: int = 12) -> np.ndarray:
    return np.random.default_rng(0).integers(3, SMALL["vocab_size"], (rows, columns)).astype(np.int32)


def embedded(checkpoint: Checkpoint) -> np.ndarray:
    return checkpoint.read("model.embed_tokens.weight")[ids()].astype(np.float32)


def all_of(small: tuple[Checkpoint, MistralConfig], method: str = "gptq", **options) -> list[dict[str, Int4]]:
    layers = list(quantized_blocks(*small, ids(), group_size=16, method=method, **options))
    assert [layer for layer, _ in layers] == [0, 1]
    return [quantized for _, quantized in layers]


def same(left: dict[str, Int4], right: dict[str, Int4]) -> bool:
    return left.keys() == right.keys() and all(
        np.array_equal(left[name].packed, right[name].packed) and np.array_equal(left[name].scale, right[name].scale)
        for name in left
    )


@pytest.mark.slow
def test_layers_compute_what_the_model_does(small):
    checkpoint, config = small
    model = AutoModelForCausalLM.from_pretrained(checkpoint.directory, dtype="float32")
    layers, hidden = Layers(checkpoint, config), embedded(checkpoint)
    for layer in range(config.num_hidden_layers):
        advance(config, layers.read(layer), hidden)
    expected = model(ids()).logits
    np.testing.assert_allclose(model.lm_head(model.model.norm(jnp.asarray(hidden))), expected, rtol=1e-4, atol=1e-4)


def test_gram_is_that_of_the_linear_layers_inputs(small):
    checkpoint, config = small
    layers, hidden = Layers(checkpoint, config), embedded(checkpoint)
    weights = layers.read(0)
    normed = hidden / np.sqrt(np.square(hidden).mean(-1, keepdims=True) + config.rms_norm_eps)
    normed = (normed * np.asarray(weights["input_layernorm.weight"])).reshape(-1, 32)
    gram = gram_of_inputs(config, weights, hidden, "self_attn.qkv_proj.weight")
    np.testing.assert_allclose(gram, normed.T @ normed, rtol=1e-4, atol=1e-3)
    # The last linear layer's inputs x, seen from outside: its output x wᵀ is what the layer adds at the end.
    without = weights | {"mlp.down_proj.weight": jnp.zeros_like(weights["mlp.down_proj.weight"])}
    added = (output(config, weights, hidden) - output(config, without, hidden)).reshape(-1, 32)
    down = weights["mlp.down_proj.weight"]
    gram = gram_of_inputs(config, weights, hidden, "mlp.down_proj.weight")
    np.testing.assert_allclose(down @ gram @ down.T, added.T @ added, rtol=1e-3, atol=1e-1)


@pytest.mark.slow
def test_fused_weights_come_apart_as_hf_has_them_and_together_again(small):
    checkpoint, config = small
    layers = Layers(checkpoint, config)
    weights = layers.read(1)
    fused = {name: quantize(weights[name], 16) for name in linear_names(weights)}
    apart = layers.split(1, fused)
    names = {part.name for parts in parameter_parts(config).values() for part in parts if ".layers.1." in part.name}
    assert apart.keys() == {name for name in names if name.endswith("_proj.weight")}
    for name, int4 in apart.items():
        assert isinstance(int4.packed, np.ndarray)
        np.testing.assert_array_equal(int4.dequantize(), quantize(checkpoint.read(name), 16).dequantize())
    joined = layers.join(1, weights, apart)
    for name in weights:
        expected = fused[name].dequantize() if name in fused else weights[name]
        np.testing.assert_array_equal(joined[name], expected)


@pytest.mark.slow
def test_each_linear_layer_sees_the_inputs_of_those_already_quantised(small):
    checkpoint, config = small
    layers, hidden = Layers(checkpoint, config), embedded(checkpoint)
    [first, second] = all_of(small)
    weights = layers.read(0)
    for name in linear_names(weights):
        expected = layers.split(0, {name: gptq(weights[name], gram_of_inputs(config, weights, hidden, name), 16, name)})
        assert same(expected, {part: first[part] for part in expected}), name
        weights[name] = layers.join(0, weights, first)[name]
    advance(config, weights, hidden)
    weights = layers.read(1)
    gram = gram_of_inputs(config, weights, hidden, "self_attn.qkv_proj.weight")
    name = "model.layers.1.self_attn.q_proj.weight"
    assert same({name: gptq(checkpoint.read(name), gram, 16, name)}, {name: second[name]})


@pytest.mark.slow
@pytest.mark.parametrize("method", ["gptq", "autoround"])
def test_finished_layers_are_replayed(small, method):
    first, second = all_of(small, method)
    assert same(all_of(small, method, finished={0: first}.get)[1], second)
    other = {name: Int4(int4.packed ^ 0x77, int4.scale) for name, int4 in first.items()}
    replayed, after = all_of(small, method, finished={0: other}.get)
    assert same(replayed, other)
    assert not same(after, second), "the second layer did not see what the first one gives it"


@pytest.mark.parametrize(("method", "passes"), [("gptq", 6), ("autoround", 3 * 200 * 8 / 16 + 7)])
def test_what_it_will_take_is_said_beforehand(small, method, passes, monkeypatch, caplog):
    """A method's passes over the text, times the layers that are left, times what was measured of one."""
    monkeypatch.setattr(cost, "seconds_of_a_pass", lambda *_: 100.0)
    caplog.set_level(logging.INFO, "jaxgen.convert")
    text = ids()[np.arange(16) % len(ids())]
    blocks_left = quantized_blocks(*small, text, group_size=16, method=method, finished={0: {}}.get)
    monkeypatch.setattr(Layers, "join", lambda self, layer, weights, quantized: weights)
    next(blocks_left)
    assert not caplog.messages
    monkeypatch.setattr(blocks._METHODS[method], "__call__", lambda *_: pytest.fail(caplog.messages[0]))
    layers, length = small[1].num_hidden_layers - 1, text.shape[1]
    said = f"{method} looks at 16 sequences of {length} tokens in each of {layers} layers: about {{}}, and some for"
    with pytest.raises(pytest.fail.Exception, match=said.format(cost.duration(passes * layers * 100))):
        next(blocks_left)


def test_a_pass_is_measured(small):
    hidden = embedded(small[0])
    assert cost.seconds_of_a_pass(small[1], Layers(*small).read(0), hidden) > 0


def test_unknown_methods_and_groups_that_do_not_divide_are_refused(small):
    with pytest.raises(JaxgenError, match="method='awq' must be one of 'gptq', 'autoround'"):
        all_of(small, "awq")
    for method in ("gptq", "autoround"):
        with pytest.raises(JaxgenError, match=r"qkv_proj.weight has rows of 32 weights, which groups of 64"):
            next(quantized_blocks(*small, ids(), group_size=64, method=method))


def test_weights_that_are_not_finite_are_named(tmp_path):
    tensors = hf_tensors(SMALL)
    tensors["model.layers.0.mlp.up_proj.weight"][3, 5] = np.inf
    write_hf(tmp_path, SMALL, tensors)
    with pytest.raises(CheckpointError, match=r"'model.layers.0.mlp.up_proj.weight' has weights"):
        all_of((Checkpoint(tmp_path), MistralConfig.from_hf(SMALL)))


@pytest.mark.slow
def test_autoround_learns_and_stays_within_its_limits(small):
    checkpoint, config = small
    layers, hidden = Layers(checkpoint, config), embedded(checkpoint)
    weights, targets = layers.read(0), hidden.copy()
    advance(config, weights, targets)
    plain = {name: quantize(weights[name], 16) for name in linear_names(weights)}

    def error(quantized: dict[str, Int4]) -> float:
        dense = {name: int4.dequantize() for name, int4 in quantized.items()}
        return float(jnp.square(output(config, weights | dense, hidden) - targets).mean())

    learn = AutoRound(config, 16, iterations=60, batch=4)
    learned = learn(weights, hidden, targets)
    assert error(learned) < 0.7 * error(plain)
    moved = 0
    for name, start in plain.items():
        ratio = np.asarray(learned[name].scale, np.float32) / np.asarray(start.scale, np.float32)
        assert abs(ratio - 1).max() < 0.11
        exact = np.asarray(weights[name]).reshape(*ratio.shape, -1)
        exact = exact / np.asarray(learned[name].scale, np.float32)[..., None]
        codes = np.asarray(unpack(learned[name].packed)).reshape(exact.shape)
        moved += (codes != np.clip(np.round(exact), -8, 7)).sum()
        assert abs(codes - np.clip(exact, -8, 7)).max() <= 1 + 1e-4
    assert moved > 0


@pytest.mark.slow
def test_autoround_is_compiled_once_for_all_layers(small):
    learned = AutoRound(small[1], 16, iterations=2, batch=4)
    hidden = embedded(small[0])
    for layer in range(2):
        learned(Layers(*small).read(layer), hidden, hidden)
    assert learned._step._cache_size() == 1


@pytest.mark.slow
@pytest.mark.parametrize("iterations", [1, 3])
def test_autoround_keeps_its_start_if_nothing_is_better(small, iterations):
    checkpoint, config = small
    layers, hidden = Layers(checkpoint, config), embedded(checkpoint)
    weights = layers.read(0)
    plain = {name: quantize(weights[name], 16) for name in linear_names(weights)}
    targets = np.array(output(config, weights | {name: int4.dequantize() for name, int4 in plain.items()}, hidden))
    learned = AutoRound(config, 16, iterations=iterations, batch=4)(weights, hidden, targets)  # the start is perfect
    assert same(layers.split(0, learned), layers.split(0, plain))


# Quality, on the demo.


@pytest.mark.slow
@pytest.mark.soak
def test_order_of_quality(monkeypatch):
    """With a fraction of the calibration that is the default: benchmarks/quality.py has the full figures.

    There, at group 128, autoround is ahead of gptq; with so few steps it is only ahead of rounding.
    """
    checkpoint, config = Checkpoint(demo.path()), MistralConfig.from_hf(demo.path())
    tokenizer = load_tokenizer(demo.path()).backend_tokenizer
    calibration = next(batches(tokenizer, seed=2, batch=64, length=63))
    text = next(batches(tokenizer, seed=3, batch=64, length=63))
    monkeypatch.setattr(AutoRound, "__init__", functools.partialmethod(AutoRound.__init__, iterations=60, batch=8))
    compute = nnx.jit(lambda model: jax.nn.log_softmax(model(jnp.asarray(text)).logits))
    model = AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    exact = compute(model)
    weights = [Layers(checkpoint, config).read(layer) for layer in range(config.num_hidden_layers)]

    def divergence(method: str) -> float:
        if method in ("absmax", "searched"):
            quantized = (
                {name: quantize(own[name], search=method == "searched").dequantize() for name in linear_names(own)}
                for own in weights
            )
        else:
            layers = quantized_blocks(checkpoint, config, calibration, group_size=128, method=method)
            join = Layers(checkpoint, config).join
            quantized = (join(layer, weights[layer], int4) for layer, int4 in layers)
        for layer, own in zip(model.model.layers, quantized, strict=True):
            for name in linear_names(own):
                module, linear, _ = name.split(".")
                getattr(getattr(layer, module), linear).weight = nnx.Param(own[name])
        return float((jnp.exp(exact) * (exact - compute(model))).sum(-1).mean())

    found = {method: divergence(method) for method in ("absmax", "searched", "gptq", "autoround")}
    assert found["absmax"] > 1.15 * found["searched"]
    assert found["searched"] > 1.3 * found["gptq"]
    assert found["searched"] > 1.3 * found["autoround"]
    assert found["autoround"] > 0
