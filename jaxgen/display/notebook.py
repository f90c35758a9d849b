"""A result as one looks at it: coloured text in a notebook, a few lines in a terminal."""

import html as escaping
import math
import re
from typing import Any

import numpy as np

from jaxgen.display.rows import Row, rows_of
from jaxgen.display.texts import INVISIBLE, Texts, spelt, texts_of

MOST_ROWS = 32  # that html shows; a notebook keeps what it shows
MOST_TOKENS = 2000  # new ones, over all rows
MOST_PROMPT = 2000  # characters of one prompt
MOST_LINES = 8  # rows in a summary

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
    for part in re.split(f"(\n|{INVISIBLE.pattern})", text):
        if part == "\n":
            parts.append('<span class="jaxgen-line"></span>\n')
        elif INVISIBLE.fullmatch(part):
            parts.append(f'<span class="jaxgen-code">{spelt(part)}</span>')
        else:
            parts.append(escaping.escape(part))
    return "".join(parts)


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
