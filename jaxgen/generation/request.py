"""A call of `generate`, checked and laid out in numpy: everything that the two executables will be given."""

import dataclasses
from typing import Any

import jax
import numpy as np
from jax.core import Tracer
from jaxtyping import Int

from jaxgen.errors import JaxgenError
from jaxgen.generation.config import GenerationConfig
from jaxgen.generation.limits import check_memory, new_token_budget
from jaxgen.generation.logits import Controls, Recipe
from jaxgen.generation.loop import Plan, Prompts
from jaxgen.generation.prompt import SMALLEST_PROMPT, SMALLEST_TOTAL, bucket, pack, pad_to, read_prompt
from jaxgen.generation.sample import random_key, row_id_words


@dataclasses.dataclass(frozen=True)
class Request:
    """What one call asks for; numpy throughout, so that nothing is dispatched or compiled to make it."""

    input_ids: Int[np.ndarray, "B T"]  # as given, for the layout of the result
    config: GenerationConfig  # the values in effect
    seed: int | None
    key: Any
    prompts: Prompts
    controls: Controls
    plan: Plan

    @classmethod
    def read(
        cls,
        model: Any,
        input_ids: Any,
        attention_mask: Any,
        config: GenerationConfig,
        key: Any = None,
        seed: Any = None,
        row_ids: Any = None,
    ) -> "Request":
        """Check all that can be checked on the host, then pack the rows and choose the buckets."""
        try:
            device, traced = model.device, any(isinstance(x, Tracer) for x in (input_ids, attention_mask, key))
        except jax.errors.ConcretizationTypeError:  # the weights themselves
            device, traced = None, True
        if traced:
            raise JaxgenError("model.generate runs on the host; inside jit or vmap use jaxgen.generate(model, ...)")
        ids, mask = read_prompt(input_ids, attention_mask, model.config.vocab_size)
        check_eos(config, model.config.vocab_size)
        words = row_id_words(row_ids, len(ids))
        key, seed = random_key(key, seed)
        tokens, lengths = pack(ids, mask)
        longest, samples = int(lengths.max()), config.num_return_sequences or 1
        budget = new_token_budget(config, ids.shape[1], longest, model.config.max_position_embeddings)

        rows, length = bucket(len(ids)), bucket(longest, SMALLEST_PROMPT)
        # From the bucketed prompt, not the real one: the prompt's bucket then decides the total's.
        total = bucket(length + budget, SMALLEST_TOTAL)
        check_memory(model.config, model.dtype.itemsize, rows, samples, length, total, device)
        prompts = Prompts(
            tokens=pad_to(tokens[:, :longest], (rows, length)),
            lengths=pad_to(lengths, (rows,), fill=1),
            row_ids=pad_to(words, (rows, 2)),
            idle=np.arange(rows) >= len(ids),
        )
        plan = Plan(Recipe.of(config), samples, total, model.config.cache_slots(total))
        return cls(ids, config, seed, key, prompts, controls_of(config, budget), plan)


def controls_of(config: GenerationConfig, max_new_tokens: int) -> Controls:
    """The traced numbers of an effective configuration, as 0-d numpy arrays; unset ones are neutral."""
    eos = config.eos_token_ids
    return Controls(
        temperature=np.array(config.temperature or 1.0, np.float32),
        top_k=np.array(config.top_k or 0, np.int32),
        top_p=np.array(1.0 if config.top_p is None else config.top_p, np.float32),
        min_p=np.array(config.min_p or 0.0, np.float32),
        repetition_penalty=np.array(config.repetition_penalty or 1.0, np.float32),
        min_new_tokens=np.array(config.min_new_tokens or 0, np.int32),
        max_new_tokens=np.array(max_new_tokens, np.int32),
        eos_ids=pad_to(np.array(eos, np.int32), (bucket(len(eos), 4),), fill=-1),
    )


def check_eos(config: GenerationConfig, vocab_size: int) -> None:
    """Raise `JaxgenError` for an end-of-sequence id that the model can never produce."""
    for token in config.eos_token_ids:
        if token >= vocab_size:
            raise JaxgenError(f"eos_token_id={token} is outside the model's vocabulary of {vocab_size} tokens")
