"""The log-probabilities of tokens that were generated: fast, or by the program that generated them, to the last bit."""

import copy
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Unpack

import jax
import numpy as np
from jaxtyping import Float, Int

from jaxgen.errors import JaxgenError, NonFiniteLogitsError, shown
from jaxgen.generation.choosing.constrained import checked, has_grammar
from jaxgen.generation.choosing.grammars import Grammars
from jaxgen.generation.choosing.sample import FreshSeed
from jaxgen.generation.choosing.stop import BROKEN
from jaxgen.generation.execute import advance, prefill, program_for
from jaxgen.generation.options.checks import integer
from jaxgen.generation.options.config import GenerationConfig, resolve
from jaxgen.generation.options.table import Extras
from jaxgen.generation.options.typed import ConfigSource, GenerateOptions, TokenIds, TokenMask
from jaxgen.generation.prepare import prepare, traced
from jaxgen.generation.processors.regular import automata_of
from jaxgen.generation.programs.strict import Strict
from jaxgen.generation.prompts.contexts import context_of, note
from jaxgen.generation.prompts.layout import checked_prompt, generated, pack, pad_to
from jaxgen.generation.results.logprobs import check_scorable, drawn_by, max_lengths_of, of_rows
from jaxgen.generation.results.score import scored
from jaxgen.lowering import own_rules


@dataclasses.dataclass(frozen=True)
class TokenScores:
    """What a model thinks of the new tokens of R rows; N of them in the longest. As in `GenerateOutput`."""

    logprobs: Float[np.ndarray, "R N"]  # under what the options draw from; -inf where they cannot; 0 after the end
    model_logprobs: Float[np.ndarray, "R N"]  # the model's own, before processors; 0 after the end
    lengths: Int[np.ndarray, " R"]  # new tokens per row


class Rows(NamedTuple):
    """Rows to be scored: the real tokens first, prompts and what follows."""

    tokens: Int[np.ndarray, "R T"]
    lengths: Int[np.ndarray, " R"]
    prompt_lengths: Int[np.ndarray, " R"]

    def __getitem__(self, rows: Any) -> "Rows":  # pyright: ignore[reportIncompatibleMethodOverride]
        return Rows(*(table[rows] for table in self))

    def new(self, table: Float[np.ndarray, "R T"], width: int) -> Float[np.ndarray, "R N"]:
        """A table's entries after the prompts."""
        return generated(table, self.prompt_lengths, self.lengths, width, np.float32(0))


@own_rules()
def score_tokens(
    model: Any,
    sequences: TokenIds,
    prompt_lengths: "Int[np.ndarray, ' R'] | Sequence[int] | int",
    attention_mask: TokenMask | None = None,
    generation_config: ConfigSource | None = None,
    *,
    batch_size: int = 8,
    **options: Unpack[GenerateOptions],
) -> TokenScores:
    """How likely the tokens after each prompt are: where `generate` with these options draws them, and the model's own.

    `sequences` [R, T] are prompts and what follows, as `generate` returns them; `attention_mask` [R, T] is 1 on their
    real tokens, and `prompt_lengths` are the real tokens of each row's prompt. An output has all three:
    `score_tokens(model, out.sequences, out.prompt_lengths, out.attention_mask, out.generation_config)`, and with a
    `constraint` this and its `tokenizer` again. A list of constraints has one per row, or one per prompt of
    `num_return_sequences` rows. Eos ids, stop strings and limits end no row here.

    By default `batch_size` rows are read at a time, all their tokens at once. With `strict`, tokens are given one
    after the other to the program of `generate(..., strict=)`: with the same options, `Strict` and weights the results
    are equal to those of `generate` to the last bit, in any batches and in any order, at the speed of generating.
    Raises `JaxgenError` for rows without a token after the prompt, and as `generate`; `UnsupportedError` for beams,
    guidance and drafts, and `JaxgenError` where `max_new_tokens` has no room for a text that a constraint asks for.

    >>> model, tokenizer = getfixture("demo")
    >>> options = dict(do_sample=True, temperature=1.5, strict=Strict(rows=2, tokens=64))
    >>> prompts = tokenizer(["1, 2, 3", "Portugal is"], padding=True, return_tensors="np")
    >>> out = model.generate(**prompts, seed=0, return_dict_in_generate=True, **options)
    >>> scores = score_tokens(model, out.sequences, out.prompt_lengths, out.attention_mask, **options)
    >>> bool((scores.logprobs == out.logprobs).all())
    True
    """
    if traced(model, sequences, prompt_lengths, attention_mask):
        raise JaxgenError("score_tokens runs on the host; inside jit, grad or vmap use jaxgen.logprobs")
    extras, fields = Extras.take(options)
    config = resolve(fields, generation_config, model.generation_config)
    check_scorable(config, extras)
    rows = _checked(sequences, prompt_lengths, attention_mask, model.config)
    extras = of_rows(extras, len(rows.tokens), config)
    if extras.constraint is not None:
        checked(extras.constraint, len(rows.tokens))
    batch_size = integer(1)("batch_size", batch_size)
    strict = Strict.of(extras.strict)
    batches = (
        _exactly(model, rows, config, extras, strict) if strict else _fast(model, rows, config, extras, batch_size)
    )
    width = int((rows.lengths - rows.prompt_lengths).max())
    logprobs, own = np.zeros((2, len(rows.tokens), width), np.float32)
    for which, after, before in batches:
        part = rows[which]
        logprobs[which], own[which] = part.new(after, width), part.new(before, width)
        bad = ~np.isfinite(own[which]) | ~(np.isfinite(logprobs[which]) | np.isneginf(logprobs[which]))
        if bad.any():
            at, step = np.argwhere(bad)[0]
            raise NonFiniteLogitsError([int(which[at])], [int(step)])
    return TokenScores(logprobs, own, rows.lengths - rows.prompt_lengths)


def _checked(sequences: Any, prompt_lengths: Any, attention_mask: Any, config: Any) -> Rows:
    """The rows, after every check of their values."""
    ids, mask = checked_prompt(sequences, attention_mask, config.vocab_size, ("sequences", "attention_mask"))
    tokens, lengths = pack(ids, mask)
    given = np.asarray(prompt_lengths)
    if given.dtype.kind not in "iu" or given.shape not in ((), (len(ids),)):
        raise JaxgenError(
            f"prompt_lengths={shown(prompt_lengths)} must be an int, or one per row of sequences: {len(ids)} of them"
        )
    starts = np.broadcast_to(given, lengths.shape)
    for row, (start, length) in enumerate(zip(starts.tolist(), lengths.tolist(), strict=True)):
        if start < 1:
            raise JaxgenError(f"prompt_lengths: {start} in row {row}; a prompt has at least one token")
        if start >= length:
            raise JaxgenError(f"sequences: row {row} has {length} real tokens, and none after its prompt of {start}")
        if length > (context := context_of(config, start)):
            raise JaxgenError(
                f"sequences: row {row} has {length} tokens, more than the model's context of {context}{note(config)}"
            )
    return Rows(tokens, lengths, starts.astype(np.int32))


Batch = tuple[np.ndarray, np.ndarray, np.ndarray]  # which rows; both log-probabilities of all their slots


def _fast(model: Any, rows: Rows, config: GenerationConfig, extras: Extras, batch_size: int) -> Iterator[Batch]:
    """All tokens of some rows at once."""
    for start in range(0, len(rows.tokens), batch_size):
        which = np.arange(start, min(start + batch_size, len(rows.tokens)))
        part = rows[which]
        own = _of_some(extras, which)
        drawn = drawn_by(config, own, model.config, part.prompt_lengths, part.lengths)
        if (automata := automata_of(drawn.processors)) is not None:
            automata.check_room(np.asarray(drawn.max_lengths - drawn.prompt_lengths))
        if has_grammar(own.constraint):
            given = own.constraint, own.tokenizer, len(part.tokens), model.config.vocab_size, config.eos_token_ids
            drawn.bits = Grammars.of(*given).along(part.tokens, part.prompt_lengths, part.lengths)
        found = scored(model, part.tokens, part.lengths, drawn)
        yield which, found.logprobs, found.model_logprobs


def _exactly(model: Any, rows: Rows, config: GenerationConfig, extras: Extras, strict: Strict) -> Iterator[Batch]:
    """By the program of `generate`, in its shape: as many prompts at a time as it has room for, with their samples."""
    samples = config.sequences_per_prompt
    room = strict.prompts(1, samples)
    strict.fits(int(rows.lengths.max()))
    groups = _groups(rows, extras.constraint, samples)
    for start in range(0, len(groups), room):
        yield _told(model, rows, groups[start : start + room], config, extras, strict)


def _of_some(extras: Extras, rows: Any) -> Extras:
    """Of several constraints those of these rows."""
    each = extras.constraint
    return dataclasses.replace(extras, constraint=[each[row] for row in rows]) if isinstance(each, list) else extras


def _groups(rows: Rows, constraint: Any, samples: int) -> list[list[int]]:
    """Rows that lie side by side and begin the same: at most `samples` of them, which share a prefill."""
    groups: list[list[int]] = []
    asked = constraint if isinstance(constraint, list) else [constraint] * len(rows.tokens)
    prompts = np.where(np.arange(rows.tokens.shape[1]) < rows.prompt_lengths[:, None], rows.tokens, -1)
    for row, prompt in enumerate(prompts):
        first = groups[-1][0] if groups and len(groups[-1]) < samples else None
        if first is not None and (prompt == prompts[first]).all() and asked[row] == asked[first]:
            groups[-1].append(row)
        else:
            groups.append([row])
    return groups


def _told(
    model: Any, rows: Rows, groups: list[list[int]], config: GenerationConfig, extras: Extras, strict: Strict
) -> Batch:
    """Generate what is already there. Samples that a group lacks are filled up with its first one."""
    samples = config.sequences_per_prompt
    placed = rows[[row for group in groups for row in (group + group[:1] * samples)[:samples]]]
    prompts = placed[::samples]
    longest = int(prompts.prompt_lengths.max())
    mask = np.arange(longest) < prompts.prompt_lengths[:, None]
    max_lengths = max_lengths_of(config, model.config, placed.prompt_lengths, placed.lengths)
    max_lengths = max_lengths.reshape(-1, samples).max(axis=1)
    extras = _of_some(extras, [group[0] for group in groups])
    # What a call may ask for that scores nothing but what is there: lengths beyond the shape have no room to reserve.
    room = min(strict.tokens, context_of(model.config, longest)) - longest
    sized = copy.copy(config)
    sized.update(max_new_tokens=min(int((max_lengths - prompts.prompt_lengths).max()), room))
    request = prepare(model, prompts.tokens[:, :longest] * mask, mask, sized, seed=FreshSeed(0), extras=extras)
    shape = (samples * len(request.prompts.tokens), request.layout.total)
    column = np.arange(placed.tokens.shape[1])
    inside = (column >= placed.prompt_lengths[:, None]) & (column < placed.lengths[:, None])
    tokens = dataclasses.replace(
        request.prompts,
        given=pad_to(np.where(inside, placed.tokens, -1)[:, : shape[1]].astype(np.int32), shape, fill=-1),
        max_lengths=pad_to(max_lengths, request.prompts.max_lengths.shape, fill=2),
    )
    grammars = request.grammars and request.grammars.of_given()
    request = dataclasses.replace(request, prompts=tokens, grammars=grammars)
    program = program_for(model, request)
    state = advance(program, request, prefill(program, request))
    arrays = jax.device_get((state.status, state.lengths, state.logprobs, state.model_logprobs))
    kept = [place * samples + index for place, group in enumerate(groups) for index in range(len(group))]
    status, lengths, logprobs, own = (array[kept] for array in arrays)
    which = np.array([row for group in groups for row in group])
    if (broken := np.flatnonzero(status == BROKEN)).size:
        steps = (lengths - rows[which].prompt_lengths)[broken]
        raise NonFiniteLogitsError(which[broken].tolist(), steps.tolist())
    return which, logprobs, own
