"""Compile discipline, counted by JAX's own events: a bucket compiles once, and numbers never recompile."""

import gc
import logging
import re
import weakref

import jax
import numpy as np
import pytest
from flax import nnx

import jaxgen
from jaxgen import GenerationConfig, MistralConfig, MistralForCausalLM
from jaxgen.generation.choosing.kept import keep_in
from jaxgen.generation.programs.stages import enable_compile_cache
from jaxgen.generation.programs.structure import split
from jaxgen.generation.prompts.layout import SMALLEST_PROMPT, bucket
from tests.helpers import counted


@pytest.fixture(scope="module")
def model() -> MistralForCausalLM:
    """One layer, so that compiling is cheap; no other test has compiled for its shape."""
    config = MistralConfig(
        vocab_size=53, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, eos_token_id=None,
    )  # fmt: skip
    return MistralForCausalLM(config, rngs=nnx.Rngs(0))


def prompt(length: int, rows: int = 1) -> np.ndarray:
    return np.random.default_rng(length).integers(0, 53, (rows, length))


def test_the_counter_counts(model):
    with counted() as compilations:
        model.generate(prompt(3), max_new_tokens=2)
    assert len(compilations) >= 2  # prefill and decode


@pytest.mark.slow
def test_random_lengths_compile_no_more_than_the_buckets(model):
    lengths = np.random.default_rng(0).integers(1, 201, 50).tolist()
    buckets = {bucket(length, SMALLEST_PROMPT) for length in lengths}
    for length in lengths[:1]:
        model.generate(prompt(length), max_new_tokens=20)  # and whatever JAX needs once
    with counted() as compilations:
        for length in lengths:
            model.generate(prompt(length), max_new_tokens=20)
    assert len(compilations) <= 2 * len(buckets)  # one prefill and one decode each
    with counted() as compilations:
        for length in lengths:
            model.generate(prompt(length), max_new_tokens=20)
    assert not compilations


def test_numbers_do_not_recompile(model):
    options = {"do_sample": True, "temperature": 0.7, "top_k": 50, "top_p": 0.9, "min_p": 0.05, "seed": 1}
    options |= {"repetition_penalty": 1.1, "max_new_tokens": 20, "min_new_tokens": 3, "eos_token_id": 2}
    model.generate(prompt(9), **options)
    changes = {
        "temperature": [1.0, 1.9], "top_k": [7, 64], "top_p": [0.5, 0.99], "min_p": [0.2], "seed": [-4, 2**80],
        "repetition_penalty": [0.9, 2.0], "max_new_tokens": [3, 30], "min_new_tokens": [1], "eos_token_id": [3, [4, 5]],
        "pad_token_id": [9],
    }  # fmt: skip
    with counted() as compilations:
        for name, values in changes.items():
            for value in values:
                model.generate(prompt(9), **{**options, name: value})
        model.generate(prompt(12), row_ids=["another"], **options)  # another length of the same bucket
        model.generate(prompt(14), np.array([[0] * 5 + [1] * 9]), **options)
    assert not compilations


@pytest.mark.slow
def test_an_option_that_was_not_in_use_compiles_both_programs_once(model):
    """As docs/howto/compile.md says: which options are in use is part of the program."""
    model.generate(prompt(9), max_new_tokens=20, do_sample=True, seed=1)
    with counted() as compilations:
        model.generate(prompt(9), max_new_tokens=20, do_sample=True, seed=1, top_p=0.9)
    assert len(compilations) == 2
    with counted() as compilations:
        model.generate(prompt(9), max_new_tokens=20, do_sample=True, seed=1, top_p=0.5)
        model.generate(prompt(9), max_new_tokens=20, do_sample=True, seed=1)
    assert not compilations


def test_changing_the_models_defaults_does_not_recompile(model):
    model.generate(prompt(9), max_new_tokens=20)
    before = model.generation_config
    with counted() as compilations:
        model.generation_config = GenerationConfig(max_new_tokens=20, pad_token_id=5)
        model.generate(prompt(9))
    model.generation_config = before
    assert not compilations


def test_trained_weights_are_used_without_recompiling(model):
    """Weights are arguments: changing them in place changes the result, and compiles nothing."""
    model.generate(prompt(9), max_new_tokens=20)
    head = model.lm_head.weight[...]
    with counted() as compilations:
        flipped = jax.device_put(-np.asarray(head))
        model.lm_head.weight[...] = flipped
        changed = model.generate(prompt(9), max_new_tokens=20)
    model.lm_head.weight[...] = head
    assert (changed != model.generate(prompt(9), max_new_tokens=20)).any()
    assert not compilations


@pytest.mark.slow
def test_a_hundred_updates_compile_nothing_and_copy_nothing(model):
    """As a trainer makes them: new arrays, put into the model, or passed to the pure function."""
    graph, params = nnx.split(model)
    ids, options = prompt(9), {"max_new_tokens": 2, "do_sample": True, "return_dict_in_generate": True}
    config, strict = GenerationConfig(**options), jaxgen.Strict(rows=1, tokens=16)
    rollout = jax.jit(lambda params, key: jaxgen.generate(nnx.merge(graph, params), ids, None, key, config))
    update = jax.jit(lambda params: jax.tree.map(lambda x: 1.01 * x, params))

    def step(params, seed: int):
        params = update(params)
        nnx.update(model, params)
        assert all(a is b for a, b in zip(split(model)[1], jax.tree.leaves(params), strict=True))
        out = model.generate(ids, seed=seed, strict=strict, **options)
        scores = jaxgen.score_tokens(model, out.sequences, 9, strict=strict, **options)
        assert (scores.logprobs == out.logprobs).all()
        rollout(params, jax.random.key(seed))
        return params, out.model_logprobs

    trained, first = step(*step(params, 0)[:1], 0)
    with counted() as compilations:
        for seed in range(100):
            trained, last = step(trained, seed)
    nnx.update(model, params)
    assert not compilations
    assert (first != last).all()


def test_models_of_one_shape_share_executables(model):
    model.generate(prompt(9), max_new_tokens=20)
    other = MistralForCausalLM(model.config, rngs=nnx.Rngs(1))
    with counted() as compilations:
        theirs = other.generate(prompt(9), max_new_tokens=20)
    assert not compilations
    assert (theirs != model.generate(prompt(9), max_new_tokens=20)).any()


def test_lora_in_the_model_generates_as_it_is_and_updates_compile_nothing(model):
    other = MistralForCausalLM(model.config, rngs=nnx.Rngs(1))
    lora = nnx.LoRA(16, 2, 53, base_module=other.lm_head, rngs=nnx.Rngs(0))
    setattr(other, "lm_head", lora)  # noqa: B010  (the module's type is another)
    rng, device = np.random.default_rng(0), jax.devices()[0]
    nnx.update(other, jax.device_put(nnx.state(other), device))
    before = other.generate(prompt(9), max_new_tokens=20)
    state = nnx.state(other, nnx.LoRAParam)
    with counted() as compilations:
        nnx.update(other, jax.tree.map(lambda x: jax.device_put(rng.normal(size=x.shape).astype("f"), device), state))
        after = other.generate(prompt(9), max_new_tokens=20)
    assert not compilations
    assert (before != after).any()


def test_warmup_compiles_what_generate_needs(model):
    with counted() as compilations:
        model.warmup(batch=5, prompt_length=40, max_new_tokens=33, do_sample=True, top_p=0.8)
    assert compilations
    with counted() as compilations:
        model.generate(prompt(41, rows=5), max_new_tokens=33, do_sample=True, top_p=0.7, seed=0)
    assert not compilations


def test_one_log_line_per_compile(model, caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO, logger="jaxgen"):
        for _ in range(2):
            model.generate(prompt(60, rows=2), max_new_tokens=50)
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 2
    assert lines[0].startswith("compiled prefill[batch=2, prompt=64, total=128] in ")
    assert lines[1].startswith("compiled decode[batch=2, total=128] in ")


def test_compile_cache_is_private(tmp_path):
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = [getattr(jax.config, name) for name in names]
    try:
        directory = enable_compile_cache(tmp_path / "cache")
        assert directory.stat().st_mode & 0o777 == 0o700
        assert getattr(jax.config, names[0]) == str(directory)
        directory.chmod(0o777)
        with pytest.raises(jaxgen.JaxgenError, match="other users"):
            enable_compile_cache(directory)
    finally:
        keep_in(None)
        for name, value in zip(names, before, strict=True):
            jax.config.update(name, value)


def test_weights_are_arguments_and_the_cache_is_donated(model):
    """The executable holds no weights, and decode updates the cache in place instead of copying it."""
    from jaxgen.generation.execute import prefill, program_for
    from jaxgen.generation.options.config import resolve
    from jaxgen.generation.prepare import prepare
    from jaxgen.generation.programs import stages

    request = prepare(model, prompt(9), None, resolve({"max_new_tokens": 20}, None, model.generation_config))
    program = program_for(model, request)
    state, weights = prefill(program, request), program.models[2]
    lowered = stages._decode._jitted.lower(*program.models, state, np.int32(20), request.traced, request.layout.static)
    executable = lowered.compile()
    memory, compiled_text = executable.memory_analysis(), executable.as_text() or ""
    assert memory is not None
    cache_bytes = sum(x.nbytes for x in jax.tree.leaves(state.cache))
    weight_bytes = sum(x.nbytes for x in jax.tree.leaves(weights))
    assert memory.alias_size_in_bytes >= cache_bytes
    assert memory.argument_size_in_bytes >= weight_bytes + cache_bytes
    constants = re.findall(r"f32\[([\d,]+)\]\S* constant\(", compiled_text)
    assert all(np.prod([int(n) for n in shape.split(",")]) < 1000 for shape in constants)


def test_a_changed_module_is_noticed(model):
    """The structure of a module is remembered between calls, but not past a change of it."""
    from jaxgen.generation.programs.structure import split

    structure = split(model)[0]
    assert split(model)[0] is structure
    head = model.lm_head
    before = model.generate(prompt(9), max_new_tokens=20)

    class Negated(type(head)):
        def __call__(self, x):
            return -super().__call__(x)

    model.lm_head = Negated(16, 53, dtype=np.dtype("float32"), rngs=nnx.Rngs(0))
    model.lm_head.weight[...] = head.weight[...]
    assert split(model)[0] != structure
    assert (model.generate(prompt(9), max_new_tokens=20) != before).any()
    model.lm_head = head
    assert split(model)[0] == structure
    np.testing.assert_array_equal(model.generate(prompt(9), max_new_tokens=20), before)


def test_a_change_deep_inside_is_noticed(model):
    from jaxgen.generation.programs.structure import split

    layer = model.model.layers[0]
    before = layer.input_layernorm
    old = split(model)[1]
    layer.input_layernorm = type(before)(16, 1e-6, dtype=np.dtype("float32"))
    new = split(model)[1]
    layer.input_layernorm = before
    assert [a is b for a, b in zip(old, new, strict=True)].count(False) == 1  # just that norm's weight
    assert all(a is b for a, b in zip(old, split(model)[1], strict=True))


@pytest.mark.slow
def test_a_deleted_model_is_freed():
    """Neither the remembered structure nor jit's cache of static arguments holds on to weights."""
    config = MistralConfig(
        vocab_size=11, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        num_key_value_heads=1, eos_token_id=None,
    )  # fmt: skip
    model = MistralForCausalLM(config, rngs=nnx.Rngs(0))
    model.generate([[1, 2]], max_new_tokens=2)
    array = weakref.ref(jax.tree.leaves(nnx.state(model))[0])
    assert array() is not None
    del model
    gc.collect()
    assert array() is None
