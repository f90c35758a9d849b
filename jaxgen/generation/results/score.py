"""How likely given tokens are: of texts, and of what `generate` chose."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Bool, Float, Int

from jaxgen.errors import JaxgenError, NonFiniteLogitsError
from jaxgen.generation.options.checks import integer
from jaxgen.generation.programs.structure import split
from jaxgen.generation.prompts.layout import SMALLEST_PROMPT, bucket, checked_prompt, pack, pad_to
from jaxgen.generation.results.logprobs import Drawn, Packed, packed_logprobs
from jaxgen.lowering import own_rules


@dataclasses.dataclass(frozen=True)
class TextScore:
    """What a model thinks of a text: of all its tokens but the first, which nothing precedes."""

    token_ids: Int[np.ndarray, " T"]
    logprobs: Float[np.ndarray, " T"]  # natural logarithms
    greedy: Bool[np.ndarray, " T"]  # whether the token is the model's first choice


def score(model: Any, texts: Any, tokenizer: Any, batch_size: int) -> list[TextScore]:
    """As `GenerationMixin.score`."""
    from jaxgen.text.tokenizer import tokenizer_for

    texts = [texts] if not isinstance(texts, list | tuple) else list(texts)
    for row, text in enumerate(texts):
        if not isinstance(text, str):
            kind = type(text).__name__
            raise JaxgenError(f"texts[{row}] is of type {kind}, and not a text; ids go to jaxgen.score_tokens")
    tokenizer = tokenizer_for(model, tokenizer)
    batch_size = integer(1)("batch_size", batch_size)
    scores: list[TextScore] = []
    for start in range(0, len(texts), batch_size):
        ids = [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts[start : start + batch_size]]
        for row, tokens in enumerate(ids):
            _check(tokens, start + row, model.config.max_position_embeddings)
        scores += scores_of(model, ids)
    return scores


def _check(tokens: np.ndarray, row: int, context: int) -> None:
    if len(tokens) < 2:
        raise JaxgenError(f"texts[{row}] has {len(tokens)} token; a score needs a token and one before it")
    if len(tokens) > context:
        raise JaxgenError(f"texts[{row}] has {len(tokens)} tokens, more than the model's context of {context}")


def scores_of(model: Any, ids: Sequence[Int[np.ndarray, " _"]]) -> list[TextScore]:
    """The scores of texts as ids, two or more of each, which are read side by side."""
    width = max(map(len, ids))
    table, mask = (np.stack([pad_to(x, (width,)) for x in rows]) for rows in (ids, [np.ones_like(x) for x in ids]))
    found = _packed(model, *checked_prompt(table, mask, model.config.vocab_size))
    rows = zip(ids, found.model_logprobs, found.greedy, strict=True)
    return [TextScore(x[1:], logprobs[1 : len(x)], greedy[1 : len(x)]) for x, logprobs, greedy in rows]


def token_logprobs(model: Any, input_ids: Any, attention_mask: Any = None) -> Float[np.ndarray, "B T"]:
    """The log-probability of each id given the real ones before it; 0 for a row's first id and masked ones.

    Ids and mask are as in `generate`, in any arrangement.
    """
    ids, mask = checked_prompt(input_ids, attention_mask, model.config.vocab_size)
    result = np.zeros(ids.shape, np.float32)
    packed = _packed(model, ids, mask).model_logprobs
    result[mask] = packed[np.arange(ids.shape[1]) < mask.sum(axis=1)[:, None]]
    return result


@own_rules()
def _packed(model: Any, ids: Int[np.ndarray, "B T"], mask: Bool[np.ndarray, "B T"]) -> Packed:
    found = scored(model, *pack(ids, mask), None)
    broken = np.argwhere(~np.isfinite(found.model_logprobs))
    if len(broken):
        raise NonFiniteLogitsError(broken[:1, 0].tolist(), broken[:1, 1].tolist())
    return found


def scored(model: Any, tokens: Int[np.ndarray, "B T"], lengths: Int[np.ndarray, " B"], drawn: Drawn | None) -> Packed:
    """`packed_logprobs` of rows in a bucket, as arrays on the host."""
    shape = bucket(len(tokens)), 1 + bucket(tokens.shape[1] - 1, SMALLEST_PROMPT)  # the model does not read the last
    if drawn is not None:
        starts, ends = (pad_to(x, shape[:1], fill=1) for x in (drawn.prompt_lengths, drawn.max_lengths))
        bits = drawn.bits if drawn.bits is None else pad_to(drawn.bits, (*shape, drawn.bits.shape[2]))
        drawn = dataclasses.replace(drawn, prompt_lengths=starts, max_lengths=ends, bits=bits)
    found = _scored(*split(model), pad_to(tokens, shape), pad_to(lengths, shape[:1], fill=1), drawn)
    return Packed(*(np.asarray(table)[: len(tokens), : tokens.shape[1]] for table in found))


def _run(structure: Any, weights: Any, *rows: Any) -> Any:
    return packed_logprobs(structure.module(weights), *rows)


_scored = jax.jit(_run, static_argnums=0)


def transition_scores(
    sequences: object, scores: Any, beam_indices: object, normalize_logits: bool
) -> Float[np.ndarray, "R N"]:
    """As `GenerationMixin.compute_transition_scores`. Source: transformers, the method of this name."""
    table = np.stack([np.asarray(step, np.float32) for step in scores], axis=1)
    if normalize_logits:
        with np.errstate(invalid="ignore"):
            shifted = table - table.max(axis=2, keepdims=True)
            table = shifted - np.log(np.exp(shifted).sum(axis=2, keepdims=True))
    if beam_indices is None:
        beam_indices = np.broadcast_to(np.arange(table.shape[0])[:, None], table.shape[:2])
    beam_indices = np.asarray(beam_indices)
    longest = int((beam_indices >= 0).sum(axis=1).max())
    rows, new = beam_indices[:, :longest], np.asarray(sequences)[:, -longest:]
    steps = np.broadcast_to(np.arange(longest), new.shape)
    return np.where(rows < 0, np.float32(0), table[np.maximum(rows, 0), steps, new])
