"""Plots of results and models, with matplotlib, which is imported when the first one is drawn.

    from jaxgen import plot
    plot.token_probabilities(output)

Every function draws on `ax`, or on a figure of its own, and returns the matplotlib Axes; none calls `plt.show`, and
colours and text follow the style in effect. `tokenizer` is an object, a directory or a hub id, by default that of the
model's checkpoint; if there is none, ids are shown. Entropies and divergences are in nats, as log-probabilities are.
All functions raise `JaxgenError` for bad input, and if matplotlib is not installed.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxgen.errors import JaxgenError, NonFiniteLogitsError, UnsupportedError
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.options.table import OPTIONS
from jaxgen.generation.processors.chain import chain_of
from jaxgen.generation.programs.weights import split
from jaxgen.generation.prompts.layout import SMALLEST_PROMPT, bucket, pad_to
from jaxgen.generation.prompts.rows import Rows
from jaxgen.lowering import own_rules
from jaxgen.text.show import Row, Texts, rows_of, spelt, step_logits, texts_of
from jaxgen.text.tokenizer import tokenizer_for

_BLOCK = 64  # positions whose logits are held at a time
_MOST_LABELS = 80  # tokens that are named along an axis
_MOST_CHARACTERS = 150  # across a grid of tokens
_SHOWN_SPACE, _SHOWN_LINE = "␣", "↵"


def token_probabilities(output: Any, row: Any = 0, tokenizer: Any = None, ax: Any = None) -> Any:
    """A bar for each new token of a row: the probability with which it was drawn, after processors.

    Where the model's own probability is another one, a dash shows it.

    >>> model, tokenizer = getfixture("demo")
    >>> inputs = tokenizer(["A list of colors: red, blue"], return_tensors="np")
    >>> ax = token_probabilities(model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True))
    >>> len(ax.patches), ax.get_ylabel()
    (8, 'probability')
    """
    chosen = _row(output, row)
    number = len(chosen.new_ids)
    drawn = np.exp(output.logprobs[chosen.index, :number])
    own = np.exp(output.model_logprobs[chosen.index, :number])
    ax = _axes(ax, 1.5 + 0.22 * number)
    ax.bar(range(number), drawn, width=0.8, label="as drawn")
    if not np.allclose(drawn, own, atol=1e-3):
        ax.plot(range(number), own, "_", color="C1", markersize=8, markeredgewidth=2, label="the model's own")
        _legend(ax)
    ax.set_ylim(0, 1)
    ax.set_ylabel("probability")
    _name_tokens(ax, range(number), _new_labels(output, chosen, tokenizer))
    return ax


def entropy(output: Any, row: Any = 0, tokenizer: Any = None, ax: Any = None) -> Any:
    """The entropy of the model's own distribution at each new token of a row, and the token's surprisal, in nats.

    The surprisal is minus the log-probability of the token: on average it equals the entropy if tokens are drawn from
    that distribution. Entropies come from `output.logits` if they were kept; else the model, if it is still as it was,
    reads the finished row once more.

    >>> model, tokenizer = getfixture("demo")
    >>> inputs = tokenizer(["A list of colors: red, blue"], return_tensors="np")
    >>> ax = entropy(model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True))
    >>> [line.get_label() for line in ax.lines]
    ['entropy', "the token's surprisal"]
    """
    chosen = _row(output, row)
    number = len(chosen.new_ids)
    if output.logits is not None:
        logits = np.stack([step_logits(output, chosen.index, step) for step in range(number)])
        values = np.asarray(_entropy(jnp.asarray(logits)))
    elif output.origin is not None:
        ids = np.array(chosen.prompt_ids + chosen.new_ids, np.int32)
        values = _along(_entropy, (output.origin.model,), ids)[-number:]
    else:
        raise JaxgenError("entropy: this output has neither logits nor a model; generate with output_logits=True")
    ax = _axes(ax, 1.5 + 0.22 * number)
    ax.plot(range(number), values, "o-", markersize=4, clip_on=False, label="entropy")
    surprisal = -output.model_logprobs[chosen.index, :number]
    ax.plot(
        range(number), surprisal, "x", markersize=6, markeredgewidth=1.5, clip_on=False, label="the token's surprisal"
    )
    ax.set_ylim(bottom=0)
    ax.set_ylabel("nats")
    _legend(ax)
    _name_tokens(ax, range(number), _new_labels(output, chosen, tokenizer))
    return ax


def distribution(logits: Any, settings: Any, tokenizer: Any = None, top: Any = 20, ax: Any = None) -> Any:
    """What is left of a distribution under sampling options: the probabilities of its `top` most likely tokens.

    `logits` [V] are the model's own, such as `output.logits[step][row]`; `settings` maps a label to options of
    `generate` (`temperature`, `top_p`, ...), an empty dict being the model's own distribution. The last group of bars
    is what all other tokens have together.

    >>> ax = distribution(np.log([0.5, 0.3, 0.2]), {"own": {}, "top_k=2": {"top_k": 2}}, top=2)
    >>> [[round(float(bar.get_height()), 3) for bar in bars] for bars in ax.containers]
    [[0.5, 0.3, 0.2], [0.625, 0.375, 0.0]]
    """
    table = np.asarray(logits, np.float32)
    if table.ndim != 1 or not np.isfinite(table.max(initial=-np.inf)):
        raise JaxgenError(f"logits has shape {table.shape}; expected one distribution [V] with finite logits in it")
    if not isinstance(settings, Mapping) or not settings:
        raise JaxgenError(f"settings={settings!r} must map labels to options, as {{'cold': {{'temperature': 0.5}}}}")
    if not isinstance(top, int) or top < 1:
        raise JaxgenError(f"top={top!r} must be an int of at least 1")
    best = np.argsort(-table, kind="stable")[:top]
    texts = Texts(None if tokenizer is None else tokenizer_for(None, tokenizer))
    groups, width = np.arange(len(best) + 1), 0.8 / len(settings)
    ax = _axes(ax, 1.5 + len(groups) * max(0.22, 0.13 * len(settings)))
    for number, (label, options) in enumerate(settings.items()):
        probabilities = _probabilities(table, label, options)
        heights = np.append(probabilities[best], max(0.0, 1 - probabilities[best].sum()))
        ax.bar(groups + (number - (len(settings) - 1) / 2) * width, heights, width, label=str(label))
    ax.axvline(len(best) - 0.5, color="gray", linewidth=0.8, linestyle=":")
    ax.set_ylabel("probability")
    _legend(ax)
    _name_tokens(ax, groups, [*(_label(texts.name(int(token))) for token in best), "all others"])
    return ax


def seeds(outputs: Any, tokenizer: Any = None, ax: Any = None) -> Any:
    """Continuations side by side, a line for each row: where they part, and how probable each token was.

    `outputs` is an output with several rows, a list of outputs, or a mapping from labels to outputs. A row's bar
    stands where it first differs from the first row with the same prompt; what they have in common is pale.

    >>> model, tokenizer = getfixture("demo")
    >>> inputs = tokenizer(["I like"], return_tensors="np")
    >>> options = {"do_sample": True, "max_new_tokens": 6, "return_dict_in_generate": True}
    >>> ax = seeds([model.generate(**inputs, seed=seed, **options) for seed in (1, 2, 3)])
    >>> [label.get_text() for label in ax.get_yticklabels()]
    ['seed 1', 'seed 2', 'seed 3']
    """
    lines = _grid_lines(outputs, tokenizer)
    widths = _column_widths(lines)
    steps, edges = len(widths), np.concatenate([[0], np.cumsum(widths)])
    ax = _axes(ax, 2.5 + 0.088 * edges[-1], 0.6 + 0.3 * len(lines), most=20)
    shares = np.full((len(lines), steps), np.nan)
    for y, line in enumerate(lines):
        count, common = min(steps, len(line.labels)), _common(line, lines)
        shares[y, :count] = np.exp(line.logprobs[:count])
        for x, text in enumerate(line.labels[:count]):
            alpha = 1 if common is None or x >= common else 0.45
            style = {"va": "center", "fontsize": 8, "family": "monospace", "alpha": alpha, "color": _ink(ax)}
            ax.text(edges[x] + 0.6, y + 0.5, text, clip_on=True, parse_math=False, **style)
        if common is not None and common < count:
            ax.plot([edges[common]] * 2, [y + 0.06, y + 0.94], color="C0", linewidth=3, solid_capstyle="butt")
    mesh = ax.pcolormesh(edges, np.arange(len(lines) + 1), shares, cmap=_tints(), vmin=0, vmax=1, zorder=0)
    bar = ax.figure.colorbar(mesh, ax=ax, label="probability", fraction=0.05, pad=0.01, aspect=12, ticks=[0, 0.5, 1])
    bar.ax.tick_params(colors=_ink(ax))
    bar.ax.yaxis.label.set_color(_ink(ax))
    ax.set_yticks(np.arange(len(lines)) + 0.5, [line.label for line in lines])
    ax.set_ylim(len(lines), 0)
    ax.set_xticks([])
    more = max(len(line.labels) for line in lines) - steps
    ax.set_xlabel(f"the first {steps} tokens; the longest row has {more} more" if more > 0 else "")
    ax.spines[:].set_visible(False)
    ax.tick_params(length=0)
    return ax


def kl(model: Any, other: Any, texts: Any, tokenizer: Any = None, ax: Any = None) -> Any:
    """KL(model || other) at each token of some texts, in nats: how far off `other` is where it would predict it.

    `texts` is a text or a list of texts, of at least two tokens each; the first token, which nothing precedes, has no
    value. `tokenizer` defaults to that of `model`'s checkpoint. With `model` in bfloat16 and `other` in int4 this is
    what four bits cost, place by place. Source: Kullback and Leibler 1951.

    >>> model, tokenizer = getfixture("demo")
    >>> ax = kl(model, model, "Portugal is a country")
    >>> float(abs(ax.lines[0].get_ydata()).max())
    0.0
    """
    if model.config.vocab_size != other.config.vocab_size:
        sizes = f"{model.config.vocab_size} and {other.config.vocab_size}"
        raise JaxgenError(f"kl: the models have vocabularies of {sizes} tokens; they must be the same")
    texts = [texts] if isinstance(texts, str) else list(texts)
    tokenizer = tokenizer_for(model, tokenizer)
    rows = [np.array(tokenizer(text)["input_ids"], np.int32) for text in texts]
    limit = min(model.config.max_position_embeddings, other.config.max_position_embeddings)
    for row, ids in enumerate(rows):
        if not 2 <= len(ids) <= limit:
            raise JaxgenError(f"texts[{row}] has {len(ids)} tokens; expected 2 to {limit}")
    if not rows:
        raise JaxgenError("kl: there are no texts")
    values = [_along(_divergence, (model, other), ids) for ids in rows]
    ax = _axes(ax, 1.5 + 0.22 * max(map(len, values)))
    for row, divergence in enumerate(values):
        label = f"mean {divergence.mean():.2g}" if len(rows) == 1 else f"text {row}: mean {divergence.mean():.2g}"
        ax.plot(range(1, len(divergence) + 1), divergence, "o-", markersize=3, label=label)
    ax.set_ylabel("KL (nats)")
    ax.set_ylim(bottom=0)
    if len(rows) == 1:
        _legend(ax)
    elif len(rows) <= 10:
        ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    if len(rows) > 1:
        ax.set_xlabel("position")
        ax.xaxis.get_major_locator().set_params(integer=True)
        return ax
    ids = rows[0].tolist()
    _name_tokens(ax, range(1, len(ids)), [_label(text) for text in Texts(tokenizer).pieces(ids[:1], ids[1:])])
    return ax


# The numbers.


def _entropy(logits: Float[Array, "t V"]) -> Float[Array, " t"]:
    logs = jax.nn.log_softmax(logits.astype(jnp.float32), axis=-1)
    return -jnp.where(jnp.isneginf(logs), 0, jnp.exp(logs) * logs).sum(axis=-1)


def _divergence(logits: Float[Array, "t V"], others: Float[Array, "t V"]) -> Float[Array, " t"]:
    ours, theirs = (jax.nn.log_softmax(x, axis=-1) for x in (logits, others))
    return (jnp.exp(ours) * (ours - theirs)).sum(axis=-1)


@own_rules()
def _along(measure: Callable[..., Any], models: tuple[Any, ...], ids: Int[np.ndarray, " T"]) -> Float[np.ndarray, " t"]:
    """A measure of the distributions from which models predict all ids of a text but the first: T - 1 values."""
    length = bucket(len(ids), SMALLEST_PROMPT)
    structures, weights = zip(*map(split, models), strict=True)
    tokens, real = pad_to(ids, (length,))[None], (np.arange(length) < len(ids))[None]
    values = np.asarray(_by_position(measure, structures, weights, tokens, real))[: len(ids) - 1]
    if not np.isfinite(values).all():
        raise NonFiniteLogitsError([0], [int(np.flatnonzero(~np.isfinite(values))[0])])
    return values


@functools.partial(jax.jit, static_argnums=(0, 1))
def _by_position(measure: Any, structures: Any, weights: Any, tokens: Any, real: Any) -> Any:
    """The measure at every position, from a few logits at a time: V of them for all positions would not fit."""
    models = [structure.module(arrays) for structure, arrays in zip(structures, weights, strict=True)]
    spare = -tokens.shape[1] % _BLOCK
    states = [jnp.pad(model.hidden(tokens, real), ((0, 0), (0, spare), (0, 0))) for model in models]

    def block(start: Any) -> Any:
        parts = [jax.lax.dynamic_slice_in_dim(hidden, start, _BLOCK, axis=1) for hidden in states]
        return measure(*(model.logits(part)[0] for model, part in zip(models, parts, strict=True)))

    return jax.lax.map(block, jnp.arange(0, tokens.shape[1], _BLOCK)).reshape(-1)


def _probabilities(logits: Float[np.ndarray, " V"], label: Any, options: Any) -> Float[np.ndarray, " V"]:
    """What `generate` would draw from under the options, by its own processors."""
    if not isinstance(options, Mapping):
        raise JaxgenError(f"settings[{label!r}]={options!r} must be a dict of options")
    sampling = [name for name, option in OPTIONS.items() if option.only_sampling]
    for name in options:
        if name not in sampling:
            raise UnsupportedError(f"settings[{label!r}]: {name!r} is none of {', '.join(sampling)}")
    config = GenerationConfig(**{"do_sample": True, "top_k": 0, **options})
    one = jnp.ones(1, jnp.int32)
    rows = Rows(jnp.zeros((1, 1), jnp.int32), one, one, one + 1, one - 1, jnp.ones(1, bool))
    scores = jnp.asarray(logits)[None]
    for processor in chain_of(config, len(logits)):
        scores = processor(scores, rows)
    return np.asarray(jax.nn.softmax(scores[0]))


# The drawing.

# Without a background, in a grey that can be read on white and on black.
_INK = "#7a7a7a"
_ON_ANY_PAGE: dict[Any, Any] = {
    "figure.facecolor": "none",
    "savefig.facecolor": "none",
    "axes.facecolor": "none",
    **dict.fromkeys(("text.color", "axes.edgecolor", "axes.labelcolor", "axes.titlecolor", "xtick.color"), _INK),
    "ytick.color": _INK,
}


def _axes(ax: Any, width: float, height: float = 3.0, most: float = 16) -> Any:
    if ax is not None:
        return ax
    try:
        import matplotlib as mpl
        import matplotlib.pyplot as plt
    except ImportError as error:
        raise JaxgenError("jaxgen.plot needs a package: pip install matplotlib") from error
    plain = all(mpl.rcParams[name] == mpl.rcParamsDefault[name] for name in ("text.color", "figure.facecolor"))
    with plt.rc_context(_ON_ANY_PAGE if plain else {}):  # whoever chose a style has it
        return plt.subplots(figsize=(min(max(width, 6), most), height), layout="constrained")[1]


def _legend(ax: Any) -> None:
    """Above the plot, where it covers nothing."""
    at = (0, 1)
    ax.legend(loc="lower left", bbox_to_anchor=at, ncols=3, frameon=False, borderaxespad=0.2, labelcolor=_ink(ax))


def _ink(ax: Any) -> Any:
    """What an axes is labelled with."""
    return ax.xaxis.label.get_color()


def _tints() -> Any:
    """As in a notebook's text: orange, the stronger the less probable, over whatever the background is."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("jaxgen", [(0.94, 0.43, 0, 0.65), (0.94, 0.43, 0, 0)])


def _row(output: Any, row: Any) -> Row:
    rows = rows_of(output)
    if not isinstance(row, int | np.integer) or isinstance(row, bool) or not 0 <= row < len(rows):
        raise JaxgenError(f"row={row!r} must be an int from 0 to {len(rows) - 1}")
    return rows[row]


def _new_labels(output: Any, row: Row, tokenizer: Any) -> list[str]:
    texts = texts_of(output, tokenizer)
    pieces = texts.pieces(row.prompt_ids, row.new_ids)
    return [_label(text or texts.name(token)) for text, token in zip(pieces, row.new_ids, strict=True)]


def _label(text: str) -> str:
    return spelt(text).replace(" ", _SHOWN_SPACE).replace("\n", _SHOWN_LINE)


def _name_tokens(ax: Any, places: Sequence[int] | np.ndarray, labels: list[str]) -> None:
    every = max(1, math.ceil(len(labels) / _MOST_LABELS))
    ax.set_xticks(
        places[::every], labels[::every], rotation=60, ha="right", rotation_mode="anchor", fontsize=8, parse_math=False
    )
    ax.margins(x=0.01)
    ax.spines[["top", "right"]].set_visible(False)


@dataclasses.dataclass(frozen=True)
class _Line:
    """A row in a grid of tokens."""

    label: str
    prompt: tuple[int, ...]
    ids: list[int]
    labels: list[str]
    logprobs: np.ndarray


def _grid_lines(outputs: Any, tokenizer: Any) -> list[_Line]:
    """Every row of every output."""
    if isinstance(outputs, Mapping):
        named = [(str(label), output) for label, output in outputs.items()]
    else:
        several = outputs if isinstance(outputs, Sequence) else [outputs]
        named = [(None, output) for output in several]
    if not named:
        raise JaxgenError("seeds: there are no outputs")
    lines = []
    for label, output in named:
        rows = rows_of(output)
        for row in rows:
            seed = row.seed if label is None and (len(named) > 1 or isinstance(output.seed, tuple)) else None
            names = [label] if label is not None else [] if seed is None else [f"seed {seed}"]
            own_seed = isinstance(output.seed, tuple) and len(output.seed) == len(rows)
            if not names or (len(rows) > 1 and not own_seed):
                names.append(f"row {row.index}")
            lines.append(
                _Line(
                    ", ".join(names),
                    tuple(row.prompt_ids),
                    row.new_ids,
                    _new_labels(output, row, tokenizer),
                    output.logprobs[row.index],
                )
            )
    return lines


def _common(line: _Line, lines: list[_Line]) -> int | None:
    """How many tokens a row has in common with the first row that continues its prompt; None for that row itself."""
    first = next(other for other in lines if other.prompt == line.prompt)
    if first is line:
        return None
    pairs = zip(line.ids, first.ids, strict=False)
    differs = (step for step, (ours, its) in enumerate(pairs) if ours != its)
    return next(differs, min(len(line.ids), len(first.ids)))


def _column_widths(lines: list[_Line]) -> list[int]:
    """Characters for each step that fits, and one to spare."""
    widths: list[int] = []
    for step in range(max(len(line.labels) for line in lines)):
        widths.append(1 + max(len(line.labels[step]) for line in lines if step < len(line.labels)))
        if len(widths) > 1 and sum(widths) > _MOST_CHARACTERS:
            return widths[:-1]
    return widths
