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
# # 03. Quantisation (int4)
#
# A model of 7 billion parameters takes 14.5 GB in bfloat16. With four bits per weight it takes about 4 GB, and fits on a
# small GPU with room for long texts. This notebook shows what `load_in_4bit=True` does, what it saves, what it costs in
# quality, and which files of four-bit weights there are.

# %%
try:
    import jaxgen
except ImportError:  # from the clone that this notebook is in; leaves what is installed as it is
    # %pip install -q ..
    import jaxgen

# %%
MODEL = jaxgen.demo.path()  # the real one, on a GPU: MODEL = "mistralai/Mistral-7B-Instruct-v0.3"

# %%
import tempfile
import time
from functools import partial
from itertools import islice
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from huggingface_hub.utils import disable_progress_bars
from transformers import AutoTokenizer

import jaxgen.plot
from jaxgen.demo.corpus import documents
from jaxgen.quant import quantize

disable_progress_bars()  # a large model shows one while it loads

BLUE, ORANGE, GRAY = "#0072b2", "#d55e00", "#8c8c8c"
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3})
plt.rcParams.update({"legend.frameon": False, "axes.titlelocation": "left"})

tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
exact = jaxgen.AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")

# %% [markdown]
# ## One argument
#
# The weights are quantised while they are loaded, one tensor after the other, so the large model is never in memory as a
# whole. All linear layers of the blocks become int4; embeddings, norms and the output head keep their precision.

# %%
model = jaxgen.AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32", load_in_4bit=True)

# %% [markdown]
# Does one notice? With the same seeds, both models use the same noise (notebook 02), so that two sampled texts only part
# where the distributions differ enough to tip a draw:

# %%
cat = tokenizer(["I am a cat."], return_tensors="np")
options = {"do_sample": True, "seed": range(64), "max_new_tokens": 40}
pairs = {name: one.generate(**cat, **options) for name, one in (("float32", exact), ("int4", model))}
for name, ids in pairs.items():
    print(f"{name:7}", tokenizer.decode(ids[0], skip_special_tokens=True))
    print("ids:", ids[0].tolist())

width = min(ids.shape[1] for ids in pairs.values())
same = (pairs["float32"][:, :width] == pairs["int4"][:, :width]).all(axis=1)
print(f"{same.sum()} of {len(same)} sampled texts are the same to the last token")

# %% [markdown]
# ## What it does to a weight
#
# Every 128 neighbours in a row of a weight share one scale. Each weight is then one of 16 multiples of it, from -8 to 7.
# A plain choice of the scale makes 7 of them the largest weight of the group. jaxgen searches for the scale with the least
# squared error. It may be smaller, where cutting off one extreme weight costs less than coarse steps for all the others.

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
    error = np.sqrt(
        ((values - weight).reshape(-1, 128) ** 2).mean(axis=1) / (weight.reshape(-1, 128) ** 2).mean(axis=1)
    )
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
    parts = {"lm_head": "output head", "_proj": "linear layers", "": "embeddings and norms"}
    counts[next(part for piece, part in parts.items() if piece in name)] += leaf.size

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
# And the demo, as it stands in memory now: its embeddings and its head, which stay as they are, are half of what is left.


# %%
def megabytes(model):
    return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(model))) / 1e6


print(f"float32 {megabytes(exact):.2f} MB, int4 {megabytes(model):.2f} MB (the rest of it in float32)")

# %% [markdown]
# `quantization_config=` says in detail what is to be done:

# %%
choices = {
    "groups of 32": jaxgen.Int4Config(group_size=32),
    "128, head too": jaxgen.Int4Config(lm_head=True),
}
models = {"groups of 128": model}  # load_in_4bit=True means Int4Config()
models |= {
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
text = "The capital of Portugal is Lisbon. Once upon a time there was a little cat."
jaxgen.plot.kl(exact, model, text, ax=ax)
plt.show()

# %% [markdown]
# Most places cost nothing. What it costs, it costs where the model itself is unsure: here at the turn from a fact to a
# story. An average over more text, with the standard error over texts, compares the choices.
# The texts are of the kind that the demo was trained on; for another model take text of the kind that it will see.

# %%
texts = [document.text for document in islice(documents(3), 64)]
rows = tokenizer(texts, padding=True, truncation=True, max_length=48, return_tensors="np")


@nnx.jit
def log_probabilities(model, ids, mask):
    return jax.nn.log_softmax(model(ids, mask).logits)


def predictions(model):
    return np.asarray(log_probabilities(model, rows.input_ids, rows.attention_mask))


ours = predictions(exact)


def divergence(theirs):
    """The mean KL divergence of each text, in nats per token."""
    kl = (np.exp(ours) * (ours - theirs)).sum(axis=-1) * rows.attention_mask
    return kl.sum(axis=1) / rows.attention_mask.sum(axis=1)


costs = {name: divergence(predictions(one)) for name, one in models.items()}
for name, cost in costs.items():
    error = cost.std() / np.sqrt(len(cost))
    print(f"{name:14} {1e5 * cost.mean():6.2f} ± {1e5 * error:.2f}  (1e-5 nats per token)")

# %%
figure, ax = plt.subplots(figsize=(7.5, 2.6))
for name, cost in reversed(costs.items()):
    error = cost.std() / np.sqrt(len(cost))
    ax.barh(name, 1e5 * cost.mean(), xerr=1e5 * error, color=BLUE, alpha=0.85, capsize=3)
ax.set(xlabel="KL divergence from float32 (1e-5 nats per token)")
ax.set_title("What the weights' rounding costs, with standard errors")
ax.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# The head acts on every prediction directly, and it is a small part of a large model: that is why it keeps its precision.
# There is also a better way to spend the same bits. `gptq` and `autoround` look at text while they round, so that the
# errors of neighbouring weights cancel. That takes longer, and is done once, from a terminal; the result is a checkpoint
# to load:
#
#     jaxgen convert MODEL DIRECTORY --method gptq --calibration text.txt
#
# The README compares all methods on the demo (`python benchmarks/quality.py`).
#
# ## How fast
#
# A token needs every weight once. A GPU spends its time on fetching them, so a quarter of the bytes should be felt there;
# the README has figures from one. On a CPU four bits save no time. Each call of `generate` unpacks the weights, and
# then computes with the unpacked copy at the speed of the float32 model; while it runs, it does not save memory either.
# `Int4Config(low_cpu_memory=True)` unpacks a few rows at a time instead, again for each token: it stays within the memory
# of the packed weights, and is slower.
#
# The demo is too small to show this, so here is one layer with random weights. The ratios depend on the machine and vary
# from run to run; these are from one run on 2 cores of an Intel Xeon.

# %%
wide = jaxgen.MistralConfig(
    vocab_size=640,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=1,
    num_attention_heads=12,
    num_key_value_heads=4,
)
with tempfile.TemporaryDirectory() as directory:
    jaxgen.MistralForCausalLM(wide, rngs=nnx.Rngs(0), dtype="float32").save_pretrained(directory)
    load = partial(jaxgen.AutoModelForCausalLM.from_pretrained, directory, dtype="float32")
    contestants = {
        "float32": load(),
        "int4": load(quantization_config=jaxgen.Int4Config()),
        "int4, low_cpu_memory": load(quantization_config=jaxgen.Int4Config(low_cpu_memory=True)),
    }

seconds = {name: [] for name in contestants}
for _ in range(3):
    for name, one in contestants.items():  # in turns, so that they meet the same neighbours
        start = time.perf_counter()
        one.generate(cat.input_ids, min_new_tokens=32, max_new_tokens=32)
        seconds[name].append(time.perf_counter() - start)
best = {name: min(times[1:]) for name, times in seconds.items()}  # the first call compiles
for name, least in best.items():
    ratio = least / best["float32"]
    print(f"{name:21} {megabytes(contestants[name]):5.1f} MB, {ratio:.1f} times the time of float32")

# %% [markdown]
# ## Files
#
# `jaxgen convert MODEL DIRECTORY` writes a checkpoint in the format of compressed-tensors, which transformers opens too.
# Loading it gives what loading with `load_in_4bit=True` gives, without quantising again. `jaxgen inspect DIRECTORY`
# describes a checkpoint from its headers alone. Here are both as functions (without the lines on the place and the device):

# %%
from jaxgen.convert.inspect import describe

converted = Path(tempfile.mkdtemp()) / "int4"
jaxgen.convert.convert_checkpoint(MODEL, converted)
print(*describe(converted).splitlines()[1:-1], sep="\n")

# %%
again = jaxgen.AutoModelForCausalLM.from_pretrained(converted, dtype="float32").generate(**cat, **options)
print("the same tokens:", (again == pairs["int4"]).all())
print("ids:", again[0].tolist())

# %% [markdown]
# Most four-bit checkpoints on the hub were written by others. These are read as they are, without quantising again:
#
# | format | which of it |
# |---|---|
# | compressed-tensors | pack-quantized |
# | GPTQ | v1, v2, `desc_act` |
# | AWQ | GEMM |
# | AutoRound | its GPTQ and AWQ layouts |
# | bitsandbytes | NF4, FP4 |
# | MLX | 4 bits |
# | GGUF | Q4_0, Q4_1, Q4_K and what comes with them; `gguf_file="name.gguf"` |
#
# The reader of each format is tested against weights that the format's own library dequantised. Anything else is refused
# by name:

# %%
try:
    jaxgen.AutoModelForCausalLM.from_pretrained(MODEL, load_in_8bit=True)
except jaxgen.JaxgenError as error:
    print(error)

# %% [markdown]
# ## In short
#
# - `load_in_4bit=True`: 3.5 times less memory for a 7B model, 4.125 bits per weight of a linear layer.
# - Measure what it costs as a divergence on your own text. Smaller groups help little, `gptq` or `autoround` more.
# - On a CPU it saves memory while generating only with `low_cpu_memory=True`, and no time.
