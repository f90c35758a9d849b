"""A trainer's state, divided over devices as FSDP does it: what samples and scores takes it as it is."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

import jaxgen
from jaxgen.errors import JaxgenError
from tests.engines import prompt_of, tiny
from tests.helpers import counted, padded

PROMPTS = [prompt_of(9, 0), prompt_of(5, 0), prompt_of(12, 4)]
IDS, MASK = padded(PROMPTS, "left", 0)
NEW = 10
GREEDY = jaxgen.GenerationConfig(max_new_tokens=NEW, eos_token_id=None, return_dict_in_generate=True)


@pytest.fixture
def mesh() -> Mesh:
    assert len(jax.devices()) == 8
    return Mesh(np.array(jax.devices()), ("fsdp",))


def divided(state: Any, mesh: Mesh) -> Any:
    """Every parameter in eight parts along its first axis that has so many: no device has all of any."""

    def place(x: Any) -> Any:
        axis = [size % 8 == 0 for size in x.shape].index(True)
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp")))

    return jax.tree.map(place, state)


def shardings(model: Any) -> list[Any]:
    return [x.sharding for x in jax.tree.leaves(nnx.state(model))]


def trained(graph: Any, params: Any) -> Any:
    """A step of a trainer, whose parameters stay where they are."""
    places = jax.tree.map(lambda x: x.sharding, params)

    def loss(params: Any) -> Any:
        return jaxgen.logprobs(nnx.merge(graph, params), jnp.asarray(IDS), jnp.asarray(MASK)).mean()

    def step(params: Any) -> Any:
        return jax.tree.map(lambda x, slope: x + 5 * slope, params, jax.grad(loss)(params))

    return jax.jit(step, out_shardings=places)


def sizes_of(params: Any) -> set[tuple[int, ...]]:
    return {tuple(sorted(x.shape)) for x in jax.tree.leaves(params) if x.ndim == 2}


def gathered(program: str) -> set[tuple[int, ...]]:
    """The sizes of what devices put together: with so few rows XLA sends these, and no weight."""
    results = re.findall(r"= (.*?) all-gather(?:-start)?\(", program)  # of several at once, a tuple
    assert results
    return {tuple(sorted(map(int, sizes.split(",")))) for sizes in re.findall(r"\[([\d,]+)\]", " ".join(results))}


@pytest.mark.slow
def test_it_gives_the_tokens_of_one_device_and_stays_where_it_is(mesh: Mesh):
    alone, model = tiny(), tiny()
    graph, params = nnx.split(model)
    params = divided(params, mesh)
    nnx.update(model, params)
    places, step = shardings(model), trained(graph, params)
    assert all(len(place.device_set) == 8 and not place.is_fully_replicated for place in places)
    step_alone = trained(*nnx.split(alone))
    inside = jax.jit(lambda params: jaxgen.generate(nnx.merge(graph, params), IDS, MASK, None, GREEDY)["sequences"])
    inside = inside.lower(params).compile()
    assert not sizes_of(params) & gathered(inside.as_text() or "")
    sampled = jaxgen.GenerationConfig(do_sample=True, top_k=5, max_new_tokens=NEW, eos_token_id=None)
    before: Any = None
    for update in range(3):
        with counted() as compilations:
            out: Any = model.generate(IDS, MASK, generation_config=GREEDY)
            tokens = inside(params)
            drawn = model.generate(IDS, MASK, generation_config=sampled, seed=0)
            scores = jaxgen.score_tokens(model, out.sequences, out.prompt_lengths, out.attention_mask)
        assert update < 1 or not compilations
        assert shardings(model) == places

        wanted: Any = alone.generate(IDS, MASK, generation_config=GREEDY)
        np.testing.assert_array_equal(out.sequences, wanted.sequences)
        np.testing.assert_array_equal(tokens, wanted.sequences)
        np.testing.assert_array_equal(drawn, alone.generate(IDS, MASK, generation_config=sampled, seed=0))
        np.testing.assert_allclose(scores.model_logprobs, wanted.model_logprobs, atol=1e-4)
        assert before is None or (out.model_logprobs != before).any()
        before = out.model_logprobs

        params = step(params)
        nnx.update(model, params)
        nnx.update(alone, step_alone(nnx.state(alone)))


def test_strict_scores_equal_what_was_drawn_to_the_last_bit(mesh: Mesh):
    model, strict = tiny(dtype=jnp.bfloat16), jaxgen.Strict(rows=4, tokens=32, chunk=8)
    nnx.update(model, divided(nnx.state(model), mesh))
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": 1.3, "max_new_tokens": NEW}
    out = model.generate(IDS, MASK, seed=1, strict=strict, return_dict_in_generate=True, **options)
    rows = out.sequences, out.prompt_lengths, out.attention_mask
    scores = jaxgen.score_tokens(model, *rows, strict=strict, **options)
    assert scores.logprobs.tobytes() == out.logprobs.tobytes()
    assert scores.model_logprobs.tobytes() == out.model_logprobs.tobytes()


# A mesh whose axes JAX wants to be told of at every use.


def explicit() -> Mesh:
    return Mesh(np.array(jax.devices()), ("fsdp",), axis_types=(AxisType.Explicit,))


def test_explicit_axes_are_refused_by_name():
    model = tiny()
    graph, params = nnx.split(model)
    params = divided(params, explicit())
    nnx.update(model, params)
    calls: list[Any] = [
        lambda: model.generate(IDS, MASK, generation_config=GREEDY),
        lambda: model(IDS, MASK),
        lambda: jax.jit(lambda params: jaxgen.generate(nnx.merge(graph, params), IDS, MASK, None, GREEDY))(params),
    ]
    for call in calls:
        with pytest.raises(JaxgenError, match=r"weight is divided over a mesh of explicit axes \('fsdp': 8\).*Auto"):
            call()


def test_a_model_with_a_mesh_is_not_called_inside_of_explicit_axes():
    own = Mesh(np.array(jax.devices()[:2]), ("model",), axis_types=(AxisType.Explicit,))
    model: Any = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), dtype="float32", device_map=own)
    wanted = model.generate(IDS, MASK, max_new_tokens=2)  # whose own mesh may be of any kind
    inside = jax.jit(lambda: jaxgen.generate(model, IDS, MASK, None, GREEDY))
    with jax.set_mesh(explicit()):
        for call in (lambda: model.generate(IDS, MASK, max_new_tokens=2), inside):
            with pytest.raises(JaxgenError, match=r"device_map inside of a mesh of explicit axes \('fsdp': 8\)"):
                call()
    np.testing.assert_array_equal(model.generate(IDS, MASK, max_new_tokens=2), wanted)
