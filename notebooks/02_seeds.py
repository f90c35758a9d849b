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
# # 02. Seeds and common random numbers
#
# Whoever publishes a sampled text publishes a seed with it. In most libraries a seed starts one stream of random numbers,
# from which every row of every batch takes its share: put the prompts in another order, and every text changes.
#
# In jaxgen a row's tokens depend on its prompt, its seed, its id and the parameters: not on its neighbours, the padding or
# the order. This notebook first shows that, and then what it is good for: experiments that run in large batches and still
# reproduce one by one, and comparisons that need fewer samples, because both sides use the same noise.

# %%
try:
    import jaxgen
except ImportError:  # from the clone that this notebook is in; leaves what is installed as it is
    # %pip install -q ..
    import jaxgen

# %%
MODEL = jaxgen.demo.path()  # the real one, on a GPU: MODEL = "mistralai/Mistral-7B-Instruct-v0.3"

# %%
import json
import tempfile
from pathlib import Path

import jax
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from transformers import AutoTokenizer

model = jaxgen.AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")

BLUE, ORANGE = "#0072b2", "#d55e00"
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3})
plt.rcParams.update({"axes.titlelocation": "left"})

# %% [markdown]
# ## A seed means something
#
# Three prompts in one batch, sampled with `seed=7`. A row is known by its id: its index in the call, unless `row_ids` names
# it. Names are useful as soon as the order may change: use the key of your dataset.

# %%
prompts = {
    "cat": "I am a cat.",
    "numbers": "A sequence of numbers: 41, 42,",
    "dog": "A dog has",
    "colors": "A list of colors: red,",
}
hot = {"do_sample": True, "temperature": 1.3}  # and top_k=50, the default


def sample(names, padding_side="left"):
    """The new tokens of these rows, generated in one batch."""
    tokenizer.padding_side = padding_side
    inputs = tokenizer([prompts[name] for name in names], padding=True, return_tensors="np")
    ids = model.generate(**inputs, row_ids=names, seed=7, max_new_tokens=24, **hot)
    return dict(zip(names, ids[:, inputs.input_ids.shape[1] :], strict=True))


together = sample(["cat", "numbers", "dog"])
for name, new in together.items():
    print(f"{prompts[name]}{tokenizer.decode(new, skip_special_tokens=True)}")
print("ids:", together["cat"].tolist())

# %% [markdown]
# Now the same rows in another order, with other neighbours, with padding on the other side, and alone.


# %%
def compare(title, other):
    """Whether the rows that two calls share got the same tokens, up to where the shorter one ends."""
    for name in [name for name in other if name in together]:
        width = min(len(other[name]), len(together[name]))
        same = (other[name][:width] == together[name][:width]).all()
        print(f"{title:17} {name:8}", "same" if same else "DIFFERENT")


compare("other order", sample(["dog", "cat", "numbers"]))
compare("other neighbours", sample(["numbers", "colors", "cat"]))
compare("right padding", sample(["cat", "numbers", "dog"], padding_side="right"))
compare("alone", sample(["cat"]))

# %% [markdown]
# How? The key of a draw is folded together from the seed, the row's id and the position in the text, and the token is the
# best sum of logit and Gumbel noise, which is an exact sample from the softmax. A filter such as `top_k` only forbids
# tokens. So a token can be drawn again with nothing but `jax.random`:

# %%
inputs = tokenizer(["I am a cat."], return_tensors="np")
first = model.generate(**inputs, seed=7, max_new_tokens=1, **hot)[0, -1]

position = inputs.input_ids.shape[1]  # tokens before the one that is drawn
key = jax.random.key(7)
for word in (0x6A617867, 0, 0, 0):  # jaxgen's domain; the row's id, in two words; the sample's index
    key = jax.random.fold_in(key, word)
noise = jax.random.gumbel(jax.random.fold_in(key, position), (model.config.vocab_size,))
logits = np.asarray(nnx.jit(lambda model, ids: model(ids).logits)(model, inputs.input_ids))[0, -1]
logits = np.where(logits < np.sort(logits)[-50], -np.inf, logits)  # top_k=50
again = (logits / 1.3 + np.asarray(noise)).argmax()
print("ids:", [int(first), int(again)])

# %% [markdown]
# ## One prompt, a thousand seeds
#
# A list of seeds gives every row its own. One prompt is then repeated as often as there are seeds, and a thousand texts
# come out of a few large batches. Row *i* is what `seed=seeds[i]` gives alone. The temperature is so high that the demo
# sometimes loses count. (Every batch has 128 rows, and options that are numbers are arguments of the compiled program, so
# all batches from here on share one.)

# %%
PROMPT = "1, 2, 3,"
inputs = tokenizer([PROMPT], return_tensors="np")


def texts_of(seeds, batch=128, **options):
    """One text for each seed."""
    texts = []
    options = {"do_sample": True, "temperature": 1.6, "max_new_tokens": 18} | options
    for start in range(0, len(seeds), batch):
        ids = model.generate(**inputs, seed=list(seeds[start : start + batch]), **options)
        texts += tokenizer.batch_decode(ids, skip_special_tokens=True)
    return texts


thousand = texts_of(range(1000))
lost = [seed for seed, text in enumerate(thousand) if not text.endswith("8, 9,")]
print(f"{len(lost)} of {len(thousand)} lose count")
for seed in lost[:5]:
    print(f"seed {seed}: {thousand[seed]!r}")
alone = model.generate(**inputs, do_sample=True, seed=lost[0], temperature=1.6, max_new_tokens=18)
print(f"seed {lost[0]}, alone: {tokenizer.decode(alone[0], skip_special_tokens=True)!r}")
print("ids:", alone[0].tolist())

# %% [markdown]
# ## An experiment with error bars
#
# How hot may one sample before the model forgets how to count? The property is whether the text goes on to 9 without a
# mistake. For each temperature: 128 seeds (one batch), and the share of texts that are right. A share of 128 has an error;
# Wilson's interval says which probabilities are compatible with it (95%).

# %%
TEMPERATURES = [1.0, 1.3, 1.6, 1.9, 2.2, 2.5]
SEEDS = range(128)


def is_right(texts):
    """Whether each text counts to 9."""
    return np.array([text.startswith("1, 2, 3, 4, 5, 6, 7, 8, 9,") for text in texts])


def wilson(successes, trials, z=1.96):
    """The 95% interval of a probability. Source: Wilson 1927."""
    share = successes / trials
    middle = (share + z**2 / (2 * trials)) / (1 + z**2 / trials)
    half = z / (1 + z**2 / trials) * np.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return np.minimum(middle - half, share), np.maximum(middle + half, share)  # at 0 and 1 but for rounding


heated = {t: thousand[:128] if t == 1.6 else texts_of(SEEDS, temperature=t) for t in TEMPERATURES}
right = np.array([is_right(texts) for texts in heated.values()])

# %%
figure, ax = plt.subplots(figsize=(7, 4))
share = right.mean(axis=1)
low, high = wilson(right.sum(axis=1), right.shape[1])
ax.errorbar(TEMPERATURES, share, [share - low, high - share], color=BLUE, marker="o", capsize=3)
ax.set(xlabel="temperature", ylabel="share of texts that count to 9", ylim=(-0.03, 1.03))
ax.set_title("Counting under heat: 128 seeds per point, 95% intervals")
plt.show()

# %% [markdown]
# All points used the same 128 seeds, and so the same noise. That is why the curve is smooth: a seed that fails at one
# temperature mostly fails at the next. A bar says how well the height of the curve is known there. The *differences* between
# points are known better than two bars side by side suggest; the next section says how much better.
#
# ## The same noise on both sides
#
# transformers keeps the 50 likeliest tokens unless it is told otherwise (`top_k=50`). Would 20 be better for counting, at
# temperature 1.6? The plain way: sample with one and with the other, with fresh random numbers for each. The better way:
# the same seeds for both. (The texts with 50 are there: the first of the thousand.) In jaxgen a filter only masks the noise, so the two texts of a seed stay the same until one filter
# forbids what the other allows. What both have in common, luck included, cancels.

# %%
SEEDS = range(512)
of_50 = is_right(thousand[:512])
of_20 = is_right(texts_of(SEEDS, top_k=20))

print("             20 right   20 wrong")
print(f"50 right     {(of_50 & of_20).sum():8d}   {(of_50 & ~of_20).sum():8d}")
print(f"50 wrong     {(~of_50 & of_20).sum():8d}   {(~of_50 & ~of_20).sum():8d}")

# %% [markdown]
# The table counts seeds. Most of them lie on its diagonal: both right, or both wrong. With the same seeds these add nothing
# to the error of the difference; with independent runs they would add most of it. Here is the difference with its 95%
# interval, both ways, by bootstrap: draw seeds again, with replacement, and look how the difference varies. Paired, a seed
# brings both of its results; independent, each side draws for itself.

# %%
generator = np.random.default_rng(0)
draws = generator.integers(0, len(SEEDS), (2, 4000, len(SEEDS)))
gain = of_20.mean() - of_50.mean()
paired = of_20[draws[0]].mean(1) - of_50[draws[0]].mean(1)
independent = of_20[draws[0]].mean(1) - of_50[draws[1]].mean(1)

print(f"right with 50: {of_50.mean():.3f}; with 20: {of_20.mean():.3f}; gain {gain:.3f}")
for name, boot in (("same seeds", paired), ("independent", independent)):
    low, high = np.percentile(boot, [2.5, 97.5])
    print(f"{name:12} 95% interval of the gain {low:+.3f} to {high:+.3f}, standard error {boot.std():.4f}")
factor = (independent.std() / paired.std()) ** 2
print(f"independent runs need {factor:.1f} times as many samples for the same error")

# %% [markdown]
# With the same seeds, 20 is better than 50 beyond doubt. Independent runs of this size could not tell: their interval
# contains zero.
#
# The same without bootstrap: cut the 512 seeds into 16 small experiments of 32 and let each measure the gain, once with
# the same seeds on both sides, once with another experiment's seeds on one side.

# %%
blocks_50, blocks_20 = of_50.reshape(16, 32).mean(1), of_20.reshape(16, 32).mean(1)
same, other = blocks_20 - blocks_50, blocks_20 - np.roll(blocks_50, 1)
for name, values in (("same seeds ", same), ("other seeds", other)):
    print(f"{name}: standard deviation {values.std(ddof=1):.3f}; {(values < 0).sum()} of 16 point the wrong way")

figure, ax = plt.subplots(figsize=(7, 2.6))
jitter = np.linspace(-0.18, 0.18, 16)
for height, (values, color) in enumerate([(other, ORANGE), (same, BLUE)]):
    ax.scatter(values, height + jitter, color=color, alpha=0.8, edgecolor="white", linewidth=0.5, s=45)
ax.axvline(gain, color="gray", linewidth=1.2, linestyle=":")
ax.axvline(0, color="gray", linewidth=0.8)
ax.set(yticks=[0, 1], yticklabels=["other seeds", "same seeds"], ylim=(-0.5, 1.5))
ax.set_xlabel("share right with top_k=20 minus share right with top_k=50")
ax.set_title("16 experiments of 32 seeds each; dotted: all 512")
ax.grid(axis="y", visible=False)
plt.show()

# %% [markdown]
# The same holds for every option that changes the distribution and not the noise: `temperature`, `top_k`, `min_p`,
# penalties, a processor of your own, int4 weights against bfloat16 ones, a model before and after training. The closer the
# two sides, the more there is to gain. There is nothing to gain where one side has no luck at all, such as a setting that
# is always right.
#
# ## What to publish
#
# A seed is not all of it: the tokens also depend on the weights, the options and the versions of the libraries. `out.record`
# holds all that determines the tokens, and the tokens themselves, as JSON. It names no machine, no path and no user.

# %%
names = ["cat", "numbers", "dog"]
inputs = tokenizer([prompts[name] for name in names], padding=True, return_tensors="np")
out = model.generate(**inputs, row_ids=names, seed=7, max_new_tokens=24, return_dict_in_generate=True, **hot)
out

# %%
record = out.record
path = Path(tempfile.mkdtemp()) / "cat.json"
record.save(path)
print("sections:", ", ".join(json.loads(path.read_text())))

# %% [markdown]
# Whoever has the file can run it again, here or from a terminal (`jaxgen replay cat.json`):

# %%
print(jaxgen.replay(jaxgen.Record.load(path)))

# %% [markdown]
# If something differs, `replay` says what: the log-probabilities in their last digits (another machine or another version of
# XLA), or the first token that differs, in which row, with both candidates' probabilities.
#
# ## In short
#
# - Pass a `seed`, and name rows with `row_ids` where the order may change; the batch then does not matter.
# - A list of seeds runs an experiment in large batches; each text can be had again alone.
# - Compare two settings on the same seeds, and put error bars on differences with the paired bootstrap.
# - Keep `out.record` beside the figure.
