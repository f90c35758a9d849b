"""Bad input: a typed error that names field, row, value and limit, within a second, and nothing compiled."""

import json
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from jaxgen import GenerationConfig, JaxgenError, MistralConfig, MistralForCausalLM, UnsupportedError
from jaxgen.generation.prepare import prepare
from jaxgen.generation.prompts import memory
from jaxgen.generation.results.score import score
from tests.helpers import counted

IDS = np.array([[1, 2, 3], [4, 5, 6]])


class _OfTransformers:
    """What one of transformers' own processors looks like; the real ones want torch."""

    def __call__(self, input_ids, scores):
        return scores


class _Streamer:
    def put(self, value):
        raise AssertionError("nothing must be generated")

    def end(self):
        pass


_OfTransformers.__module__ = "transformers.generation.logits_process"


@pytest.fixture(scope="module")
def model() -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64,
    )  # fmt: skip
    return MistralForCausalLM(config, rngs=nnx.Rngs(0))


BAD_PROMPTS = {
    "id beyond the vocabulary": (([[1, 2], [3, 50]], None), r"input_ids\[1, 1\]=50 .* vocabulary of 50"),
    "negative id": (([[1, -1]], None), r"input_ids\[0, 1\]=-1 "),
    "no tokens": (([[]], None), "empty prompt"),
    "no rows": ((np.zeros((0, 3), int), None), "empty prompt"),
    "a masked id past 32 bits": (([[2**40, 2]], [[0, 1]]), r"input_ids\[0, 0\]=1099511627776 is not a 32-bit int"),
    "a row of padding": ((IDS, [[1, 1, 1], [0, 0, 0]]), "row 1 has no real token"),
    "one dimension": (([1, 2, 3], None), r"shape \(3,\); expected \[batch, length\]"),
    "ragged": (([[1, 2], [3]], None), "different lengths.*padding=True"),
    "floats": ((IDS * 1.0, None), "dtype float64; expected ints"),
    "text": (("Hello", None), "input_ids is a text"),
    "a mapping of something else": (({"ids": IDS}, None), "has no input_ids; it has"),
    "mask of another shape": ((IDS, [[1, 1], [1, 1]]), r"attention_mask has shape \(2, 2\), input_ids has \(2, 3\)"),
    "mask with other values": ((IDS, [[1, 1, 1], [1, 2, 1]]), r"attention_mask\[1, 1\]=2 must be 0 or 1"),
    "prompt as long as the context": ((np.ones((1, 64), int), None), "64 tokens; the model's context of 64"),
}

BAD_OPTIONS = {
    "temperature zero": ({"temperature": 0.0, "do_sample": True}, "temperature=0.0 .*do_sample=False"),
    "temperature negative": ({"temperature": -1, "do_sample": True}, "temperature=-1 must be"),
    "temperature nan": ({"temperature": float("nan")}, "temperature=nan must be"),
    "temperature infinite": ({"temperature": float("inf")}, "temperature=inf must be"),
    "temperature text": ({"temperature": "hot"}, "temperature='hot' must be"),
    "top_p zero": ({"top_p": 0.0, "do_sample": True}, r"top_p=0.0 must be a number in \(0, 1\]"),
    "top_p above one": ({"top_p": 1.5, "do_sample": True}, r"top_p=1.5 must be"),
    "min_p negative": ({"min_p": -0.1, "do_sample": True}, r"min_p=-0.1 must be a number in \[0, 1\]"),
    "top_k negative": ({"top_k": -1, "do_sample": True}, "top_k=-1 must be an int of at least 0"),
    "top_k a float": ({"top_k": 1.5}, "top_k=1.5 must be an int"),
    "repetition_penalty zero": ({"repetition_penalty": 0}, "repetition_penalty=0 must be"),
    "max_new_tokens zero": ({"max_new_tokens": 0}, "max_new_tokens=0 must be an int of at least 1"),
    "max_new_tokens negative": ({"max_new_tokens": -5}, "max_new_tokens=-5"),
    "max_new_tokens true": ({"max_new_tokens": True}, "max_new_tokens=True"),
    "max_length inside the prompt": ({"max_length": 3}, "max_length=3 leaves nothing"),
    "min_new_tokens above the limit": ({"min_new_tokens": 9, "max_new_tokens": 5}, "min_new_tokens=9 .* 5 tokens"),
    "min_new_tokens above the default": ({"min_new_tokens": 21}, "min_new_tokens=21 .* default of 20"),
    "temperature past float32": ({"temperature": 1e40}, r"temperature=1e\+40 must be at most 3.403e\+38 in size"),
    "temperature too small": (
        {"temperature": 1e-40, "do_sample": True},
        "=1e-40 must be at least 1.175e-38 in size",
    ),
    "top_k past int32": ({"top_k": 2**40, "do_sample": True}, "top_k=1099511627776 must be an int of at most"),
    "past the context": ({"max_new_tokens": 62}, "max_new_tokens=62 exceed .* 64 tokens; at most 61 new tokens fit"),
    "num_return_sequences zero": ({"num_return_sequences": 0}, "num_return_sequences=0"),
    "several greedy sequences": ({"num_return_sequences": 2}, "num_return_sequences=2 needs do_sample=True"),
    "eos outside the vocabulary": ({"eos_token_id": [2, 50]}, "eos_token_id=50 .* vocabulary of 50"),
    "negative eos": ({"eos_token_id": -1}, "eos_token_id=-1"),
    "do_sample not a bool": ({"do_sample": 1}, "do_sample=1 must be True or False"),
    "key and seed": ({"key": jax.random.key(0), "seed": 0}, "both key and seed"),
    "rbg key": ({"key": jax.random.key(0, impl="rbg")}, "rbg"),
    "a number as key": ({"key": 7}, "seed="),
    "many keys": ({"key": jax.random.split(jax.random.key(0), 3)}, "seed or key holds 3, input_ids 2 rows"),
    "seed a float": ({"seed": 1.5}, "seed=1.5 must be an int"),
    "seed in lists": ({"seed": [[[5], 1]]}, r"seed\[0\]=\[\[5\], 1\] must be an int"),
    "too few row ids": ({"row_ids": [1]}, "2 rows, got 1"),
    "row id a float": ({"row_ids": [1, 2.5]}, r"row_ids\[1\]=2.5 must be an int or a string"),
    "a string as row ids": ({"row_ids": "ab"}, "row_ids must hold"),
    "a typo": ({"temprature": 0.5}, "'temprature' is not a generation option; did you mean 'temperature'"),
    "nonsense": ({"zzz": 1}, "'zzz' is not a generation option"),
    "more sequences than beams": ({"num_beams": 2, "num_return_sequences": 3}, "num_return_sequences=3 .* num_beams=2"),
    "beams and a streamer": ({"num_beams": 2, "streamer": _Streamer()}, "streamer.*num_beams=1"),
    "beams and speculation": ({"num_beams": 2, "prompt_lookup_num_tokens": 3}, "exclude each other"),
    "beams and hidden states": (
        {"num_beams": 2, "return_dict_in_generate": True, "output_hidden_states": True},
        "output_hidden_states with num_beams",
    ),
    "scores that nobody sees": ({"output_scores": True}, "output_scores=True needs return_dict_in_generate=True"),
    "stop strings without a tokenizer": ({"stop_strings": ["x"]}, "stop_strings needs tokenizer="),
    "an empty stop string": ({"stop_strings": ""}, "stop_strings.* is empty: it would stop every row"),
    "min_length above the limit": ({"min_length": 24}, "min_length=24 asks more of row 0 than the 20 tokens"),
    "a processor of transformers": (
        {"logits_processor": [_OfTransformers()]},
        "_OfTransformers of transformers works on torch tensors",
    ),
    "a processor that is none": ({"logits_processor": [3]}, "logits_processor=.* must be a function"),
    "negative prompt without guidance": ({"negative_prompt_ids": [[1]]}, "negative_prompt_ids needs guidance_scale"),
    "negative prompt of another batch": (
        {"negative_prompt_ids": [[1]] * 3, "guidance_scale": 2.0},
        "negative_prompt_ids has 3 rows; expected 2",
    ),
    "negative mask without a negative prompt": (
        {"negative_prompt_attention_mask": [[1], [1]], "guidance_scale": 2.0},
        "negative_prompt_attention_mask was given without",
    ),
    "negative prompt past the context": (
        {"negative_prompt_ids": [[1] * 60], "guidance_scale": 2.0, "max_new_tokens": 5},
        "negative_prompt_ids: the 60 tokens of row 0 and its 5 new ones exceed the model's context of 64",
    ),
    "a chunk size without a streamer": ({"chunk_size": 4}, "chunk_size=4 .* there is no streamer"),
    "a streamer that is none": ({"streamer": object()}, "streamer"),
    "a chunk size of zero": ({"streamer": _Streamer(), "chunk_size": 0}, "chunk_size=0 must be"),
    "a cache that is none": (
        {"cache_implementation": "offloaded"},
        "'offloaded' is not supported; choose from 'static'",
    ),
    "another config object": ({"generation_config": 3}, "cannot read int"),
}


def expect(message: str, call) -> None:
    start = time.perf_counter()
    with counted() as compilations, pytest.raises(JaxgenError, match=message):
        call()
    assert not compilations
    assert time.perf_counter() - start < 1  # what the user waits for an error, not a benchmark


@pytest.mark.parametrize("name", BAD_PROMPTS)
def test_bad_prompt(name: str, model):
    arguments, message = BAD_PROMPTS[name]
    expect(message, lambda: model.generate(*arguments))


@pytest.mark.parametrize("name", BAD_OPTIONS)
def test_bad_option(name: str, model):
    options, message = BAD_OPTIONS[name]
    expect(message, lambda: model.generate(IDS, **options))


@pytest.mark.parametrize(
    ("ids", "mask", "message"),
    [
        (IDS, [[1]], r"attention_mask has shape \(1, 1\), input_ids has \(2, 3\)"),
        (IDS, [[1], [1]], r"attention_mask has shape \(2, 1\)"),
        (IDS, [1, 1, 1], r"attention_mask has shape \(3,\)"),
        ([1, 2, 3], None, r"input_ids has shape \(3,\); expected \[batch, length\]"),
        ([[]], None, r"input_ids has shape \(1, 0\)"),
        ([[1.7, 2.2]], None, "input_ids has dtype float32; expected ints"),
    ],
)
def test_shapes_and_dtypes_are_checked_inside_jit_too(model, ids, mask, message):
    ids, mask = jnp.asarray(ids), None if mask is None else jnp.asarray(mask)
    config = GenerationConfig(max_new_tokens=2)
    # Not by `jaxgen.generate`: in tests its annotated shapes are checked first.
    expect(message, lambda: jax.jit(lambda ids: prepare(model, ids, mask, config, inside_jit=True).prompts.tokens)(ids))


@pytest.mark.parametrize("name", ["batch", "prompt_length", "max_new_tokens"])
@pytest.mark.parametrize("value", [0, True])
def test_sizes_to_warm_up_for(model, name, value):
    sizes = {"batch": 1, "prompt_length": 2, "max_new_tokens": 1, name: value}
    expect(f"{name}={value!r} must be", lambda: model.warmup(**sizes))


@pytest.mark.parametrize(("texts", "row"), [([1, 2], 0), (["a", None], 1), (("a", ["b"]), 1)])
def test_what_is_scored_are_texts(model, texts, row):
    expect(rf"texts\[{row}\] is of type .*, and not a text", lambda: score(model, texts, object(), 8))


def test_an_option_is_unset_and_not_deleted(model):
    with pytest.raises(JaxgenError, match=r"config.top_k cannot be deleted; set it to None"):
        del model.generation_config.top_k


def test_every_unsupported_field_raises_by_name(model):
    """Every field that transformers has is supported, inert at its default, or refused by name."""
    import transformers

    supported = set(GenerationConfig.__dataclass_fields__)
    for name in vars(transformers.GenerationConfig()):
        if name in supported or name in ("transformers_version", "_from_model_config"):
            continue
        with pytest.raises(UnsupportedError, match=f"{name}=.*not supported by jaxgen"):
            GenerationConfig(**{name: "something"})


def test_what_transformers_calls_its_defaults_is_accepted():
    import transformers

    defaults = transformers.GenerationConfig._get_default_generation_params()
    GenerationConfig.from_hf(defaults)


def test_memory(model, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(memory, "free_bytes", lambda device: 200_000)
    # One layer, one key-value head of 8, float32: 64 bytes per token and row.
    config = MistralConfig(**{**vars(model.config), "max_position_embeddings": 10**6, "sliding_window": None})
    big = MistralForCausalLM(config, rngs=nnx.Rngs(0))
    message = r"2 rows of 4096 tokens .* 0.00 GB for the key-value cache and the prefill, .*at most 1008 new tokens fit"
    expect(message, lambda: big.generate(IDS, max_new_tokens=3500))
    first = int(big.generate(IDS[:1], max_new_tokens=1)[0, -1])
    assert big.generate(IDS[:1], max_new_tokens=1008, eos_token_id=first).shape == (1, 4)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 100)
    expect("fewer rows or a shorter prompt", lambda: big.generate(IDS))


def test_a_long_prompt_needs_memory_too(model, monkeypatch: pytest.MonkeyPatch):
    """Attention scores of 4 rows of 512 tokens: 2 heads * 512 * 512 * 4 bytes, twice, each; the cache is 1% of that."""
    config = MistralConfig(**{**vars(model.config), "max_position_embeddings": 10**6})
    big = MistralForCausalLM(config, rngs=nnx.Rngs(0))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 16_000_000)
    expect("use fewer rows or a shorter prompt", lambda: big.generate(np.ones((4, 500), int)))
    assert big.generate(np.ones((1, 500), int), max_new_tokens=1).shape == (1, 501)


@pytest.mark.parametrize("text", ["{", "[1]", '{"temperature": 0, "do_sample": true}', '{"num_beams": 0}', "\x00"])
def test_bad_generation_config_file(text: str, tmp_path):
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(JaxgenError):
        GenerationConfig.from_hf(tmp_path)


def test_generation_config_survives_json():
    config = GenerationConfig(do_sample=True, eos_token_id=[1, 2], temperature=np.float32(0.5), top_k=np.int64(4))
    assert GenerationConfig.from_hf(json.loads(json.dumps(config.to_hf()))) == config
