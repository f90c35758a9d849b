"""`generate` beyond greedy tokens: ends, layout, precedence of options, details, and the pure function."""

import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgen
from jaxgen import GenerateOutput, GenerationConfig, MistralConfig, MistralForCausalLM
from tests.helpers import some_slow

PROMPTS = np.array([[0, 0, 5, 6, 7], [8, 9, 10, 11, 12], [0, 3, 4, 5, 6]])
MASK = np.array([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])


@pytest.fixture(scope="module")
def model(reference_model) -> MistralForCausalLM:
    return reference_model("window_8")


def greedy_by_hand(model: MistralForCausalLM, prompt: list[int], count: int) -> list[int]:
    """The definition: read everything again for each token."""
    tokens = list(prompt)
    for _ in range(count):
        padded = np.array([tokens + [0] * (40 - len(tokens))])
        mask = (np.arange(40) < len(tokens)).astype(int)[None]
        tokens.append(int(np.asarray(model(padded, mask).logits)[0, len(tokens) - 1].argmax()))
    return tokens[len(prompt) :]


def test_eos_ends_a_row_and_pad_follows(model: MistralForCausalLM):
    free = model.generate(PROMPTS, MASK, max_new_tokens=12, eos_token_id=None)[:, 5:]
    eos = int(free[0, 3])  # ends row 0 after its fourth token at the latest
    output = model.generate(
        PROMPTS, MASK, max_new_tokens=12, eos_token_id=[96, eos], pad_token_id=90, return_dict_in_generate=True
    )
    assert isinstance(output, GenerateOutput)
    for row in range(3):
        tokens = free[row].tolist()
        stop = min((tokens.index(token) for token in (eos, 96) if token in tokens), default=11)
        assert output.lengths[row] == stop + 1
        assert output.finish_reason[row] == ("eos" if tokens[stop] in (eos, 96) else "length")
        expected = (tokens[: stop + 1] + [90] * 12)[: output.sequences.shape[1] - 5]
        assert output.sequences[row, 5:].tolist() == expected
        assert (output.logprobs[row, stop + 1 :] == 0).all()


def test_an_eos_in_the_prompt_does_not_stop(model: MistralForCausalLM):
    free = model.generate(PROMPTS, MASK, max_new_tokens=6, eos_token_id=None)
    assert not np.isin(free[:, 5:], PROMPTS[1, 2]).any(), "choose another prompt"
    stopping = model.generate(PROMPTS, MASK, max_new_tokens=6, eos_token_id=int(PROMPTS[1, 2]))
    np.testing.assert_array_equal(stopping, free)


@pytest.mark.slow
def test_the_result_is_trimmed_to_the_longest_row(model: MistralForCausalLM):
    first = model.generate(PROMPTS[1:2], max_new_tokens=1, eos_token_id=None)[0, -1]
    result = model.generate(PROMPTS[1:2], max_new_tokens=30, eos_token_id=int(first))
    assert result.shape == (1, 6)


def test_precedence_of_options(model: MistralForCausalLM):
    def width(**options) -> int:
        return model.generate([[5, 6]], eos_token_id=None, **options).shape[1]

    before = model.generation_config
    try:
        model.generation_config = GenerationConfig()
        assert width() == 22  # HF: the prompt and 20 more
        model.generation_config = GenerationConfig(max_new_tokens=7)
        assert width() == 9
        assert width(generation_config=GenerationConfig(max_new_tokens=5)) == 7
        assert width(generation_config=GenerationConfig(do_sample=False)) == 9  # inherits what it leaves open
        assert width(generation_config=GenerationConfig(max_new_tokens=5), max_new_tokens=3) == 5
        assert width(max_new_tokens=None, max_length=12) == 12
        assert width(max_length=4) == 9  # max_new_tokens wins over max_length, as in HF
    finally:
        model.generation_config = before


@pytest.mark.slow
def test_none_as_an_option_switches_off(model: MistralForCausalLM):
    first = int(model.generate([[5, 6]], max_new_tokens=1, eos_token_id=None)[0, -1])
    config = GenerationConfig(eos_token_id=first, max_new_tokens=9)
    assert model.generate([[5, 6]], generation_config=config, return_dict_in_generate=False).shape == (1, 3)
    assert model.generate(
        [[5, 6]], generation_config=config, eos_token_id=None, return_dict_in_generate=False
    ).shape == (1, 11)
    # top_k=None is "no top_k", not the default of 50: with 1 seed, some draw of many lies outside the 50.
    options = {"do_sample": True, "seed": 0, "max_new_tokens": 40, "eos_token_id": None, "temperature": 9.0}
    limited, free = (model.generate(PROMPTS, MASK, top_k=k, **options) for k in (50, None))
    assert (limited != free).any()


def test_hf_generation_config_objects_are_understood(model: MistralForCausalLM):
    import transformers

    config = transformers.GenerationConfig(max_new_tokens=3, eos_token_id=None)
    assert model.generate(
        [[5, 6]], generation_config=config, eos_token_id=None, return_dict_in_generate=False
    ).shape == (1, 5)
    before = model.generation_config
    model.generation_config = config
    assert model.generation_config == GenerationConfig(max_new_tokens=3)
    model.generation_config = before


def test_generation_config_file(tmp_path):
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"eos_token_id": [2, 7], "top_k": 0, "transformers_version": "5.0", "typical_p": 1.0}))
    config = GenerationConfig.from_hf(tmp_path)
    assert (config.eos_token_ids, config.top_k) == ((2, 7), 0)
    assert GenerationConfig.from_hf(config.to_hf()) == config


def test_inputs_of_every_kind_give_the_same(model: MistralForCausalLM):
    expected = model.generate(PROMPTS, MASK, max_new_tokens=4, eos_token_id=None)
    for convert in (np.asarray, jnp.asarray, np.ndarray.tolist, lambda x: x.astype(np.uint8)):
        result = model.generate(convert(PROMPTS), convert(MASK), max_new_tokens=4, eos_token_id=None)
        np.testing.assert_array_equal(result, expected)
        assert isinstance(result, np.ndarray)
        assert result.dtype == np.int32


def test_without_a_mask_every_id_is_read(model: MistralForCausalLM):
    """Unlike HF, no mask is guessed from pad_token_id: an id means the same whatever the padding is."""
    result = model.generate(PROMPTS, max_new_tokens=4, eos_token_id=None, pad_token_id=0)
    expected = model.generate(PROMPTS, np.ones_like(MASK), max_new_tokens=4, eos_token_id=None)
    np.testing.assert_array_equal(result, expected)
    assert (result != model.generate(PROMPTS, MASK, max_new_tokens=4, eos_token_id=None)).any()


def test_padding_ids_are_returned_as_given_and_never_read(model: MistralForCausalLM):
    ids = np.where(MASK == 0, 10**6, PROMPTS)  # outside the vocabulary, but masked
    result = model.generate(ids, MASK, max_new_tokens=4, eos_token_id=None)
    expected = model.generate(PROMPTS, MASK, max_new_tokens=4, eos_token_id=None)
    np.testing.assert_array_equal(result[:, :5], ids)
    np.testing.assert_array_equal(result[:, 5:], expected[:, 5:])


def test_logprobs_are_those_of_the_model(model: MistralForCausalLM):
    output = model.generate(
        PROMPTS, MASK, max_new_tokens=8, do_sample=True, temperature=0.7, top_k=5, seed=1, eos_token_id=None,
        return_dict_in_generate=True,
    )  # fmt: skip
    assert isinstance(output, GenerateOutput)
    mask = np.concatenate([MASK, np.ones((3, 8), int)], axis=1)
    logits = np.asarray(model(output.sequences, mask).logits, np.float64)[:, 4:-1]
    for row in range(3):
        for step, token in enumerate(output.sequences[row, 5:]):
            own = logits[row, step]
            np.testing.assert_allclose(
                output.model_logprobs[row, step], own[token] - np.log(np.exp(own).sum()), atol=1e-4
            )
            top = np.sort(own)[-5:] / 0.7
            drawn_from = own[token] / 0.7 - np.log(np.exp(top).sum())
            np.testing.assert_allclose(output.logprobs[row, step], drawn_from, atol=1e-4)


@pytest.mark.slow
def test_num_return_sequences_prefills_once(model: MistralForCausalLM):
    options = {"do_sample": True, "max_new_tokens": 6, "seed": 4, "eos_token_id": None}
    several = model.generate(PROMPTS, MASK, num_return_sequences=4, **options)
    assert several.shape == (12, 11)
    np.testing.assert_array_equal(several[:, :5], np.repeat(PROMPTS, 4, axis=0))  # HF's order
    assert len({tuple(row) for row in several[:4].tolist()}) > 1
    np.testing.assert_array_equal(several[::4], model.generate(PROMPTS, MASK, **options))  # sample 0 is the plain one
    seen = []

    class Spy(type(model)):
        def prefill(self, tokens, *sizes):
            seen.append(tokens.shape)
            return super().prefill(tokens, *sizes)

    spy = Spy(model.config, rngs=nnx.Rngs(0))
    spy.generate(PROMPTS, MASK, num_return_sequences=4, **options)
    assert seen == [(3, 16)]  # traced once, with 3 rows and not 12


def test_a_model_with_nan_weights_raises_and_names_row_and_step(model: MistralForCausalLM):
    structure, weights = nnx.split(model)
    broken = nnx.merge(structure, jax.tree.map(jnp.copy, weights))  # merge alone would share the variables
    embeddings = np.asarray(broken.model.embed_tokens.weight[...]).copy()
    tokens = model.generate(PROMPTS[1:2], max_new_tokens=6, eos_token_id=None)[0, 5:].tolist()
    assert tokens[2] not in tokens[:2]
    embeddings[tokens[2]] = np.nan  # reading the third new token breaks the draw of the fourth
    broken.model.embed_tokens.weight[...] = jnp.asarray(embeddings)
    with pytest.raises(jaxgen.NonFiniteLogitsError, match="row 1 at step 3") as caught:
        broken.generate(np.stack([PROMPTS[2], PROMPTS[1]]), MASK[[2, 1]], max_new_tokens=6, eos_token_id=None)
    assert (caught.value.rows[-1], caught.value.steps[-1]) == (1, 3)


class TestPureFunction:
    def test_equals_the_method_inside_jit(self, model: MistralForCausalLM):
        structure, weights = nnx.split(model)
        config = GenerationConfig(max_new_tokens=6, eos_token_id=96, do_sample=True, top_p=0.9)

        @jax.jit
        def run(weights, ids, mask, key):
            return jaxgen.generate(nnx.merge(structure, weights), ids, mask, key, config)

        key = jax.random.key(3)
        expected = model.generate(PROMPTS, MASK, key=key, generation_config=config, return_dict_in_generate=False)
        result = run(weights, jnp.asarray(PROMPTS), jnp.asarray(MASK), key)
        assert result.shape == (3, 11)
        np.testing.assert_array_equal(result[:, : expected.shape[1]], expected)

    @pytest.mark.slow
    def test_vmap_over_keys_equals_one_by_one(self, model: MistralForCausalLM):
        config = GenerationConfig(max_new_tokens=5, do_sample=True, return_dict_in_generate=True)
        keys = jax.random.split(jax.random.key(0), 4)

        def run(key):
            return jaxgen.generate(model, jnp.asarray(PROMPTS), jnp.asarray(MASK), key, config)

        together = jax.vmap(run)(keys)
        assert together["sequences"].shape == (4, 3, 10)
        for index in range(4):
            alone = model.generate(PROMPTS, MASK, key=keys[index], generation_config=config)
            assert isinstance(alone, GenerateOutput)
            np.testing.assert_array_equal(together["sequences"][index][:, : alone.sequences.shape[1]], alone.sequences)
        assert len({np.asarray(s).tobytes() for s in together["sequences"]}) == 4

    def test_sampling_without_a_key_raises(self, model: MistralForCausalLM):
        with pytest.raises(jaxgen.JaxgenError, match="do_sample=True needs key="):
            jaxgen.generate(model, PROMPTS, config=GenerationConfig(do_sample=True))

    def test_the_method_under_jit_points_to_the_function(self, model: MistralForCausalLM):
        structure, weights = nnx.split(model)
        for call in (
            lambda: jax.jit(model.generate)(PROMPTS),
            lambda: jax.vmap(lambda key: model.generate(PROMPTS, key=key))(jax.random.split(jax.random.key(0), 2)),
            lambda: jax.jit(lambda weights: nnx.merge(structure, weights).generate(PROMPTS))(weights),
        ):
            with pytest.raises(jaxgen.JaxgenError, match=r"jaxgen\.generate"):
                call()

    @pytest.mark.slow
    def test_a_jit_of_the_users_sees_changed_defaults(self, model: MistralForCausalLM):
        before = model.generation_config
        run = nnx.jit(lambda model: jaxgen.generate(model, PROMPTS, config=GenerationConfig(max_new_tokens=4)))
        plain = run(model)
        model.generation_config = GenerationConfig(eos_token_id=None, repetition_penalty=1e6)
        penalised = run(model)
        model.generation_config = before
        assert (np.asarray(plain) != np.asarray(penalised)).any()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(nnx, "set_graph_mode"), reason="this flax has one mode only")
@pytest.mark.parametrize("graph", [True, False])
def test_both_modes_of_nnx(graph: bool, model: MistralForCausalLM):
    expected = model.generate(PROMPTS, MASK, max_new_tokens=5, eos_token_id=None)
    with nnx.set_graph_mode(graph), nnx.set_graph_updates(graph):
        result = model.generate(PROMPTS, MASK, max_new_tokens=5, eos_token_id=None)
        fresh = MistralForCausalLM(model.config, rngs=nnx.Rngs(0))
        assert fresh.generate([[1, 2]], max_new_tokens=3, eos_token_id=None).shape == (1, 5)
    np.testing.assert_array_equal(result, expected)


@pytest.mark.parametrize("dtype", some_slow(["bfloat16", "float16"], "bfloat16".__eq__))
def test_half_precision(dtype: str):
    """Computed in 16 bits the demo says the same: its margins are wide."""
    half: Any = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), dtype=dtype)
    full = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), dtype="float32")
    from jaxgen.text.tokenizer import load_tokenizer

    inputs = load_tokenizer(jaxgen.demo.path())(["A list of colors: red, blue", "1, 2"], padding=True)
    assert half.dtype == jnp.dtype(dtype)
    np.testing.assert_array_equal(half.generate(**inputs), full.generate(**inputs))


@pytest.mark.slow
def test_overflow_to_infinity_raises_too():
    half: Any = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), dtype="float16")
    half.lm_head.weight[...] = half.lm_head.weight[...] * 30000
    with pytest.raises(jaxgen.NonFiniteLogitsError, match="row 0 at step 0"):
        half.generate([[1, 2]])


def test_generation_far_past_the_window(model: MistralForCausalLM):
    assert model.config.sliding_window == 8
    result = model.generate(PROMPTS[1:2], max_new_tokens=30, eos_token_id=None)[0, 5:].tolist()
    assert result == greedy_by_hand(model, PROMPTS[1].tolist(), 30)


@pytest.mark.slow
def test_long_prompts_are_read_in_blocks(model: MistralForCausalLM):
    """Past 512 tokens the prompt's attention runs block by block: same tokens as reading a row again and again."""
    config = MistralConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, sliding_window=600, max_position_embeddings=4096,
    )  # fmt: skip
    long = MistralForCausalLM(config, rngs=nnx.Rngs(1))
    prompt = np.random.default_rng(0).integers(0, 97, (1, 1030))
    tokens = long.generate(prompt, max_new_tokens=3, eos_token_id=None)[0, 1030:].tolist()
    for count in range(3):  # 1031 is not a multiple of 512: model(...) reads it in one piece
        everything = np.concatenate([prompt, [tokens[:count]]], axis=1).astype(np.int32)
        assert int(np.asarray(long(everything).logits)[0, -1].argmax()) == tokens[count]
