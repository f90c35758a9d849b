"""A result as one looks at it: coloured text in a notebook, a table, a few lines in a terminal.

Texts of tokens are what each adds to the text before it, special tokens included: joined, they are exactly what the
tokenizer's `decode` gives. Of a character that is spread over several tokens, the last one has the text.
"""

import dataclasses
import functools
import html as escaping
import math
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.errors import JaxgenError
from jaxgen.text.detokenize import Detokenizer
from jaxgen.text.tokenizer import load_tokenizer, tokenizer_for

MOST_ROWS = 32  # that html shows; a notebook keeps what it shows
MOST_TOKENS = 2000  # new ones, over all rows
MOST_PROMPT = 2000  # characters of one prompt
MOST_LINES = 8  # rows in a summary

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
# What has no picture, changes the direction of the text around it, or cannot be written as UTF-8.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff]")
_OPTIONAL = (
    "scores", "logits", "top_logprobs", "attentions", "hidden_states", "sequences_scores", "drafted",
)  # fmt: skip

# No colour of its own but one tint, which shows on light and dark pages alike and is told apart by its strength. What
# belongs to a token appears in the column on the right, which is kept free for it: nothing is covered or cut off.
_STYLE = """
.jaxgen-out{line-height:1.75;padding-right:19em;position:relative;overflow-wrap:anywhere}
.jaxgen-out:hover{padding-bottom:var(--jaxgen-room)}
.jaxgen-out .jaxgen-text{white-space:pre-wrap;margin-top:.6em}
.jaxgen-out .jaxgen-prompt,.jaxgen-out .jaxgen-note{opacity:.65}
.jaxgen-out .jaxgen-note,.jaxgen-out .jaxgen-legend{font-size:.85em}
.jaxgen-out .jaxgen-token{margin-right:1px;padding:.1em 0;border-bottom:1px solid rgba(128,128,128,.5)}
.jaxgen-out .jaxgen-token:hover{outline:2px solid rgba(128,128,128,.8)}
.jaxgen-out .jaxgen-token:empty::before{content:"\\00B7";opacity:.5}
.jaxgen-out .jaxgen-line::before{content:"\\21B5";opacity:.5}
.jaxgen-out .jaxgen-code{font:italic .85em monospace;opacity:.7}
.jaxgen-out .jaxgen-token:hover::after{content:attr(data-about);position:absolute;right:0;width:26em;
box-sizing:border-box;white-space:pre-wrap;direction:ltr;text-align:left;font:.7em/1.5 monospace;padding:.6em .8em;
border:1px solid rgba(128,128,128,.5);border-radius:.4em;background:rgba(128,128,128,.1);pointer-events:none;z-index:1}
@media(max-width:40em){.jaxgen-out{padding-right:0}
.jaxgen-out .jaxgen-token:hover::after{margin-top:2.4em;backdrop-filter:blur(1em)}}
""".replace("\n", "")


@dataclasses.dataclass(frozen=True)
class Row:
    """One row of an output: which prompt it continues, with what, and where its new tokens begin."""

    index: int
    prompt: int  # the index of the prompt in the call
    sample: int  # which of the rows that continue it
    prompt_ids: list[int]  # real ones only
    new_ids: list[int]
    seed: int | None


def rows_of(output: Any) -> list[Row]:
    """The rows of a `GenerateOutput`, without padding."""
    new = output.sequences.shape[1] - output.logprobs.shape[1]
    origin = output.origin
    prompts = [row[:new] for row in output.sequences] if origin is None else _prompts(origin.request)
    samples = len(output.sequences) // len(prompts)
    seeds = output.seed if isinstance(output.seed, tuple) else (output.seed,) * len(prompts)
    return [
        Row(
            index=row,
            prompt=row // samples,
            sample=row % samples,
            prompt_ids=prompts[row // samples].tolist(),
            new_ids=sequence[new : new + length].tolist(),
            seed=seeds[row // samples],
        )
        for row, (sequence, length) in enumerate(zip(output.sequences, output.lengths.tolist(), strict=True))
    ]


def _prompts(request: Any) -> list[np.ndarray]:
    return [ids[real] for ids, real in zip(request.input_ids, request.attention_mask, strict=True)]


class Texts:
    """What ids stand for, by a tokenizer; without one, the ids themselves."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._names: dict[int, str] = {}

    @property
    def known(self) -> bool:
        """Whether there is a tokenizer."""
        return self._tokenizer is not None

    def whole(self, ids: Sequence[int]) -> str:
        """The text of a prompt."""
        if self._tokenizer is None:
            return "".join(f"{token} " for token in ids)
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def pieces(self, prompt: Sequence[int], new: Sequence[int]) -> list[str]:
        """What each new token adds to the text."""
        if self._tokenizer is None:
            return [f"{token} " for token in new]
        detokenizer = Detokenizer(self._tokenizer, prompt, skip_special_tokens=False)
        texts = []
        for token, following in zip(new, [*new, None][1:], strict=True):
            text = detokenizer.push([token])
            # A run of bytes is whole when it is over: its text is its own, not that of the token after it.
            if following is None or (detokenizer._is_byte(token) and not detokenizer._is_byte(following)):
                text += detokenizer.finish()
            texts.append(text)
        return texts

    def name(self, token: int) -> str:
        """The text of a token inside a text; if it is no whole characters, what the vocabulary calls it."""
        if self._tokenizer is None:
            return str(token)
        if token not in self._names:
            # After another one, so that a space in front is not lost.
            once, twice = (self.whole([token] * times) for times in (1, 2))
            text = twice[len(once) :] if twice.startswith(once) else once
            raw = self._tokenizer.convert_ids_to_tokens(token)
            self._names[token] = text if text and _UNFINISHED not in text else str(raw)
        return self._names[token]


def tokenizer_of(model: Any, tokenizer: Any = None) -> Any:
    """The tokenizer given, or that of the model's checkpoint; None if there is none."""
    if tokenizer is not None:
        return tokenizer_for(model, tokenizer)
    name = getattr(model, "name_or_path", None)
    if name is None or not Path(name).is_dir():
        return None
    try:
        return _loaded(str(name))
    except JaxgenError:
        return None


@functools.lru_cache(maxsize=4)
def _loaded(directory: str) -> Any:
    return load_tokenizer(Path(directory))


def texts_of(output: Any, tokenizer: Any = None) -> Texts:
    """The texts of an output's tokens, by the tokenizer given or that of the checkpoint."""
    return Texts(tokenizer_of(None if output.origin is None else output.origin.model, tokenizer))


def summary(output: Any) -> str:
    """A result in a few lines: what `repr` shows.

    Of up to 8 rows the finish reason, the number of new tokens and the first characters of the new text; or the first
    ids, if the model's checkpoint has no tokenizer.

    >>> model, tokenizer = getfixture("demo")
    >>> inputs = tokenizer(["A list of colors: red, blue"], return_tensors="np")
    >>> print(summary(model.generate(**inputs, max_new_tokens=5, return_dict_in_generate=True)))
    GenerateOutput: 1 row
      row 0: length, 5 tokens, ', green,'
    """
    rows, texts = rows_of(output), texts_of(output)
    head = [_counted(len(rows), "row")]
    if isinstance(output.seed, int) and output.generation_config.do_sample:
        head.append(f"seed {output.seed}")
    if kept := [name for name in _OPTIONAL if getattr(output, name) is not None]:
        head.append("with " + ", ".join(kept))
    lines = [f"GenerateOutput: {'; '.join(head)}"]
    for row in rows[:MOST_LINES]:
        text = repr("".join(texts.pieces(row.prompt_ids, row.new_ids[:100])))
        shown = text if len(text) <= 72 else text[:70] + "..."
        seed = f"seed {row.seed}, " if isinstance(output.seed, tuple) and output.generation_config.do_sample else ""
        reason, length = output.finish_reason[row.index], _counted(len(row.new_ids), "token")
        lines.append(f"  row {row.index}: {seed}{reason}, {length}, {shown}")
    if len(rows) > MOST_LINES:
        lines.append(f"  and {_counted(len(rows) - MOST_LINES, 'more row')}")
    return "\n".join(lines)


def html(output: Any, tokenizer: Any = None) -> str:
    """A result as HTML: the text, every new token tinted the more the less probable it was.

    On hover a token tells its id, its position, its probability, the model's own if processors changed it, and the
    alternatives, if `top_logprobs` was asked for. At most 32 rows and 2,000 new tokens are shown; a line says how many
    are not. No scripts, and nothing is loaded. `tokenizer` is an object, a directory or a hub id, by default that of
    the model's checkpoint; if there is none, ids are shown.

    >>> model, tokenizer = getfixture("demo")
    >>> inputs = tokenizer(["A list of colors: red, blue"], return_tensors="np")
    >>> html(model.generate(**inputs, return_dict_in_generate=True)).count('<span class="jaxgen-token"')
    20
    """
    rows, texts = rows_of(output), texts_of(output, tokenizer)
    blocks, left = [], MOST_TOKENS
    for row in rows[:MOST_ROWS]:
        if left <= 0:
            break
        blocks.append(_row_html(output, row, texts, left))
        left -= len(row.new_ids)
    hidden = rows[len(blocks) :]
    if hidden:
        tokens = _counted(sum(len(row.new_ids) for row in hidden), "new token")
        blocks.append(_note(f"{_counted(len(hidden), 'more row')} ({tokens}) not shown"))
    lines = 4 if output.top_ids is None else 6 + output.top_ids.shape[2]
    room = f"--jaxgen-room:{1.05 * lines - 2:.1f}em"  # what the last line's tokens have to say takes
    return f'<div class="jaxgen-out" style="{room}"><style>{_STYLE}</style>{_legend()}{"".join(blocks)}</div>'


def _row_html(output: Any, row: Row, texts: Texts, most: int) -> str:
    prompt, new = texts.whole(row.prompt_ids), row.new_ids[:most]
    cut = max(0, len(prompt) - MOST_PROMPT)
    spans = [f'<span class="jaxgen-prompt">{"… " if cut else ""}{_visible(prompt[cut:])}</span>']
    for step, text in enumerate(texts.pieces(row.prompt_ids, new)):
        style = f"background:{_tint(math.exp(output.logprobs[row.index, step]))}"
        about = escaping.escape(_about(output, row, step, text, texts)).replace("\n", "&#10;")
        spans.append(f'<span class="jaxgen-token" style="{style}" data-about="{about}">{_visible(text)}</span>')
    notes = [f"row {row.index}", output.finish_reason[row.index], _counted(len(row.new_ids), "token")]
    if output.generation_config.do_sample and row.seed is not None:
        notes.append(f"seed {row.seed}")
    if len(new) < len(row.new_ids):
        notes.append(f"{_counted(len(row.new_ids) - len(new), 'more token')} not shown")
    if cut:
        notes.append(f"the first {_counted(cut, 'character')} of the prompt not shown")
    return f'<div class="jaxgen-text" dir="auto">{"".join(spans)}</div>{_note(" · ".join(notes))}'


def _about(output: Any, row: Row, step: int, text: str, texts: Texts) -> str:
    """What there is to say of a token, in lines."""
    token = row.new_ids[step]
    logprob, own = output.logprobs[row.index, step], output.model_logprobs[row.index, step]
    named = f"{texts.name(token)}  (part of a character)" if text == "" else repr(text)
    lines = [named, f"id {token}, position {len(row.prompt_ids) + step}", f"probability {percent(logprob)}"]
    if not math.isclose(logprob, own, abs_tol=1e-4):
        lines.append(f"model's own {percent(own)}")
    if output.top_ids is not None:
        lines += ["", "the model's choices:"]
        for other, its in zip(output.top_ids[row.index, step], output.top_logprobs[row.index, step], strict=True):
            mark = ">" if other == token else " "
            lines.append(f"{mark}{percent(its):>8} {texts.name(int(other))!r}")
    return "\n".join(lines)


def _visible(text: str) -> str:
    """Text as HTML; line breaks are marked, and what cannot be seen is spelt out."""
    parts = []
    for part in re.split(f"(\n|{_INVISIBLE.pattern})", text):
        if part == "\n":
            parts.append('<span class="jaxgen-line"></span>\n')
        elif _INVISIBLE.fullmatch(part):
            parts.append(f'<span class="jaxgen-code">{spelt(part)}</span>')
        else:
            parts.append(escaping.escape(part))
    return "".join(parts)


def spelt(text: str) -> str:
    """Text with what cannot be seen as Python writes it: backslashes and numbers."""
    return _INVISIBLE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def percent(logprob: float | np.floating) -> str:
    """A log-probability as a percentage; very small ones as a power of ten.

    >>> [percent(math.log(p)) for p in (0.931, 1.0, 0.00001234)] + [percent(-math.inf)]
    ['93.1%', '100.0%', '1.2e-05', '0.0%']
    """
    probability = math.exp(logprob)
    return f"{probability:.1e}" if 0 < probability < 0.0005 else f"{probability:.1%}"


def _tint(probability: float) -> str:
    """Orange, the stronger the less probable."""
    return f"rgba(240,110,0,{0.65 * (1 - min(probability, 1)):.3f})"


def _legend() -> str:
    swatches = (
        f'<span style="background:{_tint(share)};padding:.1em .5em">{share:.0%}</span>'
        for share in (1, 0.75, 0.5, 0.25, 0)
    )
    return f'<div class="jaxgen-legend">probability {"".join(swatches)} · point at a token for more</div>'


def _note(text: str) -> str:
    return f'<div class="jaxgen-note">{escaping.escape(text)}</div>'


def _counted(number: int, what: str) -> str:
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def to_pandas(output: Any, tokenizer: Any = None) -> Any:
    """A result as a pandas DataFrame with one line per new token.

    Columns: `row`; `prompt`, the index of the prompt in the call, and `sample`, of the rows that continue it; `step`
    counts a row's new tokens from 0, `position` its tokens; `token_id`; `text`, what the token adds to the text, None
    without a tokenizer; `logprob` as drawn, after processors, and `probability`, its exponential; `model_logprob`, the
    model's own; `finish_reason` where the row ends, else None. With `top_logprobs` or `output_logits` also `rank`:
    1 for the model's most probable token, missing if it is not among those asked for. With `top_logprobs` also
    `top_ids`, `top_texts` and `top_logprobs`, tuples. Raises `JaxgenError` if pandas is not installed.

    >>> model, tokenizer = getfixture("demo")
    >>> inputs = tokenizer(["A list of colors: red, blue"], return_tensors="np")
    >>> table = to_pandas(model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True))
    >>> table["text"].tolist(), table["finish_reason"].tolist()
    ([',', ' g', 're'], [None, None, 'length'])
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise JaxgenError("to_pandas needs a package: pip install pandas") from error

    texts = texts_of(output, tokenizer)
    lines = [line for row in rows_of(output) for line in _lines(output, row, texts)]
    table = pd.DataFrame(lines)
    if "rank" in table:
        table["rank"] = table["rank"].astype("Int64")
    for name in {"text", "finish_reason"} & set(table):  # None, not NaN, where there is nothing
        table[name] = pd.Series([line[name] for line in lines], dtype=object)
    return table


def _lines(output: Any, row: Row, texts: Texts) -> Iterable[dict[str, Any]]:
    pieces = texts.pieces(row.prompt_ids, row.new_ids) if texts.known else None
    for step, token in enumerate(row.new_ids):
        logprob, at = float(output.logprobs[row.index, step]), (row.index, step)
        line: dict[str, Any] = {
            "row": row.index,
            "prompt": row.prompt,
            "sample": row.sample,
            "step": step,
            "position": len(row.prompt_ids) + step,
            "token_id": token,
            "text": None if pieces is None else pieces[step],
            "logprob": logprob,
            "model_logprob": float(output.model_logprobs[at]),
            "probability": math.exp(logprob),
        }
        logits = step_logits(output, row.index, step)
        if logits is not None:
            line["rank"] = int((logits > logits[token]).sum()) + 1
        elif output.top_ids is not None:
            found = np.flatnonzero(output.top_ids[at] == token)
            line["rank"] = int(found[0]) + 1 if found.size else None
        if output.top_ids is not None:
            ids = tuple(output.top_ids[at].tolist())
            line |= {"top_ids": ids, "top_texts": tuple(map(texts.name, ids)) if texts.known else None}
            line["top_logprobs"] = tuple(output.top_logprobs[at].tolist())
        yield line | {"finish_reason": output.finish_reason[row.index] if step + 1 == len(row.new_ids) else None}


def step_logits(output: Any, row: int, step: int) -> Any:
    """The logits [V] from which a row's token was made; None if `output_logits` was not asked for."""
    if output.logits is None:
        return None
    beams = output.beam_indices
    return output.logits[step][row if beams is None else beams[row, step]]
