"""Rollouts for Tunix, by the very model that its trainer updates (extra `tunix`)."""

import copy
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from jaxgen.errors import JaxgenError, shown
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.results.logprobs import logprobs
from jaxgen.text.tokenizer import left_pad

try:
    from tunix.rl.rollout.base_rollout import BaseRollout, RolloutConfig, RolloutOutput
except ImportError as error:
    raise JaxgenError("rollouts for Tunix need its package: pip install google-tunix") from error


class JaxgenPolicy(nnx.Module):
    """A model as Tunix's trainers call one: the actor or the reference of an `RLCluster`.

    It shares the model's arrays. What the checkpoint's generation_config.json says is left out: how tokens are drawn
    is Tunix's to say.
    """

    def __init__(self, model: Any):
        self.model = copy.copy(model)
        self.model.generation_config = GenerationConfig()

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        positions: Any = None,
        cache: Any = None,
        attention_mask: "Bool[Array, 'B T T'] | None" = None,
    ) -> tuple[Float[Array, "B T V"], Any]:
        """Logits for the token after each column, and `cache` as it came.

        Of `attention_mask` only the real columns count, which are its diagonal; positions follow from them.
        """
        mask = None if attention_mask is None else jnp.diagonal(attention_mask, axis1=1, axis2=2)
        return self.model(tokens, mask).logits, cache


class JaxgenRollout(BaseRollout):
    """A rollout worker: `ClusterConfig(rollout_engine=JaxgenRollout, ...)`, with a `JaxgenPolicy` as the actor.

    It samples with the trainer's arrays, without a copy. Of the `RolloutConfig` count `max_tokens_to_generate`,
    `max_prompt_length`, `temperature` (0 is greedy), `top_p`, `top_k`, `eos_tokens`, `return_logprobs` and `seed`
    (an int or a key; None is 0): the n-th call draws with that seed and n, so that calls differ, and runs repeat.
    Raises `JaxgenError` as `generate`, and for prompts that are too long or hold the pad token, which Tunix takes for
    padding wherever it stands. Source: tunix.rl.rollout.vanilla_rollout.VanillaRollout.
    """

    def __init__(self, rollout_actor: Any, tokenizer: Any, rollout_config: RolloutConfig, **_others: Any):
        if not isinstance(rollout_actor, JaxgenPolicy):
            kind = type(rollout_actor).__name__
            raise JaxgenError(f"the actor is of type {kind}; wrap a model of jaxgen's: JaxgenPolicy(model)")
        self._policy, self._tokenizer, self._config = rollout_actor, tokenizer, rollout_config
        self._calls = 0

    def generate(self, prompts: list[str], rollout_config: RolloutConfig, **_others: Any) -> RolloutOutput:
        """A sample for each prompt: its tokens with the eos that ends it, and its text without.

        `logprobs` are those of what the tokens were drawn from.
        """
        width = rollout_config.max_prompt_length
        rows = [self._encode(str(prompt), place, width) for place, prompt in enumerate(prompts)]
        empty = [self.pad_id()] * width
        table = left_pad([empty, *rows], self.pad_id())[1:]
        mask = left_pad([empty, *[[1] * len(row) for row in rows]], 0)[1:]
        out = self._policy.model.generate(
            table,
            mask,
            generation_config=_drawing(rollout_config, self.pad_id(), self.eos_id()),
            key=jax.random.fold_in(_key(rollout_config.seed), self._calls) if rollout_config.temperature else None,
            return_dict_in_generate=True,
        )
        self._calls += 1
        tokens = [row[width : width + count] for row, count in zip(out.sequences, out.lengths, strict=True)]
        ended = [reason == "eos" for reason in out.finish_reason]
        said = [row[:-1] if end else row for row, end in zip(tokens, ended, strict=True)]
        told = [row[:count] for row, count in zip(out.logprobs, out.lengths, strict=True)]
        return RolloutOutput(
            text=[self._tokenizer.decode(row.tolist()) for row in said],
            logits=None,  # pyright: ignore[reportArgumentType]  (as Tunix's own engines do)
            tokens=tokens,
            left_padded_prompt_tokens=table,
            logprobs=told if rollout_config.return_logprobs else None,
        )

    def _encode(self, prompt: str, place: int, most: int) -> list[int]:
        bos = self._tokenizer.bos_id()
        ids = self._tokenizer.dedup_bos_ids(([bos] if bos else []) + list(self._tokenizer.encode(prompt)))
        if not 0 < len(ids) <= most:
            raise JaxgenError(f"prompt {place} has {len(ids)} tokens, where max_prompt_length={most} needs 1 to {most}")
        if self.pad_id() in ids:
            raise JaxgenError(
                f"prompt {place} holds the pad token {self.pad_id()}, which Tunix does not read; "
                "give the tokenizer a pad token of its own"
            )
        return ids

    def get_per_token_logps(self, prompt_tokens: Array, completion_tokens: Array) -> Float[Array, "B N"]:
        """The policy's log-probabilities of completions, at the temperature at which they were drawn."""
        ids = jnp.concatenate([prompt_tokens, completion_tokens], axis=1)
        temperature = jnp.float32(self._config.temperature or 1)
        found = _scores(*nnx.split(self._policy), ids, ids != self.pad_id(), temperature)
        return found[:, prompt_tokens.shape[1] :]

    def update_params(self, params: Any, filter_types: Any = None) -> None:
        """Take the trainer's parameters, which are usually the same arrays."""
        nnx.update(self._policy, params)

    def pad_id(self) -> int:
        """The tokenizer's."""
        return self._tokenizer.pad_id()

    def eos_id(self) -> int:
        """The tokenizer's."""
        return self._tokenizer.eos_id()

    def model(self) -> JaxgenPolicy:
        """The policy that samples."""
        return self._policy


@jax.jit
def _scores(graph: Any, state: Any, ids: Any, mask: Any, temperature: Any) -> Array:
    config = GenerationConfig(do_sample=True, top_k=0, temperature=1.0)
    policy = nnx.merge(graph, state)
    return logprobs(policy.model, ids, mask, config, logits_processor=[lambda tokens, lengths, x: x / temperature])


def _drawing(config: RolloutConfig, pad: int, eos: int) -> GenerationConfig:
    """What Tunix's configuration means, in the words of `generate`."""
    length = {"max_new_tokens": config.max_tokens_to_generate, "pad_token_id": pad}
    given = [] if config.eos_tokens is None else np.ravel(config.eos_tokens).tolist()
    ends = {"eos_token_id": given or [eos]}
    if not config.temperature:
        return GenerationConfig(do_sample=False, **length, **ends)
    top_k = 0 if config.top_k in (None, -1) else config.top_k
    top_p = 1.0 if config.top_p is None else config.top_p
    return GenerationConfig(do_sample=True, temperature=config.temperature, top_k=top_k, top_p=top_p, **length, **ends)


def _key(seed: Any) -> Array:
    """A key of what Tunix takes for a seed."""
    if seed is None or isinstance(seed, int | np.integer):
        return jax.random.key(0 if seed is None else int(seed))
    if not hasattr(seed, "dtype"):
        raise JaxgenError(f"seed={shown(seed)}: Tunix's is an int or a key of JAX")
    typed = jnp.issubdtype(seed.dtype, jax.dtypes.prng_key)
    return seed if typed else jax.random.wrap_key_data(seed)
