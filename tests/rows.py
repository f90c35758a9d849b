"""Rows of batches under many options at once, and what makes two of them the same."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from jaxgen.generation.processors.constraint import AllowedTokens
from jaxgen.generation.results.output import GenerateOutput
from tests.helpers import padded
from tests.tokenizers import characters


def discouraged(tokens: Any, lengths: Any, logits: Any) -> Any:
    """A user's processor: the row's newest token gets less likely, the more so the longer the row is."""
    rows = jnp.arange(len(lengths))
    return logits.at[rows, tokens[rows, lengths - 1]].add(-0.1 * lengths)


def met(tokens: Any, lengths: Any, scores: Any) -> Any:
    """A user's criterion: the newest two tokens add up to a multiple of 19."""
    rows = jnp.arange(len(lengths))
    return ((tokens[rows, lengths - 1] + tokens[rows, lengths - 2]) % 19 == 0) & (scores.max(axis=1) < jnp.inf)


def no_successor(tokens: Any, length: Any) -> Any:
    return jnp.arange(97) != tokens[length - 1] + 1


OPTIONS = {
    "do_sample": True, "temperature": 1.3, "top_k": 30, "top_p": 0.95, "min_p": 0.01, "repetition_penalty": 1.2,
    "min_new_tokens": 2, "max_new_tokens": 10, "eos_token_id": 7, "pad_token_id": 0, "return_dict_in_generate": True,
    "seed": 3,
}  # fmt: skip
PROCESSORS = {
    "sequence_bias": {(8,): 1.5, (9, 10): -3.0, (3, 4, 5): 2.0}, "encoder_repetition_penalty": 1.1,
    "no_repeat_ngram_size": 2, "encoder_no_repeat_ngram_size": 3, "bad_words_ids": [[5], [6, 7]],
    "prefix_allowed_tokens_fn": AllowedTokens(no_successor), "forced_bos_token_id": 13, "forced_eos_token_id": 7,
    "exponential_decay_length_penalty": (4, 1.1), "suppress_tokens": [11], "begin_suppress_tokens": [12],
    "logits_processor": [discouraged], "renormalize_logits": True, "watermarking_config": {"bias": 1.0},
}  # fmt: skip
STOPS = {"stop_strings": ["st", "he"], "tokenizer": characters(), "stopping_criteria": [met]}
EVERYTHING = {
    **OPTIONS, **PROCESSORS, **STOPS, "top_h": 0.9, "typical_p": 0.95, "epsilon_cutoff": 1e-3, "eta_cutoff": 1e-3,
    "remove_invalid_values": True, "guidance_scale": 1.5, "num_return_sequences": 2, "prefill_chunk_size": 3,
}  # fmt: skip
BEAMS = {
    **EVERYTHING, "do_sample": False, "num_beams": 3, "min_new_tokens": None, "min_length": 4, "length_penalty": 0.7,
    "remove_invalid_values": None,
}  # fmt: skip
SETS: dict[str, dict[str, Any]] = {
    "few": OPTIONS,
    "everything": {**EVERYTHING, "cache_implementation": "quantized"},
    "beams": BEAMS,
    "beam_sample": {**BEAMS, "do_sample": True, "early_stopping": True},
    "lookup": {**EVERYTHING, "prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1},
}
BATCH = 4  # a bucket, so that every batch of 4 shares its shape


class Row(NamedTuple):
    """All that comes of a prompt: one entry per sequence that is returned for it."""

    tokens: list[list[int]]
    ends: list[str]
    beams: list[list[int]]  # which of the prompt's beams each token came from
    logprobs: list[np.ndarray]  # [2, n]: after processors, and the model's own
    scores: list[float]  # of beams


def close(actual: np.ndarray, expected: np.ndarray, exactly: bool) -> bool:
    """Equal to the bit, or nearly."""
    return actual.tobytes() == expected.tobytes() if exactly else np.allclose(actual, expected, rtol=0, atol=1e-4)


def same(actual: Row, expected: Row, exactly: bool) -> bool:
    """Equal; log-probabilities and scores to the bit or nearly."""
    if actual[:3] != expected[:3]:
        return False
    numbers = zip(
        [*actual.logprobs, np.array(actual.scores)], [*expected.logprobs, np.array(expected.scores)], strict=True
    )
    return all(close(mine, other, exactly) for mine, other in numbers)


def arguments(name: str, ids: np.ndarray, mask: np.ndarray | None, **options: Any) -> dict[str, Any]:
    """The options of a set; with guidance, a row's negative prompt is half its prompt, backwards, and a token more."""
    options = {**SETS[name], **options}
    if "guidance_scale" in options:
        real = np.ones_like(ids) if mask is None else mask
        negative = [[*row[keep == 1][::-2].tolist(), 17] for row, keep in zip(ids, real, strict=True)]
        options["negative_prompt_ids"], options["negative_prompt_attention_mask"] = padded(negative, "right", 1)
    return options


def read(output: Any, prompts: int, width: int, beams: int) -> list[Row]:
    assert isinstance(output, GenerateOutput)
    tokens, logprobs = [], []
    for row, count in enumerate(output.lengths):
        tokens.append(output.sequences[row, width:][:count].tolist())
        logprobs.append(np.stack([output.logprobs[row, :count], output.model_logprobs[row, :count]]))
    rows, samples = [], len(tokens) // prompts
    for prompt in range(prompts):
        own = slice(prompt * samples, (prompt + 1) * samples)
        sources, scores = [], []
        if output.beam_indices is not None and output.sequences_scores is not None:
            indices = np.where(output.beam_indices < 0, -1, output.beam_indices - prompt * beams)[own]
            sources = [row[row >= 0].tolist() for row in indices]
            scores = output.sequences_scores[own].tolist()
        rows.append(Row(tokens[own], output.finish_reason[own], sources, logprobs[own], scores))
    return rows


def rows_of(model, name: str, ids, mask, row_ids, **options) -> list[Row]:
    """What a call gives each of its rows."""
    output = model.generate(ids, mask, row_ids=row_ids, **arguments(name, ids, mask, **options))
    return read(output, len(ids), ids.shape[1], SETS[name].get("num_beams", 1))
