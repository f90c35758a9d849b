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
# # 03. Four bits
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/jaxgen/jaxgen/blob/main/notebooks/03_int4.ipynb)
#
# A model of 7 billion parameters takes 14.5 GB in bfloat16. With four bits per weight it takes about 4 GB, and fits on a
# small GPU with room for long texts. This notebook shows what `load_in_4bit=True` does, what it saves, what it costs in
# quality, and which files of four-bit weights there are.

# %%
try:
    import jaxgen
except ImportError:  # a fresh machine, such as Colab: adds jaxgen, and leaves what is installed as it is
    # %pip install -q jaxgen
    import jaxgen

# %%
MODEL = jaxgen.demo.path()  # the real one, on a GPU: MODEL = "mistralai/Mistral-7B-Instruct-v0.3"

# %%
import os
import tempfile
import time
from itertools import islice

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from transformers import AutoTokenizer

import jaxgen.plot
from jaxgen.demo.corpus import documents
from jaxgen.quant import quantize

BLUE, ORANGE, GRAY = "#0072b2", "#d55e00", "#8c8c8c"
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True})
plt.rcParams.update({"grid.alpha": 0.3, "legend.frameon": False, "axes.titlelocation": "left"})

tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
exact = jaxgen.AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")

# %% [markdown]
# ## One argument
#
# The weights are quantised while they are loaded, one tensor after the other. So the large model is never in memory as a
# whole: what stays is the four-bit one. All linear layers of the blocks become int4; embeddings, norms and the output head
# keep their precision.

# %%
model = jaxgen.AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32", load_in_4bit=True)

inputs = tokenizer(["A list of colors: red, blue", "Portugal is"], padding=True, return_tensors="np")
for name, one in (("float32", exact), ("int4", model)):
    ids = one.generate(**inputs)
    print(name, "ids:", ids.tolist())
    print(*tokenizer.batch_decode(ids, skip_special_tokens=True), sep="\n")

# %% [markdown]
# ## What it does to a weight
#
# Every 128 neighbours in a row of a weight share one scale. Each weight is then one of 16 multiples of it, from -8 to 7. The
# plain choice of the scale just reaches the largest weight of the group. jaxgen searches for the one with the least squared
# error: mostly a bit smaller, because cutting off one extreme weight costs less than coarse steps for all the others.

# %%
weight = np.asarray(exact.model.layers[0].self_attn.o_proj.weight[...], np.float32)
forms = {"largest / 7": quantize(weight, search=False), "searched": quantize(weight)}
row = weight[0, :128]

figure, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3.6), layout="constrained")
order = np.argsort(row)
left.plot(row[order], row[order], color=GRAY, linewidth=1)
for (name, form), color in zip(forms.items(), (ORANGE, BLUE), strict=True):
    values = np.asarray(form.dequantize())
    left.step(row[order], values[0, :128][order], color=color, where="mid", label=name)
    error = np.sqrt(((values - weight).reshape(-1, 128) ** 2).mean(axis=1) / (weight.reshape(-1, 128) ** 2).mean(axis=1))
    label = f"{name}: mean {100 * error.mean():.1f}%"
    right.hist(100 * error, bins=np.arange(5, 20, 0.5), color=color, alpha=0.6, label=label)
left.set(xlabel="weight", ylabel="weight in int4")
left.set_title("One group of 128")
left.legend()
right.set(xlabel="error of a group (% of its size)", ylabel="groups")
right.set_title("All groups of a layer")
right.legend()
plt.show()

# %% [markdown]
# ## What it saves
#
# A group of 128 weights takes 64 bytes and a scale of two: 4.125 bits per weight. Smaller groups are more exact and take a
# bit more. Below, the sizes of Mistral-7B, computed from its shapes alone; nothing is allocated.

# %%
shape = jaxgen.MistralConfig(
    vocab_size=32768,
    hidden_size=4096,
    intermediate_size=14336,
    num_hidden_layers=32,
    num_attention_heads=32,
    num_key_value_heads=8,
)
abstract = nnx.eval_shape(lambda: jaxgen.MistralForCausalLM(shape, rngs=nnx.Rngs(0), dtype="bfloat16"))
counts = {"linear layers": 0, "output head": 0, "embeddings and norms": 0}
for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.state(abstract)):
    name = jax.tree_util.keystr(path)
    part = "output head" if "lm_head" in name else "linear layers" if "_proj" in name else "embeddings and norms"
    counts[part] += leaf.size

print({part: f"{count:,}" for part, count in counts.items()})

settings = {"float32": (32, 32), "bfloat16": (16, 16)}  # bits of a linear layer's weight, and of the head's
settings |= {f"int4, groups of {group}": (4 + 16 / group, 16) for group in (32, 64, 128)}
settings["int4, head too"] = (4 + 16 / 128, 4 + 16 / 128)
sizes = {
    name: [
        counts["linear layers"] * linear / 8e9,
        counts["output head"] * head / 8e9,
        counts["embeddings and norms"] * (4 if name == "float32" else 2) / 1e9,
    ]
    for name, (linear, head) in settings.items()
}

figure, ax = plt.subplots(figsize=(7.5, 3.2))
names, table = list(sizes)[::-1], np.array(list(sizes.values()))[::-1]
start = np.zeros(len(names))
for column, (part, color) in enumerate(zip(counts, (BLUE, ORANGE, GRAY), strict=True)):
    ax.barh(names, table[:, column], left=start, color=color, label=part)
    start += table[:, column]
for height, total in enumerate(start):
    ax.text(total + 0.3, height, f"{total:.2f} GB", va="center")
ax.set(xlabel="GB", xlim=(0, 33))
ax.set_title("Mistral-7B's parameters")
ax.grid(axis="y", visible=False)
ax.legend(loc="lower right")
plt.show()

# %% [markdown]
# And the demo, as it stands in memory now. Its embeddings and its head are a large part of it, and they stay as they are, so
# it saves less than a large model does.


# %%
def megabytes(model):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))) / 1e6


print(f"float32 {megabytes(exact):.2f} MB, int4 {megabytes(model):.2f} MB (the rest of it in float32)")

# %% [markdown]
# `quantization_config=` says in detail what is to be done:

# %%
choices = {
    "groups of 128": jaxgen.Int4Config(),  # what load_in_4bit=True means
    "groups of 32": jaxgen.Int4Config(group_size=32),
    "128, head too": jaxgen.Int4Config(lm_head=True),
}
models = {
    name: jaxgen.AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32", quantization_config=choice)
    for name, choice in choices.items()
}
for name, one in models.items():
    print(f"{name:14} {megabytes(one):.2f} MB")

# %% [markdown]
# ## What it costs
#
# The honest measure is not one text that looks the same, but how far the whole distribution moves: the Kullback-Leibler
# divergence from the exact model's prediction to the int4 one's, at every place of a text. Zero means the same prediction;
# 0.01 nats is little. `jaxgen.plot.kl` shows it place by place.

# %%
figure, ax = plt.subplots(figsize=(9.5, 3.2), layout="constrained")
jaxgen.plot.kl(exact, model, "The capital of Portugal is Lisbon. Once upon a time there was a little cat.", ax=ax)
ax.set_title("float32 against int4, groups of 128")
plt.show()

# %% [markdown]
# Most places cost nothing. What it costs, it costs where the model itself is unsure: at the start, and where one sentence
# is over and anything may follow. An average over more text, with the standard error over texts, compares the choices. The
# texts are new ones from the demo's own kind of text; for another model take text of the kind that it will see.

# %%
texts = [document.text for document in islice(documents(3), 200)]
rows = tokenizer(texts, padding=True, truncation=True, max_length=64, return_tensors="np")


@nnx.jit
def log_probabilities(model, ids, mask):
    return jax.nn.log_softmax(model(ids, mask))


def divergence(other):
    """The mean KL divergence of each text, in nats per token."""
    ours, theirs = (log_probabilities(one, rows.input_ids, rows.attention_mask) for one in (exact, other))
    kl = (jnp.exp(ours) * (ours - theirs)).sum(axis=-1) * rows.attention_mask
    return np.asarray(kl.sum(axis=1) / rows.attention_mask.sum(axis=1))


half = jaxgen.AutoModelForCausalLM.from_pretrained(MODEL, dtype="bfloat16")
costs = {"bfloat16": divergence(half)} | {name: divergence(one) for name, one in models.items()}
for name, cost in costs.items():
    print(f"{name:14} {1e5 * cost.mean():6.2f} ± {1e5 * cost.std() / np.sqrt(len(cost)):.2f}  (1e-5 nats per token)")

# %%
figure, ax = plt.subplots(figsize=(7.5, 2.6))
for name, cost in reversed(costs.items()):
    color = GRAY if name == "bfloat16" else BLUE
    ax.barh(name, 1e5 * cost.mean(), xerr=1e5 * cost.std() / np.sqrt(len(cost)), color=color, alpha=0.85, capsize=3)
ax.set(xlabel="KL divergence from float32 (1e-5 nats per token)")
ax.set_title("What the weights' rounding costs, with standard errors")
ax.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# The head answers directly for every prediction, and it is small in a large model: that is why it keeps its precision. And
# there is a better way to spend the same bits. `gptq` and `autoround` look at text while they round, so that the errors of
# neighbouring weights cancel. That takes its time, and is done once, from a terminal; the result is a file to load:
#
#     jaxgen convert MODEL DIRECTORY --method gptq --calibration text.txt
#
# The README compares all methods on the demo (`python benchmarks/quality.py`).
#
# And does one notice? With the same seeds, both models use the same noise (notebook 02), so that two sampled texts only
# part where the distributions differ enough to tip a draw:

# %%
cat = tokenizer(["I am a cat."], return_tensors="np")
options = {"do_sample": True, "seed": range(256), "max_new_tokens": 40}
pairs = [one.generate(**cat, **options) for one in (exact, model)]
width = min(ids.shape[1] for ids in pairs)
same = (pairs[0][:, :width] == pairs[1][:, :width]).all(axis=1)
print(f"{same.sum()} of 256 sampled texts are the same to the last token")

# %% [markdown]
# ## How fast
#
# A token needs every weight once. A GPU spends its time on fetching them, so a quarter of the bytes should be felt there.
# jaxgen has no figures from a GPU yet. On a CPU the picture is another one: generating unpacks the weights once per call and
# then computes with the unpacked copy, so it runs at the speed of the float model and does not save memory while it runs.
# `Int4Config(low_cpu_memory=True)` unpacks a few rows at a time at each step instead: within the memory of the packed
# weights, and slower. The ratios below belong to this small model on the processor that made this page.

# %%
thrifty = jaxgen.AutoModelForCausalLM.from_pretrained(
    MODEL, dtype="float32", quantization_config=jaxgen.Int4Config(low_cpu_memory=True)
)
contestants = {"float32": exact, "int4": model, "int4, low_cpu_memory": thrifty}
seconds = {name: [] for name in contestants}
for _ in range(6):
    for name, one in contestants.items():  # in turns, so that they meet the same neighbours
        start = time.perf_counter()
        one.generate(**cat, max_new_tokens=128)
        seconds[name].append(time.perf_counter() - start)
medians = {name: np.median(times[1:]) for name, times in seconds.items()}  # the first call compiles
for name, median in medians.items():
    print(f"{name:22} {median / medians['float32']:.1f} times the time of float32")

# %% [markdown]
# ## Files
#
# `jaxgen convert MODEL DIRECTORY` writes a checkpoint in the format of compressed-tensors, which transformers opens too. Loading it gives
# what loading with `load_in_4bit=True` gives, without quantising again. `jaxgen inspect DIRECTORY` describes a checkpoint
# from its headers alone. Here are both as functions (and without the last line, which is about the machine):

# %%
from jaxgen.convert.inspect import describe

os.chdir(tempfile.mkdtemp())
jaxgen.convert.convert_checkpoint(MODEL, "demo-int4")
print(describe("demo-int4").rpartition("\n")[0])

# %%
again = jaxgen.AutoModelForCausalLM.from_pretrained("demo-int4", dtype="float32").generate(**inputs)
print("the same tokens:", (again == model.generate(**inputs)).all())
print("ids:", again[0].tolist())

# %% [markdown]
# Most four-bit checkpoints on the hub were written by others. These are read as they are, without quantising again, each
# checked against the library that owns the format: compressed-tensors (pack-quantized), GPTQ, AWQ, AutoRound, bitsandbytes
# NF4 and FP4, MLX, and GGUF (`gguf_file="name.gguf"`). Any other format is refused by name:

# %%
try:
    jaxgen.AutoModelForCausalLM.from_pretrained(MODEL, load_in_8bit=True)
except jaxgen.JaxgenError as error:
    print(error)

# %% [markdown]
# ## In short
#
# - `load_in_4bit=True`: 3.5 times less memory for a 7B model, 4.125 bits per weight of a linear layer.
# - Measure what it costs as a divergence on your own text; smaller groups, or `gptq` once, bring it down.
# - On a CPU it saves memory only with `low_cpu_memory=True`.
