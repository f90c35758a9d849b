"""How a generation goes: what is compiled in (`Recipe`, `Plan`), and the numbers that are not (`Controls`)."""

import dataclasses
from typing import Any, no_type_check

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.generation.stop_strings import StopStrings


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is static in a decode step. Two calls with one recipe share executables."""

    do_sample: bool
    record_scores: bool = False
    record_logits: bool = False
    top_logprobs: int = 0
    recorded: int = 0  # steps that there is room to record
    allow_invalid: bool = False  # remove_invalid_values: NaN logits end nothing
    num_beams: int = 1
    early_stopping: bool | str = False
    eos_count: int = 0  # beams: how many ids may end one, which decides how many candidates are looked at
    drafts: int = 0  # tokens that are drafted at a time; 0: no speculation
    prompt_lookup: bool = False  # they come from the row itself, not from an assistant


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is static in a generation, besides the shapes of its arrays."""

    recipe: Recipe
    samples: int  # rows per prompt
    total: int  # the largest length of a row, prompt and new tokens
    slots: int  # cache slots per row
    int8_cache: bool = False
    chunk: int = 0  # prompt tokens that are read at a time; 0: all at once
    fresh: int = 0  # columns that hold what a prompt adds to the past; 0: there is no past


@jax.tree_util.register_dataclass
@no_type_check  # JAX rebuilds it around placeholders
@dataclasses.dataclass
class Controls:
    """The numbers of a call: traced, so that changing one compiles nothing."""

    processors: tuple[Any, ...]  # `f(logits, rows) -> logits` with their numbers, in HF's order
    criteria: tuple[Any, ...]  # the user's `f(tokens, lengths, scores) -> bool [R]`
    eos_ids: Int[Array | np.ndarray, " E"]  # filled up with -1
    stop_strings: StopStrings | None
    guidance_scale: Float[Array | np.ndarray, ""] | None  # None: no negative prompts
    length_penalty: Float[Array | np.ndarray, ""]  # beams
    confidence: Float[Array | np.ndarray, ""]  # an assistant stops drafting when it is less sure than this
    ngram: Int[Array | np.ndarray, ""]  # prompt lookup: the longest end of a row that is looked up
