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
# # 07. Looking inside
#
# How does a small model know that 44 follows 43? Three ways of looking at a model that generates, and one that tells
# looking from mattering:
#
# - `top_logprobs`: what else it might have said;
# - `output_attentions`: which tokens each head reads;
# - the logit lens: what the model would say if it stopped after fewer layers (`output_hidden_states`, and the modules
#   `norm` and `lm_head`);
# - ablation: switch a head off, and see whether anything changes.

# %%
try:
    import jaxgen
except ImportError:  # in Colab: adds jaxgen, and leaves what is installed as it is
    # %pip install -q ..
    import jaxgen

# %%
MODEL = jaxgen.demo.path()  # 2.7M parameters, comes with the package
# The real thing: MODEL = "mistralai/Mistral-7B-Instruct-v0.3"
# (32 layers of 32 heads: choose some of them for the plots; and look where its tokenizer puts the digits)

# %%
import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from transformers import AutoTokenizer

plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
BLUE, ORANGE, GREY = "#1f5fa8", "#d1662b", "#8a8a8a"

model = jaxgen.AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
LAYERS, HEADS = model.config.num_hidden_layers, model.config.num_attention_heads


def pieces(ids):
    """Each token as it can be read; a space shows as ␣."""
    return [tokenizer.decode([token]).replace(" ", "␣").replace("\n", "⏎") or "·" for token in ids]


# %% [markdown]
# ## What else it might have said
#
# `top_logprobs=n` keeps the model's n best tokens of every step, and not whole vocabularies. They are the model's own
# log-probabilities, before temperature and filters. Here one row is sampled; the outlined token is the one drawn.

# %%
inputs = tokenizer(["I am a cat."], return_tensors="np")
options = {"do_sample": True, "seed": 8, "max_new_tokens": 18}
out = model.generate(**inputs, **options, top_logprobs=5, return_dict_in_generate=True)
new = out.sequences[0, inputs["input_ids"].shape[1] :]
print(repr(tokenizer.decode(new)))
print("ids:", new.tolist())

# %%
shades = ["#1f5fa8", "#4f86c0", "#83add6", "#b3cde6", "#dbe7f3"]
probabilities = np.exp(out.top_logprobs[0])
figure, axes = plt.subplots(figsize=(10.5, 3.9))
for step, (row, ids) in enumerate(zip(probabilities, out.top_ids[0], strict=True)):
    bottom = 0.0
    for rank, (value, token) in enumerate(zip(row, ids, strict=True)):
        drawn = token == new[step]
        edge = {"edgecolor": ORANGE, "linewidth": 2, "zorder": 3} if drawn else {"edgecolor": "white"}
        axes.bar(step, value, bottom=bottom, width=0.86, color=shades[rank], **edge)
        if value > 0.07:
            ink = "white" if rank < 2 else "black"
            place = {"ha": "center", "va": "center", "zorder": 4}
            axes.text(step, bottom + value / 2, pieces([token])[0], color=ink, fontsize=9, **place)
        bottom += value
axes.set(xticks=range(len(new)), xticklabels=pieces(new), xlim=(-0.6, len(new) - 0.4), ylim=(0, 1.01))
axes.set(ylabel="probability", xlabel="drawn tokens")
axes.yaxis.set_major_formatter(lambda value, _: f"{value:.0%}")
axes.set_title("A cat decides at the beginning of each sentence", loc="left", fontsize=11)
plt.show()

# %% [markdown]
# ## Attention maps
#
# `output_attentions=True` gives, as in transformers, a tuple over steps of tuples over layers of arrays
# `[rows, heads, queries, keys]`. The first step covers the whole prompt. So to look at a given text, generate a single
# token after it. jaxgen reads the finished text once more for this; the decoding loop carries nothing of it.

# %%
text = "A sequence of numbers: 41, 42, 43, 44, 45"
ids = tokenizer([text], return_tensors="np")["input_ids"]
out = model.generate(
    ids, max_new_tokens=1, return_dict_in_generate=True, output_attentions=True, output_hidden_states=True
)
attention = np.stack([layer[0] for layer in out.attentions[0]])
print("layers, heads, queries, keys:", attention.shape)
print("ids:", ids[0].tolist())
assert np.allclose(attention.sum(-1), 1, atol=1e-5)  # each query spends all of its attention

# %%
figure, grid = plt.subplots(LAYERS, HEADS, figsize=(9, 9.2), layout="constrained")
for layer in range(LAYERS):
    for head in range(HEADS):
        axes = grid[layer, head]
        axes.imshow(np.sqrt(attention[layer, head]), cmap="Blues", vmin=0, vmax=1, interpolation="nearest")
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"layer {layer}, head {head}", fontsize=8, color=GREY, pad=3)
        axes.spines[:].set(visible=True, color="#dddddd")
figure.supylabel("reading token, from top to bottom", fontsize=9)
figure.supxlabel("token that is read, from left to right", fontsize=9)
figure.suptitle("Square roots of attention weights: heads have habits", fontsize=11)
plt.show()

# %% [markdown]
# Some heads read their own token or the one before (a diagonal), and many draw diagonals further off: they look back
# by a fixed distance. One of these from near:

# %%
names = pieces(ids[0])
first = names.index(":")
figure, axes = plt.subplots(figsize=(7.2, 6))
image = axes.imshow(attention[LAYERS - 1, 2][first:, first:], cmap="Blues", vmin=0, vmax=1)
labels = names[first:]
axes.set(xticks=range(len(labels)), yticks=range(len(labels)))
axes.set_xticklabels(labels, fontsize=9)
axes.set_yticklabels(labels, fontsize=9)
axes.set(xlabel="token that is read", ylabel="reading token")
axes.set_title(f"Layer {LAYERS - 1}, head 2", loc="left", fontsize=11)
figure.colorbar(image, ax=axes, shrink=0.7, label="attention")
plt.show()

# %% [markdown]
# A number is four tokens here: a space, the tens, the units, a comma. When the model stands on the *tens* of a number
# and must say its units, this head reads the units of the number before, three tokens back. That is where one would
# look in order to count.
#
# ## Looking and mattering
#
# How much of its attention does each head spend on that one token? We take 14 texts that count through two-digit
# numbers, and average over all places where units are to be said.

# %%
starts = range(15, 85, 5)
texts = [f"A sequence of numbers: {', '.join(str(start + k) for k in range(8))}" for start in starts]
counting = tokenizer(texts, return_tensors="np")["input_ids"]
tens = np.arange(names.index("4") + 4, counting.shape[1], 4)  # from the second number on
pairs = zip(pieces(counting[0, tens]), pieces(counting[0, tens + 1]), strict=True)
print("the first text, tens and the units after them:", list(pairs))

out = model.generate(counting, max_new_tokens=1, return_dict_in_generate=True, output_attentions=True)
looking = np.stack(out.attentions[0])[:, :, :, tens, tens - 3].mean((1, 3))

# %% [markdown]
# Whether a head *matters* is another question. Its output enters the rest of the model through its own columns of
# `o_proj`. Setting these to zero switches the head off; on a Flax module this is one assignment, and it compiles
# nothing, because weights are arguments. What follows is the loss on the units, in nats.


# %%
@nnx.jit
def losses(model, ids):
    logprobs = jax.nn.log_softmax(model(ids[:, :-1]).logits)
    return -jnp.take_along_axis(logprobs, ids[:, 1:, None], axis=2)[..., 0]


def loss_without(heads):
    """The mean loss on units, with the heads [(layer, head), ...] switched off."""
    size, kept = model.config.head_size, []
    for layer, head in heads:
        weight = model.model.layers[layer].self_attn.o_proj.weight
        kept.append((weight, weight[...]))
        weight[...] = weight[...].at[:, head * size : (head + 1) * size].set(0)
    loss = float(np.asarray(losses(model, counting))[:, tens].mean())
    for weight, value in reversed(kept):
        weight[...] = value
    return loss


every = [(layer, head) for layer in range(LAYERS) for head in range(HEADS)]
mattering = np.array([loss_without([head]) for head in every]).reshape(LAYERS, HEADS)

# %%
figure, (left, right) = plt.subplots(1, 2, figsize=(9, 4), layout="constrained")
panels = (
    (left, looking, "Blues", "attention to the units before", "{:.0%}"),
    (right, mattering, "Oranges", "loss without the head, nats", "{:.2f}"),
)
for axes, values, colors, title, form in panels:
    axes.imshow(values, cmap=colors, vmin=0, vmax=max(values.max(), 0.5) * 1.15)
    for layer, head in every:
        value = values[layer, head]
        ink = "white" if value > 0.62 * max(values.max(), 0.5) else "#333333"
        axes.text(head, layer, form.format(value), ha="center", va="center", fontsize=9, color=ink)
    axes.set(xticks=range(HEADS), yticks=range(LAYERS), xlabel="head", ylabel="layer")
    axes.set_title(title, loc="left", fontsize=11)
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
plt.show()

# %% [markdown]
# The two pictures have little in common. Heads of the last two layers spend nearly all of their attention on the
# units, and each of them can be spared. Switching off heads of the first layer, which hardly look there, costs most.
#
# Are the lookers idle, then? Or is each one spared because others do the same? Switch them off together, and as many
# others, chosen at random, for comparison.

# %%
lookers = [head for head in every if looking[head] > 0.5]
rng, rest = np.random.default_rng(0), [head for head in every if head not in lookers and head[0] > 0]
others = [[rest[i] for i in rng.choice(len(rest), len(lookers), replace=False)] for _ in range(8)]
print(f"all heads on: {loss_without([]):.2f} nats")
print(f"without the {len(lookers)} lookers {lookers}: {loss_without(lookers):.2f} nats")
elsewhere = np.mean([loss_without(heads) for heads in others])
print(f"without {len(lookers)} others of layers 1 to 3 (mean of 8 draws): {elsewhere:.2f} nats")

# %% [markdown]
# So the lookers carry the digit, and stand in for each other. An attention map shows where a head looks; what the
# model does with it, only an intervention shows.
#
# ## The logit lens
#
# The residual stream after each layer has the same width as the one that the head reads. So one can ask of every
# layer: what would you say? ([nostalgebraist 2020](https://www.lesswrong.com/posts/AcKRB8wDpdaN6v6ru)) It takes the two
# modules at the end of the model. `hidden_states` are the embeddings, then each layer's output, the last one normed
# already, as in transformers.

# %%
prompt = tokenizer(["Monday, Tuesday, Wednesday,"], return_tensors="np")
out = model.generate(**prompt, max_new_tokens=12, return_dict_in_generate=True, output_hidden_states=True)
read = out.sequences[0, :-1]  # the last token is said, but never read
hidden = np.concatenate([np.stack([layer[0] for layer in step]) for step in out.hidden_states], axis=1)
print("layers + 1, tokens, width:", hidden.shape)
print("ids:", out.sequences[0].tolist())


@nnx.jit
def lens(model, hidden):
    """Probabilities [layers + 1, tokens, vocabulary]."""
    stream = jnp.concatenate([model.model.norm(hidden[:-1]), hidden[-1:]])
    return jax.nn.softmax(model.logits(stream))


said = np.asarray(lens(model, jnp.asarray(hidden, model.dtype)))
model_itself = jax.nn.softmax(model(read[None]).logits)[0]
assert np.allclose(said[-1], model_itself, atol=1e-3)  # what the last layer says, the model says

# %%
best, sure, read = said[:, 1:].argmax(-1), said[:, 1:].max(-1), read[1:]  # after <s> anything may come
figure, axes = plt.subplots(figsize=(12, 3.4), layout="constrained")
image = axes.imshow(sure, cmap="Blues", vmin=0, vmax=1.2, aspect="auto", origin="lower")
for layer in range(LAYERS + 1):
    final = best[layer] == best[-1]
    for column, piece in enumerate(pieces(best[layer])):
        ink = "white" if sure[layer, column] > 0.7 else "black" if final[column] else GREY
        axes.text(column, layer, piece, ha="center", va="center", fontsize=8, color=ink)
axes.set(xticks=range(len(read)), yticks=range(LAYERS + 1))
axes.set_xticklabels(pieces(read), fontsize=8)
axes.set_yticklabels(["embeddings", *(f"after layer {layer}" for layer in range(LAYERS))], fontsize=9)
axes.set_xlabel("token that has been read")
axes.set_title("What each layer would say next; darker is surer", loc="left", fontsize=11)
axes.spines[:].set_visible(False)
axes.tick_params(length=0)
plt.show()

# %% [markdown]
# Embeddings know nothing of the context. Inside a word one layer is often enough (*nes* calls for *day*); which day it
# is, takes more. At every token, from which layer on does the model's favourite stay what it is in the end?

# %%
agrees = best == best[-1]
settled = LAYERS + 1 - np.logical_and.accumulate(agrees[::-1]).sum(0)
figure, axes = plt.subplots(figsize=(12, 2.4), layout="constrained")
axes.bar(range(len(read)), settled, color=BLUE, width=0.7)
axes.set(xticks=range(len(read)), yticks=range(LAYERS + 1))
axes.set(xlim=(-0.6, len(read) - 0.4), ylim=(0, LAYERS + 0.2))
axes.set_xticklabels(pieces(read), fontsize=8)
axes.set(ylabel="layers needed", xlabel="token that has been read")
axes.set_title("Layers until the final answer stands", loc="left", fontsize=11)
axes.grid(axis="y", alpha=0.25)
plt.show()
print("ids:", best[-1].tolist())

# %% [markdown]
# ## Further
#
# - `model.score(texts)` gives the log-probability of every token of a text.
# - All of this works on a model of four bits too: `from_pretrained(MODEL, load_in_4bit=True)`. Ablation as above needs
#   float weights.
# - The modules have the names of transformers' (`model.model.layers[3].mlp.down_proj`), but `qkv_proj` and
#   `gate_up_proj` are fused; `jaxgen/models/decoder.py` says in which order.
