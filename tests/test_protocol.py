"""A model that has what the protocol says and nothing else: generation asks for no more."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import jaxgen
from jaxgen import GenerationConfig, MistralForCausalLM
from jaxgen.generation.generate import GenerationMixin
from jaxgen.models.protocol import CausalLM, DecodingModel, ModelConfig

PROMPTS = [[5, 6, 7], [0, 8, 9]]
MASK = [[1, 1, 1], [0, 1, 1]]


def members(*protocols: type) -> set[str]:
    return {name for kind in protocols for name in (*vars(kind), *vars(kind).get("__annotations__", ()))} - {
        name for name in dir(ModelConfig) if name.startswith("_")
    }


class Only:
    """What an object has under these names."""

    def __init__(self, whole: Any, names: set[str]):
        self.whole, self.names = whole, names

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name not in self.names:
            raise AttributeError(f"{name} is not in the protocol")
        return getattr(self.whole, name)

    def __hash__(self) -> int:
        return hash(self.whole)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Only) and self.whole == other.whole


class OwnModel(nnx.Module, GenerationMixin):
    """Made of another one, of which it shows what the protocol has."""

    def __init__(self, inner: MistralForCausalLM):
        self.inner = inner
        self.config = Only(inner.config, members(ModelConfig))
        self.generation_config = inner.generation_config


def shown(name: str) -> Any:
    if isinstance(vars(DecodingModel).get(name, vars(CausalLM).get(name)), property):
        return property(lambda self: getattr(self.inner, name))
    return lambda self, *args, **options: getattr(self.inner, name)(*args, **options)


for name in members(DecodingModel, CausalLM) - {"config", "generation_config"}:
    setattr(OwnModel, name, shown(name))


@pytest.fixture(scope="module")
def own(reference_model) -> OwnModel:
    return OwnModel(reference_model("gqa_4"))


def test_it_is_one(own):
    assert isinstance(own, CausalLM)
    assert not hasattr(own, "model") and not hasattr(own.config, "rope_theta")


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"do_sample": True, "seed": 1, "num_return_sequences": 2},
        {"num_beams": 2},
        {"prompt_lookup_num_tokens": 2},
        {"guidance_scale": 1.5},
    ],
    ids=str,
)
def test_it_generates(own, reference_model, options):
    both = [
        model.generate(PROMPTS, MASK, max_new_tokens=4, return_dict_in_generate=True, **options)
        for model in (own, reference_model("gqa_4"))
    ]
    np.testing.assert_array_equal(both[0].sequences, both[1].sequences)
    assert '"model"' in both[0].record.to_json()


def test_the_pure_function_takes_it(own, reference_model):
    ids, mask = jnp.asarray(PROMPTS), jnp.asarray(MASK)
    got = jaxgen.generate(own, ids, mask, config=GenerationConfig(max_new_tokens=4))
    expected = reference_model("gqa_4").generate(PROMPTS, MASK, max_new_tokens=4)
    np.testing.assert_array_equal(np.asarray(got)[:, : expected.shape[1]], expected)
