# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#       format_version: '1.3'
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # 06. Speculation and beams
#
# Plain decoding reads the model once per token and never looks back. Two ideas change one half of that each:
#
# - **Speculation**: something cheap guesses the next few tokens, and the model reads all guesses at once. It changes
#   how fast the text comes, and no token of it.
# - **Beam search**: several beginnings are kept side by side, and the most probable one wins in the end. It changes
#   the text.

# %%
try:
    import jaxgen
except ImportError:  # in Colab: adds jaxgen, and leaves what is installed as it is
    # %pip install -q ..
    import jaxgen

# %%
MODEL = jaxgen.demo.path()  # 2.7M parameters, comes with the package
# The real thing: MODEL = "mistralai/Mistral-7B-Instruct-v0.3"

# %%
import dataclasses

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from flax import nnx
from transformers import AutoTokenizer

plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREY = "#1f5fa8", "#d1662b", "#8a8a8a"

model = jaxgen.AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token

# %% [markdown]
# ## Prompt lookup: the text itself guesses
#
# The cheapest guess: where did the last two tokens stand before, and what followed there? `prompt_lookup_num_tokens`
# says how many tokens to copy from that place. The model reads them in one pass, and keeps those that it would have
# chosen itself, up to the first that it would not.
#
# Four rows, plain first, sampled at a low temperature. `eos_token_id=None` lets all of them run to the end, so that the
# numbers compare.

# %%
texts = ["1, 2, 3, 4, 5, 6, 7, 8,", "A list of colors: red, blue", "I am a cat. I am a cat.", "Portugal is"]
inputs = tokenizer(texts, padding=True, return_tensors="np")
options = {"max_new_tokens": 32, "eos_token_id": None, "return_dict_in_generate": True}
options |= {"do_sample": True, "top_k": None}

plain = model.generate(**inputs, **options, seed=0, temperature=0.25)
for row in plain.sequences:
    print("ids:", row[inputs["input_ids"].shape[1] :].tolist())

# %% [markdown]
# Speculation must give the same ids, so that is asserted, here and below. `out.drafted` and `out.accepted` count per
# row. A pass over a row gives the drafts that were accepted and one token more, hence *passes = tokens - accepted*.


# %%
def account(out):
    frame = pd.DataFrame({"prompt": texts, "drafted": out.drafted, "accepted": out.accepted})
    frame["passes"] = out.lengths - out.accepted
    frame["tokens per pass"] = (out.lengths / frame["passes"]).round(2)
    return frame.set_index("prompt")


looked_up = model.generate(**inputs, **options, seed=0, temperature=0.25, prompt_lookup_num_tokens=4)
assert (looked_up.sequences == plain.sequences).all()
account(looked_up)

# %% [markdown]
# Each row goes its own way: rows of one batch accept different numbers of drafts. The cat repeats itself, so nearly
# everything is copied. Counting repeats its commas only, and what follows a comma is never what followed the last one.
# The sentence about Portugal finds nothing to copy, so nothing is drafted and nothing is lost.
#
# ## An assistant
#
# `assistant_model` is a smaller model with the same vocabulary. Here it is the demo without its last layer, made in
# two lines; for a 7B model it would be a small one of the same family. It stops drafting early when its own confidence
# falls below `assistant_confidence_threshold`.

# %%
assistant = jaxgen.AutoModelForCausalLM.from_pretrained(MODEL)
assistant.model.layers = assistant.model.layers[:-1]
assistant.config = dataclasses.replace(assistant.config, num_hidden_layers=len(assistant.model.layers))

assisted = {"assistant_model": assistant, "num_assistant_tokens": 4, "assistant_confidence_threshold": 0.0}
out = model.generate(**inputs, **options, **assisted, seed=0, temperature=0.25)
assert (out.sequences == plain.sequences).all()
account(out)

# %% [markdown]
# ## The assistant draws with the same noise
#
# A token at some position of some row is always drawn with the noise that belongs to this row and position. The
# assistant draws its guess with that same noise. So it guesses the model's *draw*, not only the model's favourite, and
# a guess is accepted when the two agree. No randomness is spent on accepting, and the tokens are again those of plain
# sampling with this seed.
#
# How often do they agree? Four seeds for each prompt at several temperatures (numbers, so nothing is compiled again).

# %%
temperatures = [0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 6.0]
accepted, drafted = np.zeros((2, len(temperatures), len(texts)))
for index, temperature in enumerate(temperatures):
    for seed in range(4):
        sampling = options | {"temperature": temperature, "seed": seed}
        sampled = model.generate(**inputs, **sampling)
        out = model.generate(**inputs, **sampling, **assisted)
        assert (out.sequences == sampled.sequences).all()
        accepted[index] += out.accepted
        drafted[index] += out.drafted
rates = accepted / drafted

# %%
figure, axes = plt.subplots(figsize=(7, 3.6))
for text, rate, color in zip(texts, rates.T, (BLUE, "#7c4fa0", "#2d8a57", ORANGE), strict=True):
    axes.plot(temperatures, rate, "o-", ms=3.5, lw=1, color=color, alpha=0.75, label=text)
axes.plot(temperatures, rates.mean(1), color="black", lw=2.2, label="mean")
axes.set(xlabel="temperature", ylabel="drafts accepted", ylim=(0, 1.04))
axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
axes.set_title("Guesses are worst where model and noise have equal say", loc="left", fontsize=11)
axes.legend(frameon=False, fontsize=8, loc="lower right")
axes.grid(axis="y", alpha=0.25)
plt.show()

# %% [markdown]
# Cold, both take the token that the text all but dictates. Hot, the noise decides, and they share it, so they agree
# again. An assistant that drew with noise of its own would hardly ever guess what the model draws there.
#
# Does it pay? That depends on what a pass over five tokens costs against a pass over one. On a GPU decoding waits for
# the weights to arrive, and five tokens cost little more than one; on a CPU they cost a multiple, and speculation does
# not pay. `python benchmarks/speculate.py` measures it on your machine.
#
# ## Beam search
#
# Greedy search takes the best next token, and may be led into a corner: the best first step need not begin the best
# text. `num_beams=4` keeps the four most probable beginnings at each step.

# %%
prompt = tokenizer(["The"], return_tensors="np")
greedy = model.generate(**prompt, max_new_tokens=24, return_dict_in_generate=True)
search = {"num_beams": 4, "num_return_sequences": 4}
beams = model.generate(**prompt, **search, max_new_tokens=24, return_dict_in_generate=True)


def describe(out, row):
    text = tokenizer.decode(out.sequences[row], skip_special_tokens=True)
    return {"text": text, "log p": out.model_logprobs[row].sum(), "tokens": out.lengths[row]}


table = pd.DataFrame([describe(greedy, 0), *(describe(beams, row) for row in range(4))])
table.insert(0, "search", ["greedy", *(f"beam {rank}" for rank in range(1, 5))])
table["score"] = [np.nan, *beams.sequences_scores]
print("ids:", beams.sequences[0].tolist())
table.round(3)

# %% [markdown]
# ### A tree, by hand
#
# What happens inside is short enough to write down. Each step extends all beams by all tokens, adds the
# log-probabilities, and keeps the best four. The function below uses nothing but `model(ids).logits`, padded on the right to
# one width so that it compiles once.

# %%
forward = nnx.jit(lambda model, ids: jax.nn.log_softmax(model(ids).logits))


def beam_search(ids, beams, steps):
    """The beams, and for each step (their new tokens, their parents' ranks, log-probabilities)."""
    start, width = len(ids), len(ids) + steps
    rows, totals, trace = [list(ids)], np.zeros(1), []
    for step in range(steps):
        filled = rows + rows[:1] * (beams - len(rows))
        padded = np.array([row + [0] * (width - len(row)) for row in filled])
        following = np.asarray(forward(model, jnp.asarray(padded)))[: len(rows), start + step - 1]
        candidates = totals[:, None] + following
        best = np.argsort(-candidates, axis=None, kind="stable")[:beams]
        parents, tokens = np.unravel_index(best, candidates.shape)
        rows = [[*rows[parent], int(token)] for parent, token in zip(parents, tokens, strict=True)]
        totals = candidates[parents, tokens]
        trace.append((tokens, parents, totals))
    return rows, trace


STEPS = 9
found, trace = beam_search(prompt["input_ids"][0].tolist(), beams=4, steps=STEPS)
expected = model.generate(**prompt, **search, max_new_tokens=STEPS, return_dict_in_generate=True)
assert found == expected.sequences.tolist()
print("ids:", found)

# %%
alive = {(STEPS - 1, rank) for rank in range(4)}  # nodes from which a beam of the last step descends
for step in range(STEPS - 1, 0, -1):
    alive |= {(step - 1, int(trace[step][1][rank])) for rank in range(4) if (step, rank) in alive}
winner, rank = {}, 0
for step in range(STEPS - 1, -1, -1):
    winner[step], rank = rank, int(trace[step][1][rank])

figure, axes = plt.subplots(figsize=(10.5, 3.8))
for step, (tokens, parents, totals) in enumerate(trace):
    for rank in range(4):
        best, kept = winner[step] == rank, (step, rank) in alive
        color = ORANGE if best else BLUE if kept else "#b5b5b5"
        start, width = 0 if step == 0 else -int(parents[rank]), 2.4 if best else 1.2
        axes.plot([step - 1, step], [start, -rank], color=color, lw=width, zorder=1 + kept + best)
        piece = repr(tokenizer.decode([tokens[rank]]))[1:-1] or "·"
        box = {"boxstyle": "round,pad=0.3", "fc": "white", "ec": color}
        axes.text(step, -rank, piece, ha="center", va="center", fontsize=9, color=color, bbox=box, zorder=5)
        axes.text(step, -rank - 0.36, f"{totals[rank]:.1f}", ha="center", fontsize=7, color=GREY, zorder=6)
root = {"boxstyle": "round,pad=0.3", "fc": "black", "ec": "black"}
axes.text(-1, 0, "The", ha="center", va="center", fontsize=9, color="white", bbox=root, zorder=5)
axes.set(xlim=(-1.5, STEPS - 0.4), ylim=(-3.7, 0.6), yticks=[])
axes.set_xticks(range(STEPS), range(1, STEPS + 1))
axes.spines["left"].set_visible(False)
axes.set_xlabel("new tokens; below each its beginning's log-probability; best beam on top")
title = "Orange: the best beam. Blue: beams that last. Grey: given up on the way."
axes.set_title(title, loc="left", fontsize=11)
plt.show()

# %% [markdown]
# ### Scores and `length_penalty`
#
# Each further token makes a text less probable, so the plain log-probability favours short texts. Beam search ranks
# finished texts by
#
# $$\text{score} = \frac{\log p(\text{text})}{\text{length}^{\,\alpha}}, \qquad \alpha = \texttt{length\_penalty}.$$
#
# As $\log p$ is negative, a larger $\alpha$ favours *longer* texts, whatever the name suggests. The scores that come
# back can be checked by hand:

# %%
assert np.allclose(beams.sequences_scores, beams.model_logprobs.sum(1) / beams.lengths**1.0, atol=1e-5)

hello = tokenizer(["Hello"], return_tensors="np")
penalties = [-1.0, -0.5, 0.0, 0.5, 1.0, 1.5, 2.0]
seen, winners = {}, []
for penalty in penalties:
    options = {"max_new_tokens": 28, "length_penalty": penalty, "return_dict_in_generate": True}
    out = model.generate(**hello, **search, **options)
    logp = out.model_logprobs.sum(1)
    assert np.allclose(out.sequences_scores, logp / out.lengths**penalty, rtol=1e-4)
    best = tokenizer.decode(out.sequences[0], skip_special_tokens=True)
    seen[best] = float(logp[0]), int(out.lengths[0])
    winners.append((best, float(out.sequences_scores[0])))
    print(f"length_penalty={penalty:4}  new tokens: {out.lengths[0]:2}  {best}")
    print("ids:", out.sequences[0, hello["input_ids"].shape[1] :][: out.lengths[0]].tolist())

# %% [markdown]
# $\log(-\text{score}) = \log(-\log p) - \alpha \log(\text{length})$: a straight line for each text, and steeper for a
# longer one. Where two lines cross, the winner changes.

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.8))
grid = np.linspace(-1.1, 2.1, 50)
best_two = sorted({text for text, _ in winners}, key=lambda text: seen[text][1])
for color, text in zip((BLUE, ORANGE, "#2d8a57"), best_two, strict=False):
    logp, length = seen[text]
    short = text if len(text) < 46 else text[:44] + "..."
    axes.plot(grid, -logp / length**grid, color=color, label=f"{short} ({length} tokens)")
    for penalty, (name, score) in zip(penalties, winners, strict=True):
        if name == text:
            axes.plot(penalty, -score, "o", color=color, ms=7)
axes.set(yscale="log", xlabel="length_penalty", ylabel="-score (lower is better)")
axes.set_title("Dots: what beam search returned", loc="left", fontsize=11)
axes.legend(frameon=False, fontsize=8.5)
axes.grid(alpha=0.2)
plt.show()

# %% [markdown]
# ## Further
#
# - `do_sample=True` with beams draws the candidates, and is as reproducible as any sampling here (`seed=`).
# - `early_stopping` says when a search is over: `False` (a guess about what may still come), `True` (as soon as
#   `num_beams` texts have ended) or `"never"` (when nothing better is possible). Names and results are transformers'.
# - For open text beam search is rarely what you want: the most probable text is often a dull one.
