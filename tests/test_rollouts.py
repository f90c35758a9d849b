"""Rollouts through an engine: samples that read their prompt once, exact scores, and weights that are trained."""

import dataclasses
import operator
import threading
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgen
from jaxgen import JaxgenError
from jaxgen.models.layers import QuantizedWeight
from jaxgen.quant.adapted import Adapted
from tests.engines import HEADS, KINDS, SIZES, prompt_of, tiny
from tests.helpers import counted, padded, some_slow
from tests.tokenizers import characters

SAMPLE: dict[str, Any] = {"do_sample": True, "temperature": 1.3, "top_k": 20, "max_new_tokens": 12}


def exactly(model: Any, outputs: Any, strict: jaxgen.Strict, **options: Any) -> int:
    """How many log-probabilities of outputs are not, to the last bit, what scoring says of the same tokens."""
    rows = [output.prompt_ids + output.generated_tokens for output in outputs]
    ids, mask = padded(rows, "left", 0)
    starts = [len(output.prompt_ids) for output in outputs]
    one_each: dict[str, Any] = {**options, "num_return_sequences": 1}
    scores = jaxgen.score_tokens(model, ids, starts, mask, strict=strict, **one_each)
    different = 0
    for row, output in enumerate(outputs):
        count = len(output.generated_tokens)
        assert count == scores.lengths[row]
        for told, found in ((output.logprobs, scores.logprobs), (output.model_logprobs, scores.model_logprobs)):
            different += int((np.array(told, np.float32).view(np.uint32) != found[row, :count].view(np.uint32)).sum())
    return different


@pytest.mark.parametrize("kind", some_slow(KINDS, lambda kind: kind != "bfloat16", lambda kind: kind == "window"))
def test_samples_read_their_prompt_once_and_are_scored_to_the_last_bit(kind: str):
    """Also the part of it behind the last whole piece; in fewer rows than samples, and beside another prompt."""
    model, prompts = tiny(**KINDS[kind]), [prompt_of(21, 0), prompt_of(12, 8), prompt_of(1, 0)]
    with jaxgen.Engine(model, rows=6, slots=64, chunk=8) as engine:
        outputs = [*engine.generate_batch(prompts, seed=3, num_return_sequences=4, **SAMPLE).values()]
        stats = engine.stats()
        assert len({tuple(output.generated_tokens) for output in outputs[:4]}) == 4
        assert [output.prompt_ids for output in outputs] == [prompt for prompt in prompts for _ in range(4)]
        if kind != "window":  # whose ring may have lost the prompt when a later sample comes
            assert stats["read_tokens"] == 20 + 11  # the last token of each is fed to the first step
            assert stats["prefix_tokens"] == 3 * (20 + 11)
        assert exactly(model, outputs, engine.strict, **SAMPLE) == 0
        alone = model.generate(
            prompts[:1], seed=3, num_return_sequences=4, strict=engine.strict, return_dict_in_generate=True, **SAMPLE
        )
        for row, output in enumerate(outputs[:4]):
            count = int(alone.lengths[row])
            assert output.generated_tokens == alone.sequences[row, 21 : 21 + count].tolist()


def test_what_is_behind_the_last_piece_is_had_only_of_a_prompt_as_long():
    """A longer prompt, a shorter one, and one that differs in its last token but one: no bit is another's."""
    model, base = tiny(dtype=jnp.bfloat16), prompt_of(21, 0)
    other = [*base[:19], 5, base[20]]
    with jaxgen.Engine(model, rows=2, slots=64, chunk=8) as engine:
        engine.generate_batch([base], max_new_tokens=2)
        for prompt, shared in ((base[:20], 16), ([*base, 7], 16), (other, 16), ([*base[:20], 7], 20)):
            before = engine.stats()["prefix_tokens"]
            outputs = engine.generate_batch([prompt], max_new_tokens=4, eos_token_id=None).values()
            assert engine.stats()["prefix_tokens"] - before >= shared
            if shared == 16:
                assert engine.stats()["prefix_tokens"] - before == shared
            assert exactly(model, outputs, engine.strict, max_new_tokens=4) == 0
            engine.generate_batch([base], max_new_tokens=2)


def test_a_call_of_its_own_and_a_full_queue():
    model, prompts = tiny(), [prompt_of(3 + number, 0) for number in range(9)]
    outputs = model.generate_batch(prompts, seed=5, rows=4, slots=32, chunk=8, **SAMPLE)
    assert exactly(model, outputs.values(), jaxgen.Strict(rows=4, tokens=32, chunk=8), **SAMPLE) == 0
    with jaxgen.Engine(model, rows=4, slots=32, chunk=8, queue=1) as engine:
        again = engine.generate_batch(prompts, key=jax.random.key(5), **SAMPLE)
        assert [*again] == [f"req_{number}" for number in range(9)]
        for one, other in zip(outputs.values(), again.values(), strict=True):
            assert (one.generated_tokens, one.logprobs) == (other.generated_tokens, other.logprobs)
        with pytest.raises(JaxgenError, match="33 tokens and 1 new"):  # the one before it is not left running
            engine.generate_batch([prompts[0], prompt_of(33, 0)], max_new_tokens=1)
        assert engine.generate_batch([]) == {}


@pytest.mark.parametrize(
    ("wrong", "message"), [([1, 10**6], r"inputs\[2\]\[0, 1\]=1000000"), ([], r"inputs\[2\] has shape")]
)
def test_the_prompt_that_is_wrong_is_named(wrong: list[int], message: str):
    with pytest.raises(JaxgenError, match=message):
        tiny().generate_batch([[1], [1, 5], wrong], max_new_tokens=2)


def test_what_was_drawn_under_a_constraint_is_scored_to_the_last_bit():
    model, options = tiny(), {**SAMPLE, "constraint": jaxgen.regex("(s|st|op)*"), "top_k": 0}
    with jaxgen.Engine(model, characters(), rows=4, slots=32, chunk=8, constraints=(48, 24)) as engine:
        outputs = [*engine.generate_batch([prompt_of(9, 0)], seed=1, num_return_sequences=4, **options).values()]
        assert exactly(model, outputs, engine.strict, tokenizer=characters(), **options) == 0
        assert all(sum(output.logprobs) > sum(output.model_logprobs) for output in outputs)


@pytest.fixture
def optimized() -> Iterator[None]:
    """The compiler does all it does for users, to what is compiled from here on."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)


@pytest.mark.usefixtures("optimized")
def test_products_are_rounded_alike_in_the_engine_and_in_generate():
    """Where XLA may fuse them with a sum in one and not in the other: temperature, and Granite's scaling of logits."""
    sizes: dict[str, Any] = {**SIZES, **HEADS, "logits_scaling": 0.07}
    model = jaxgen.GraniteForCausalLM(jaxgen.GraniteConfig(**sizes), rngs=nnx.Rngs(0))
    prompts, used = [prompt_of(5, 0), prompt_of(9, 0)], ("temperature", "frequency_penalty")
    asked: dict[str, Any] = {"do_sample": True, "top_k": 0, "max_new_tokens": 30, "eos_token_id": None}
    with jaxgen.Engine(model, rows=3, slots=48, chunk=8, processors=used, constraints=None) as engine:
        for name, value in {"temperature": 1.3, "frequency_penalty": 0.3}.items():
            options = {**asked, name: value}
            outputs = engine.generate_batch(prompts, seed=0, **options).values()
            assert exactly(model, outputs, engine.strict, **options) == 0


# The trainer's weights.


def test_a_state_of_numpy_is_refused_by_name():
    """As some libraries restore one."""
    graph, state = nnx.split(tiny())
    model = nnx.merge(graph, jax.tree.map(np.asarray, state))
    for call in (lambda: model.generate([[1, 5]]), lambda: jaxgen.score_tokens(model, [[1, 5]], 1)):
        with pytest.raises(JaxgenError, match="arrays of numpy, on no device"):
            call()
    restored = nnx.merge(graph, jax.device_put(nnx.state(model)))
    assert (restored.generate([[1, 5]], max_new_tokens=2) == tiny().generate([[1, 5]], max_new_tokens=2)).all()


@pytest.mark.parametrize("updates", some_slow([3, 100], soak=lambda updates: updates > 3))
def test_an_engine_has_the_weights_of_now_and_compiles_nothing(updates: int):
    model, prompts = tiny(), [prompt_of(17, 0), prompt_of(9, 0)]
    params = nnx.state(model)
    update = jax.jit(lambda params: jax.tree.map(lambda x: 0.9 * x, params))
    options = {**SAMPLE, "max_new_tokens": 3}
    with jaxgen.Engine(model, rows=4, slots=32, chunk=8) as engine:
        engine.generate_batch(prompts, seed=0, **options)
        params = update(params)
        nnx.update(model, params)
        with counted() as compilations:
            for seed in range(updates):
                params = update(params)
                nnx.update(model, params)
                outputs = engine.generate_batch(prompts, seed=seed, num_return_sequences=2, **options).values()
        assert not compilations
        assert exactly(model, outputs, engine.strict, **options) == 0  # and not what was read with older ones
        assert engine._batch._weights is None  # nobody keeps the old ones


def test_rows_end_with_the_weights_that_they_began_with():
    model, prompt = tiny(), prompt_of(9, 0)
    options: dict[str, Any] = {"max_new_tokens": 20, "eos_token_id": None}
    with jaxgen.Engine(model, rows=2, slots=32, chunk=8, steps=1) as engine:
        wanted = engine.submit(prompt, **options).result(60).token_ids
        real, go_on = engine._batch._programs, threading.Event()
        engine._batch._programs = real._replace(decode=lambda *given: go_on.wait(60) and real.decode(*given))
        before = engine.submit(prompt, **options)
        params = nnx.state(model)
        nnx.update(model, jax.tree.map(lambda x: -x, params))
        after = [engine.submit(prompt, **options) for _ in range(3)]
        go_on.set()
        assert before.result(60).token_ids == wanted
        whole: Any = model.generate([prompt], strict=engine.strict, **options)
        own = whole[0, 9:].tolist()
        assert own != wanted
        assert [handle.result(60).token_ids for handle in after] == [own] * 3


# A trainer's LoRA: a correction beside four bits in the blocks, flax's module around the head.

LINEAR = ("self_attn.qkv_proj", "self_attn.o_proj", "mlp.gate_up_proj", "mlp.down_proj")


def blocks(model: Any) -> list[Any]:
    """The linear layers of all blocks."""
    return [operator.attrgetter(name)(layer) for layer in model.model.layers for name in LINEAR]


def with_lora() -> Any:
    model: Any = tiny(load_in_4bit=True)
    for layer in blocks(model):
        rows, width = layer.weight[...].shape
        factors = jax.device_put((np.ones((2, width), "f"), np.ones((rows, 2), "f")), jax.devices()[0])
        layer.weight = QuantizedWeight(Adapted(layer.weight[...], *factors))
    model.lm_head = nnx.LoRA(32, 2, 97, base_module=model.lm_head, rngs=nnx.Rngs(0))
    nnx.update(model, jax.device_put(nnx.state(model), jax.devices()[0]))
    return model


def updated(state: Any, rng: np.random.Generator) -> Any:
    """Other factors in the same places; the bases are the same arrays."""

    def new(x: Any) -> Any:
        return jax.device_put(rng.normal(0, 0.3, x.shape).astype("f"), jax.devices()[0])

    def one(path: Any, x: Any) -> Any:
        if isinstance(x, Adapted):
            return dataclasses.replace(x, down=new(x.down), up=new(x.up))
        return new(x) if "lora" in str(path) else x

    return jax.tree_util.tree_map_with_path(one, state, is_leaf=lambda x: isinstance(x, Adapted))


def merge(model: Any, dense: Any) -> None:
    """Give a model of plain weights what the other one means: W + B A, by numpy."""
    for layer, plain in zip(blocks(model), blocks(dense), strict=True):
        weight = layer.weight[...]
        down, up, base = (np.asarray(x, np.float64) for x in (weight.down, weight.up, weight.base.dequantize()))
        plain.weight[...] = jnp.asarray(base + up @ down, jnp.float32)
    head = model.lm_head
    base, a, b = (np.asarray(x[...], np.float64) for x in (head.base_module.weight, head.lora_a, head.lora_b))
    dense.lm_head.weight[...] = jnp.asarray(base + (a @ b).T, jnp.float32)


@pytest.mark.parametrize("updates", some_slow([3, 100], soak=lambda updates: updates > 3))
def test_a_lora_that_is_trained_compiles_nothing_and_is_what_the_merged_weights_are(updates: int):
    """In `generate`, an engine and scores; the last is also to the last bit what the engine said."""
    model, dense, rng = with_lora(), tiny(), np.random.default_rng(0)
    prompts: Any = [prompt_of(9, 0), prompt_of(9, 4)]
    options: dict[str, Any] = {"max_new_tokens": 6, "eos_token_id": None}
    seen = set()
    with jaxgen.Engine(model, rows=2, slots=16, chunk=8, processors=(), constraints=None) as engine:
        for update in range(1 + updates):
            nnx.update(model, updated(nnx.state(model), rng))
            with counted() as compilations:
                out: Any = model.generate(prompts, return_dict_in_generate=True, **options)
                outputs = [*engine.generate_batch(prompts, **options).values()]
                rows = out.sequences, out.prompt_lengths, out.attention_mask
                scores = jaxgen.score_tokens(model, *rows, **options)
                assert exactly(model, outputs, engine.strict, **options) == 0
            assert update < 1 or not compilations

            merge(model, dense)
            wanted: Any = dense.generate(prompts, return_dict_in_generate=True, **options)
            np.testing.assert_array_equal(out.sequences, wanted.sequences)
            assert [output.generated_tokens for output in outputs] == wanted.sequences[:, 9:].tolist()
            for found in (out, scores):
                np.testing.assert_allclose(found.model_logprobs, wanted.model_logprobs, atol=2e-4)
            seen.add(out.sequences.tobytes())
    assert len(seen) > updates // 2  # what was updated decides the tokens
