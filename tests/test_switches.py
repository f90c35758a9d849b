"""JAX's switches for the whole process, as research code sets them, change no byte of what jaxgen computes."""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jaxgen
from jaxgen import GenerationConfig, MistralForCausalLM, demo
from jaxgen.convert.quantize.gptq import gptq
from jaxgen.quant import quantize
from tests.formats.digests import digests
from tests.helpers import some_slow

PROMPT = np.array([[0, 0, 1, 7, 19, 7, 19, 7], [1, 5, 9, 30, 31, 30, 31, 30]])
MASK = (PROMPT > 0).astype(int)
WEIGHT = np.random.default_rng(0).standard_normal((8, 256)).astype(np.float32)
SAMPLED = {"do_sample": True, "seed": 3, "return_dict_in_generate": True}
PURE = GenerationConfig(max_new_tokens=4, do_sample=True, top_k=20, top_p=0.9, return_dict_in_generate=True)
CALLS: dict[str, Callable[[MistralForCausalLM], Any]] = {
    "greedy": lambda model: model.generate(PROMPT, MASK, max_new_tokens=6),
    "greedy, ids from JAX": lambda model: model.generate(jnp.asarray(PROMPT), jnp.asarray(MASK), max_new_tokens=6),
    "every processor": lambda model: model.generate(
        PROMPT, MASK, max_new_tokens=6, **SAMPLED, temperature=0.9, top_k=20, top_p=0.9, min_p=0.01, top_h=0.9,
        typical_p=0.9, epsilon_cutoff=1e-4, eta_cutoff=1e-4, repetition_penalty=1.1, encoder_repetition_penalty=1.1,
        no_repeat_ngram_size=3, encoder_no_repeat_ngram_size=4, bad_words_ids=[[5, 6]], sequence_bias={(7, 8): 0.5},
        renormalize_logits=True, remove_invalid_values=True, exponential_decay_length_penalty=(2, 1.01),
        suppress_tokens=[3], begin_suppress_tokens=[4], min_new_tokens=2, top_logprobs=2, output_scores=True,
        output_logits=True, watermarking_config={"bias": 1.0}, guidance_scale=1.5,
    ),
    "beams": lambda model: model.generate(PROMPT, MASK, max_new_tokens=6, num_beams=2, length_penalty=0.5),
    "prompt lookup": lambda model: model.generate(PROMPT, MASK, max_new_tokens=6, prompt_lookup_num_tokens=2),
    "an assistant": lambda model: model.generate(PROMPT, MASK, max_new_tokens=6, assistant_model=model),
    "a small cache": lambda model: model.generate(
        PROMPT, MASK, max_new_tokens=6, cache_implementation="quantized", prefill_chunk_size=4
    ),
    "a continued call": lambda model: model.generate(
        PROMPT[1:], max_new_tokens=6, past_key_values=model.generate(PROMPT[1:, :5], **SAMPLED).past_key_values
    ),
    "hidden states": lambda model: model.generate(
        PROMPT, MASK, max_new_tokens=2, return_dict_in_generate=True, output_hidden_states=True, output_attentions=True
    ).hidden_states,
    "the pure function": lambda model: jaxgen.generate(
        model, jnp.asarray(PROMPT), jnp.asarray(MASK), jax.random.key(1), PURE
    ),
    "the pure function in a jit": lambda model: jax.jit(
        lambda ids, mask, key: jaxgen.generate(model, ids, mask, key, PURE)
    )(jnp.asarray(PROMPT), jnp.asarray(MASK), jax.random.key(1)),
    "a text": lambda model: list(model.stream("A list of colors: red, blue", max_new_tokens=5, stop_strings=["green"])),
    "a score": lambda model: model.score(["Portugal is a country"])[0].logprobs,
    "logits": lambda model: model(jnp.asarray(PROMPT), jnp.asarray(MASK)).logits,
    "int4": lambda model: quantize(WEIGHT, 32),
    "int4 without a search": lambda model: quantize(WEIGHT, 32, search=False),
    "int4 in a jit": lambda model: jax.jit(lambda weight: quantize(weight, 32))(WEIGHT),
    "GPTQ": lambda model: gptq(WEIGHT, WEIGHT.T @ WEIGHT + np.eye(256, dtype=np.float32), 32, "weight"),
}  # fmt: skip
SWITCHES = {
    "x64": {"jax_enable_x64": True},
    "strict": {"jax_numpy_dtype_promotion": "strict", "jax_numpy_rank_promotion": "raise"},
    "unpartitionable": {"jax_threefry_partitionable": False},
}


@contextlib.contextmanager
def switched(settings: dict[str, Any]):
    before = {name: getattr(jax.config, name) for name in settings}
    try:
        for name, value in settings.items():
            jax.config.update(name, value)
        yield
    finally:
        for name, value in before.items():
            jax.config.update(name, value)


@pytest.fixture(scope="module")
def model() -> Any:
    return jaxgen.AutoModelForCausalLM.from_pretrained(demo.path())


def leaves(result: Any) -> list[np.ndarray]:
    result = vars(result) if hasattr(result, "sequences") else result
    return [
        np.asarray(x)
        for x in jax.tree.leaves(result)
        if not callable(x) and isinstance(x, jax.Array | np.ndarray | str)
    ]


DEFAULT = ("greedy", "a text", "int4", "int4 in a jit")
RARE = ("greedy, ids from JAX", "beams", "an assistant", "a small cache", "a continued call", "hidden states", "logits")


@pytest.mark.parametrize("name", some_slow(CALLS, lambda name: name not in DEFAULT, lambda name: name in RARE))
def test_what_is_computed_does_not_depend_on_them(name: str, model: MistralForCausalLM):
    expected = leaves(CALLS[name](model))
    assert expected
    for settings in SWITCHES.values():
        with switched(settings):
            found = leaves(CALLS[name](model))
        for one, other in zip(found, expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("switch", some_slow(SWITCHES, lambda switch: True, lambda switch: switch != "x64"))
def test_loading_does_not_depend_on_them(switch: str):
    def weights() -> list[np.ndarray]:
        loaded = jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), load_in_4bit=True)
        from jaxgen.generation.programs.structure import split

        return leaves(split(loaded)[1])

    expected = weights()
    with switched(SWITCHES[switch]):
        for one, other in zip(weights(), expected, strict=True):
            assert one.dtype == other.dtype
            np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_quantisers_and_readers_of_files_make_the_same_bytes_in_a_process_of_64_bits(tmp_path):
    expected = digests(tmp_path)
    command = [sys.executable, "-m", "tests.formats.digests"]
    environment = os.environ | {"JAX_ENABLE_X64": "1"}
    root = Path(__file__).parents[1]
    found = json.loads(subprocess.check_output(command, cwd=root, env=environment, timeout=300))
    assert {name for name in expected if found.get(name) != expected[name]} == set()
    assert {"rtn", "gptq", "autoround"} <= expected.keys()
    formats = ("compressed-", "gptq-", "awq", "autoround-", "bitsandbytes", "MLX", "GGUF")
    assert [kind for kind in formats if not any(name.startswith(kind) for name in expected)] == []
