"""Plots of results and models, with matplotlib, which is imported when the first one is drawn.

    from jaxgen import plot
    plot.token_probabilities(output)

Every function draws on `ax`, or on a figure of its own, and returns the matplotlib Axes; none calls `plt.show`, and
colours and text follow the style in effect. `tokenizer` is an object, a directory or a hub id, by default that of the
model's checkpoint; if there is none, ids are shown. Entropies and divergences are in nats, as log-probabilities are.
All functions raise `JaxgenError` for bad input, and if matplotlib is not installed.
"""

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxgen.display.axes import axes, ink, label_of, legend, name_tokens, new_labels, row_of, tints
from jaxgen.display.lines import column_widths, lines_of, shared_with_first
from jaxgen.display.measures import along, divergence_of, entropy_of, probabilities_under
from jaxgen.display.rows import step_logits
from jaxgen.display.texts import Texts
from jaxgen.errors import JaxgenError
from jaxgen.text.tokenizer import tokenizer_for


def token_probabilities(output: Any, row: Any = 0, tokenizer: Any = None, ax: Any = None) -> Any:
    """A bar for each new token of a row: the probability with which it was drawn, after processors.

    Where the model's own probability is another one, a dash shows it.

    >>> model, tokenizer = getfixture("demo")
    >>> inputs = tokenizer(["A list of colors: red, blue"], return_tensors="np")
    >>> ax = token_probabilities(model.generate(**inputs, max_new_tokens=8, return_dict_in_generate=True))
    >>> len(ax.patches), ax.get_ylabel()
    (8, 'probability')
    """
    chosen = row_of(output, row)
    number = len(chosen.new_ids)
    drawn = np.exp(output.logprobs[chosen.index, :number])
    own = np.exp(output.model_logprobs[chosen.index, :number])
    ax = axes(ax, 1.5 + 0.22 * number)
    ax.bar(range(number), drawn, width=0.8, label="as drawn")
    if not np.allclose(drawn, own, atol=1e-3):
        ax.plot(range(number), own, "_", color="C1", markersize=8, markeredgewidth=2, label="the model's own")
        legend(ax)
    ax.set_ylim(0, 1)
    ax.set_ylabel("probability")
    name_tokens(ax, range(number), new_labels(output, chosen, tokenizer))
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
    chosen = row_of(output, row)
    number = len(chosen.new_ids)
    if output.logits is not None:
        logits = np.stack([step_logits(output, chosen.index, step) for step in range(number)])
        values = np.asarray(entropy_of(jnp.asarray(logits)))
    elif output.origin is not None:
        ids = np.array(chosen.prompt_ids + chosen.new_ids, np.int32)
        values = along(entropy_of, (output.origin.model,), ids)[-number:]
    else:
        raise JaxgenError("entropy: this output has neither logits nor a model; generate with output_logits=True")
    ax = axes(ax, 1.5 + 0.22 * number)
    ax.plot(range(number), values, "o-", markersize=4, clip_on=False, label="entropy")
    surprisal = -output.model_logprobs[chosen.index, :number]
    ax.plot(
        range(number), surprisal, "x", markersize=6, markeredgewidth=1.5, clip_on=False, label="the token's surprisal"
    )
    ax.set_ylim(bottom=0)
    ax.set_ylabel("nats")
    legend(ax)
    name_tokens(ax, range(number), new_labels(output, chosen, tokenizer))
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
    ax = axes(ax, 1.5 + len(groups) * max(0.22, 0.13 * len(settings)))
    for number, (label, options) in enumerate(settings.items()):
        probabilities = probabilities_under(table, label, options)
        heights = np.append(probabilities[best], max(0.0, 1 - probabilities[best].sum()))
        ax.bar(groups + (number - (len(settings) - 1) / 2) * width, heights, width, label=str(label))
    ax.axvline(len(best) - 0.5, color="gray", linewidth=0.8, linestyle=":")
    ax.set_ylabel("probability")
    legend(ax)
    name_tokens(ax, groups, [*(label_of(texts.name(int(token))) for token in best), "all others"])
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
    lines = lines_of(outputs, tokenizer)
    widths = column_widths(lines)
    steps, edges = len(widths), np.concatenate([[0], np.cumsum(widths)])
    ax = axes(ax, 2.5 + 0.088 * edges[-1], 0.6 + 0.3 * len(lines), most=20)
    shares = np.full((len(lines), steps), np.nan)
    for y, line in enumerate(lines):
        count, common = min(steps, len(line.labels)), shared_with_first(line, lines)
        shares[y, :count] = np.exp(line.logprobs[:count])
        for x, text in enumerate(line.labels[:count]):
            alpha = 1 if common is None or x >= common else 0.45
            style = {"va": "center", "fontsize": 8, "family": "monospace", "alpha": alpha, "color": ink(ax)}
            ax.text(edges[x] + 0.6, y + 0.5, text, clip_on=True, parse_math=False, **style)
        if common is not None and common < count:
            ax.plot([edges[common]] * 2, [y + 0.06, y + 0.94], color="C0", linewidth=3, solid_capstyle="butt")
    mesh = ax.pcolormesh(edges, np.arange(len(lines) + 1), shares, cmap=tints(), vmin=0, vmax=1, zorder=0)
    bar = ax.figure.colorbar(mesh, ax=ax, label="probability", fraction=0.05, pad=0.01, aspect=12, ticks=[0, 0.5, 1])
    bar.ax.tick_params(colors=ink(ax))
    bar.ax.yaxis.label.set_color(ink(ax))
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
    values = [along(divergence_of, (model, other), ids) for ids in rows]
    ax = axes(ax, 1.5 + 0.22 * max(map(len, values)))
    for row, divergence in enumerate(values):
        label = f"mean {divergence.mean():.2g}" if len(rows) == 1 else f"text {row}: mean {divergence.mean():.2g}"
        ax.plot(range(1, len(divergence) + 1), divergence, "o-", markersize=3, label=label)
    ax.set_ylabel("KL (nats)")
    ax.set_ylim(bottom=0)
    if len(rows) == 1:
        legend(ax)
    elif len(rows) <= 10:
        ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    if len(rows) > 1:
        ax.set_xlabel("position")
        ax.xaxis.get_major_locator().set_params(integer=True)
        return ax
    ids = rows[0].tolist()
    name_tokens(ax, range(1, len(ids)), [label_of(text) for text in Texts(tokenizer).pieces(ids[:1], ids[1:])])
    return ax
