"""Tunix's own GRPO with `JaxgenRollout`, and its log-probabilities of what was sampled."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from transformers import AutoTokenizer

import jaxgen
from jaxgen import JaxgenError

pytest.importorskip("tunix", reason="needs the extra `tunix`, which asks for older transformers than the other oracles")

import optax
from jax.sharding import Mesh
from tunix.generate.tokenizer_adapter import TokenizerAdapter
from tunix.rl import common
from tunix.rl.grpo.grpo_learner import GRPOConfig, GRPOLearner
from tunix.rl.rl_cluster import ClusterConfig, RLCluster, RLTrainingConfig, Role
from tunix.rl.rollout.base_rollout import RolloutConfig

from jaxgen.integrations.tunix import JaxgenPolicy, JaxgenRollout

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("ignore::DeprecationWarning")]

PROMPTS = ["1, 2, 3", "A list of"]
ROLLOUT: dict[str, Any] = {
    "max_tokens_to_generate": 8, "max_prompt_length": 16, "temperature": 1.5, "return_logprobs": True,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    """The demo's, with a pad token of its own: Tunix takes every pad token for padding."""
    tokenizer = AutoTokenizer.from_pretrained(jaxgen.demo.path())
    tokenizer.pad_token = tokenizer.unk_token
    return tokenizer


def policy() -> JaxgenPolicy:
    return JaxgenPolicy(jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), dtype="float32"))


def worker(tokenizer: Any, **options: Any) -> tuple[JaxgenRollout, RolloutConfig]:
    config = RolloutConfig(**{**ROLLOUT, **options})
    return JaxgenRollout(rollout_actor=policy(), tokenizer=TokenizerAdapter(tokenizer), rollout_config=config), config


def test_grpo_learns_with_it(tokenizer: Any):
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tp"))
    cluster = RLCluster(
        actor=policy(),
        reference=policy(),
        tokenizer=tokenizer,
        cluster_config=ClusterConfig(
            role_to_mesh=dict.fromkeys((Role.ACTOR, Role.REFERENCE, Role.ROLLOUT), mesh),
            rollout_engine=JaxgenRollout,
            training_config=RLTrainingConfig(
                actor_optimizer=optax.adam(1e-3),
                eval_every_n_steps=100,
                max_steps=4,
                mini_batch_size=2,
                train_micro_batch_size=2,
            ),
            rollout_config=RolloutConfig(**ROLLOUT),
        ),
    )
    rewards = []

    def commas(prompts: Any, completions: Any, **_: Any) -> list[float]:
        rewards.append([float(text.count(",")) for text in completions])
        return rewards[-1]

    before = jax.device_get(nnx.state(cluster.rollout.model(), nnx.Param))
    learner = GRPOLearner(cluster, GRPOConfig(num_generations=4, num_iterations=2), reward_fns=commas)
    learner.train([{"prompts": np.array(PROMPTS)}] * 2)
    after = jax.device_get(nnx.state(cluster.rollout.model(), nnx.Param))
    moved = [np.abs(new - old).max() for old, new in zip(*map(jax.tree.leaves, (before, after)), strict=True)]
    assert 1e-3 < max(moved) < 0.1 and np.isfinite(moved).all()
    assert len(rewards) == 2 and len({tuple(row) for row in rewards}) == 2  # two calls, and other draws


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_its_log_probabilities_are_those_of_the_trainer(temperature: float, tokenizer: Any):
    rollout, config = worker(tokenizer, temperature=temperature)
    out = rollout.generate(PROMPTS * 2, config)
    assert out.text == [tokenizer.decode(row[row != rollout.eos_id()]) for row in out.tokens]
    pad = rollout.pad_id()
    rows = jnp.array([np.pad(row, (0, 8 - len(row)), constant_values=pad) for row in out.tokens])
    prompts = jnp.array(out.left_padded_prompt_tokens)
    mine = rollout.get_per_token_logps(prompts, rows)
    parts = nnx.split(rollout.model())
    theirs = common.compute_per_token_logps(
        *parts, prompts, rows, pad_id=pad, eos_id=rollout.eos_id(), temperature=temperature
    )
    for row, told in enumerate(out.logprobs or []):
        count = len(told)
        assert np.allclose(told, mine[row, :count], atol=1e-4)
        assert np.allclose(told, theirs[row, :count], atol=1e-4)


def test_a_run_repeats_and_its_calls_differ(tokenizer: Any):
    runs = []
    for seed in (3, 3, jax.random.PRNGKey(3)):
        rollout, config = worker(tokenizer, seed=seed)
        runs.append([rollout.generate(PROMPTS * 2, config).text for _ in range(2)])
    assert runs[0] == runs[1] == runs[2]
    assert runs[0][0] != runs[0][1]
    rollout, config = worker(tokenizer, temperature=0.0, return_logprobs=False)
    out = rollout.generate(PROMPTS[:1], config)
    assert out.text[0].startswith(", 4, 5") and out.logprobs is None


def test_several_tokens_may_end_a_text(tokenizer: Any):
    """As a list or an array; none are the tokenizer's own."""
    eos, comma = tokenizer.eos_token_id, tokenizer.encode(",", add_special_tokens=False)[-1]
    found = []
    for ends in ([eos, comma], np.array([eos, comma]), [], None):
        rollout, config = worker(tokenizer, temperature=0.0, eos_tokens=ends)
        found.append(rollout.generate(PROMPTS[:1], config).text[0])
    assert found[0] == found[1] == found[2].partition(",")[0] != found[2] == found[3]


def test_what_it_refuses(tokenizer: Any):
    rollout, config = worker(tokenizer, max_prompt_length=4)
    with pytest.raises(JaxgenError, match=r"prompt 1 has \d+ tokens, where max_prompt_length=4"):
        rollout.generate(["1", "1, 2, 3, 4"], config)
    with pytest.raises(JaxgenError, match="prompt 0 holds the pad token"):
        rollout.generate([tokenizer.pad_token], config)
    with pytest.raises(JaxgenError, match=r"wrap a model of jaxgen's: JaxgenPolicy\(model\)"):
        JaxgenRollout(rollout_actor=rollout.model().model, tokenizer=None, rollout_config=config)
    rollout, config = worker(tokenizer, seed=0.5)
    with pytest.raises(JaxgenError, match=r"seed=0\.5: Tunix's is an int or a key"):
        rollout.generate(PROMPTS[:1], config)
