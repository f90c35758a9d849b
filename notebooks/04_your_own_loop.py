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
# # 04. Your own processor, and your own loop
#
# There are four ways to change what `generate` does between two tokens, from the outside to the inside:
#
# 1. a logits processor or a stopping criterion: a function of your own in the compiled loop;
# 2. `jaxgen.generate`, the whole of generation as a pure function, inside your own `jit` and `vmap`;
# 3. a loop written by hand from `extend`, `step` and `logits`;
# 4. the same with several prompts that decide together, which no option of `generate` can do.

# %%
try:
    import jaxgen
except ImportError:  # from the clone that this notebook is in; leaves what is installed as it is
    # %pip install -q ..
    import jaxgen

# %%
MODEL = jaxgen.demo.path()  # the real one, on a GPU: MODEL = "mistralai/Mistral-7B-Instruct-v0.3"

# %%
from functools import partial

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from flax import nnx
from transformers import AutoTokenizer

model = jaxgen.AutoModelForCausalLM.from_pretrained(MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")

BLUE, ORANGE = "#0072b2", "#d55e00"
plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})
plt.rcParams.update({"axes.grid": True, "grid.alpha": 0.3})
plt.rcParams.update({"legend.frameon": False, "axes.titlelocation": "left"})

# %% [markdown]
# ## A logits processor
#
# A processor is a function of three arrays: the `tokens` of all rows, the `lengths` of the rows, and the `logits` for their
# next tokens. A row's token *p* stands in column *p*, and its first `lengths` columns count; there is no padding to think
# about. The function is compiled into the loop, so it is written in `jax.numpy`.
#
# This one forbids the token `south`. Portugal has to lie somewhere else:

# %%
south = tokenizer(" south", add_special_tokens=False)["input_ids"][0]


def not_south(tokens, lengths, logits):
    return logits.at[:, south].set(-jnp.inf)


texts = ["A list of colors: red, blue", "Portugal is"]
inputs = tokenizer(texts, padding=True, return_tensors="np")
for processor in (None, not_south):
    ids = model.generate(**inputs, logits_processor=processor, max_new_tokens=30)
    for row in ids:
        print("ids:", row.tolist())
        print(tokenizer.decode(row, skip_special_tokens=True))

# %% [markdown]
# A processor may have a number in it. This one is for sampling at a high temperature: where the model is surer than a
# threshold, it leaves only the best token. The number goes into a `jax.tree_util.Partial`. It is then an argument of the
# compiled program, and the three calls below share one program.


# %%
def steady(threshold, tokens, lengths, logits):
    """Leave only the best token where its probability is above the threshold."""
    probabilities = jax.nn.softmax(logits)
    best = probabilities.max(axis=1, keepdims=True)
    return jnp.where((best > threshold) & (probabilities < best), -jnp.inf, logits)


cat = tokenizer(["I am a cat."], return_tensors="np")
hot = {"do_sample": True, "temperature": 1.5, "top_k": 0, "seed": 2, "max_new_tokens": 40}
for threshold in (1.0, 0.8, 0.6):
    ids = model.generate(**cat, logits_processor=jax.tree_util.Partial(steady, threshold), **hot)
    print("ids:", ids[0].tolist())
    print(f"threshold {threshold}:", tokenizer.decode(ids[0], skip_special_tokens=True))

# %% [markdown]
# With the threshold 1.0 the processor does nothing, and the text falls apart: at temperature 1.5 even a token that should
# be certain goes wrong now and then. With 0.8, the sentences of this text are whole, and *which* sentence comes next is
# still open. With 0.6 nothing is open: the model is always that sure of its favourite sentence. A processor of yours runs
# before temperature and the filters, in the place where transformers runs it, so the probabilities above are the model's own.
#
# ## A stopping criterion
#
# A criterion sees the same arrays, after the new token was written down, and says which rows end. Here: after three
# sentences.

# %%
full_stop = tokenizer.convert_tokens_to_ids(".")


def three_sentences(tokens, lengths, scores):
    written = jnp.arange(tokens.shape[1]) < lengths[:, None]
    return ((tokens == full_stop) & written).sum(axis=1) >= 3


out = model.generate(
    **cat,
    do_sample=True,
    temperature=1.5,
    seed=range(4),
    max_new_tokens=50,
    stopping_criteria=three_sentences,
    return_dict_in_generate=True,
)
for text, reason in zip(
    tokenizer.batch_decode(out.sequences, skip_special_tokens=True), out.finish_reason, strict=True
):
    print(f"{reason}: {text}")

# %% [markdown]
# ## Generation as a function
#
# `jaxgen.generate(model, ids, mask, key, config)` is the same generation with arrays in and arrays out. It can stand inside
# your own `jit`, under `vmap`, or as a part of a larger computation. The model is an argument of the compiled function: if
# it were a global variable, its weights would be constants of the program.
#
# Anything that is an array can be mapped over. A processor may use a traced number, so a whole plane of experiments, 8
# temperatures times 16 keys, is one program and one call. Each text comes with the log-probability that the model gives it.

# %%
config = jaxgen.GenerationConfig(max_new_tokens=24, do_sample=True, top_k=0, return_dict_in_generate=True)


@nnx.jit
def plane(model, ids, keys, temperatures):
    """A text for every temperature and key [T, K], its log-probability and its length."""

    def one(key, temperature):
        def warm(tokens, lengths, logits):
            return logits / temperature

        out = jaxgen.generate(model, ids, None, key, config, logits_processor=warm)
        return out["sequences"][0], out["model_logprobs"].sum(), out["lengths"][0]

    over_keys = jax.vmap(one, in_axes=(0, None))
    return jax.vmap(over_keys, in_axes=(None, 0))(keys, temperatures)


temperatures = np.linspace(0.25, 2.0, 8)
keys = jax.vmap(jax.random.key)(jnp.arange(16))
sequences, logprobs, counts = map(np.asarray, plane(model, cat.input_ids, keys, temperatures))

at_one = sequences[temperatures == 1.0][0]
print("ids:", at_one[:2].tolist())
for ids, logprob in zip(at_one[:4], logprobs[temperatures == 1.0][0], strict=False):
    print(f"{logprob:7.2f}  {tokenizer.decode(ids, skip_special_tokens=True)}")

# %% [markdown]
# The key of seed *s* is `jax.random.key(s)`. So these, at temperature 1, are the texts that
# `model.generate(**cat, do_sample=True, top_k=0, seed=range(4), max_new_tokens=24)` gives. The model's own log-probability
# per token, over the whole plane:

# %%
table = logprobs / counts
figure, ax = plt.subplots(figsize=(7, 3.6))
for key in range(len(keys)):
    ax.plot(temperatures, table[:, key], color=BLUE, alpha=0.15, linewidth=1)
ax.plot(temperatures, table.mean(axis=1), color=ORANGE, linewidth=2.5, label="mean of 16 keys")
ax.set(xlabel="temperature", ylabel="log-probability per token (nats)")
ax.set_title("What the model thinks of its own text; a thin line is one key")
ax.legend()
plt.show()

# %% [markdown]
# ## A loop by hand
#
# All that generation needs of a model are a few pure functions:
#
# | function | what it does |
# |---|---|
# | `model.empty_cache(rows, slots)` | room for the keys and values of `slots` tokens per row |
# | `model.extend(tokens, starts, counts, cache)` | read several tokens per row; gives hidden states and the cache |
# | `model.logits(hidden)` | what the head makes of hidden states |
# | `model.step(tokens, positions, cache)` | read one token per row; gives logits and the cache |
#
# A cache is a value: it goes in, and another one comes out. With these, greedy search is a dozen lines.


# %%
def read(model, prompts, lengths, new):
    """The logits after each right-padded prompt, and a cache with room for `new` more tokens."""
    slots = model.config.cache_slots(prompts.shape[1] + new, ahead=prompts.shape[1])
    cache = model.empty_cache(len(prompts), slots)
    hidden, cache = model.extend(prompts, jnp.zeros_like(lengths), lengths, cache)
    last = jnp.take_along_axis(hidden, (lengths - 1)[:, None, None], axis=1)
    return model.logits(last)[:, 0], cache


@partial(nnx.jit, static_argnames="new")
def greedy(model, prompts, lengths, new):
    """The `new` most likely tokens, one after the other, of each row."""

    def step(carry, _):
        logits, lengths, cache = carry
        token = logits.argmax(axis=1)
        logits, cache = model.step(token, lengths, cache)
        return (logits, lengths + 1, cache), token

    logits, cache = read(model, prompts, lengths, new)
    _, tokens = jax.lax.scan(step, (logits, lengths, cache), length=new)
    return tokens.T


def packed(rows):
    """Lists of ids as one right-padded array, and their lengths."""
    width = max(map(len, rows))
    padded = [row + [0] * (width - len(row)) for row in rows]
    return jnp.array(padded), jnp.array([len(row) for row in rows])


prompts, lengths = packed(tokenizer(texts)["input_ids"])
mine = np.asarray(greedy(model, prompts, lengths, new=20))
print("ids:", mine.tolist())

# %% [markdown]
# `lengths` is all the bookkeeping there is: the position of the next token, and at the same time the slot of the cache where
# it goes. To take a token back, make a row shorter: what lies behind its length is not looked at, and will be overwritten.
# (`cache_slots(..., ahead=)` matters for models with a sliding window, such as the demo. Their cache is a ring, which needs
# room for what is read at a time.)
#
# Is it the same as `generate`?

# %%
theirs = model.generate(**inputs, max_new_tokens=20)[:, inputs.input_ids.shape[1] :]
assert (mine == theirs).all()
print("the same tokens:", (mine == theirs).all())

# %% [markdown]
# For sampling, put a draw where the argmax was. `jaxgen.generation.choosing.sample` has the two functions for it: `row_keys` gives
# each row its key, and `draw` draws a token with that key at its position.

# %%
from jaxgen.generation.choosing.sample import draw, row_id_words, row_keys


@partial(nnx.jit, static_argnames="new")
def sampled(model, prompts, lengths, key, new):
    """`new` sampled tokens of each row."""
    keys = row_keys(key, jnp.asarray(row_id_words(None, len(prompts))), samples=1)

    def step(carry, _):
        logits, lengths, cache = carry
        token = draw(logits, keys, lengths)
        logits, cache = model.step(token, lengths, cache)
        return (logits, lengths + 1, cache), token

    logits, cache = read(model, prompts, lengths, new)
    _, tokens = jax.lax.scan(step, (logits, lengths, cache), length=new)
    return tokens.T


prompts, lengths = packed(tokenizer(["I am a cat."])["input_ids"])
for seed in range(2):
    mine = np.asarray(sampled(model, prompts, lengths, jax.random.key(seed), new=24))[0]
    print("ids:", mine.tolist())
    print(tokenizer.decode(mine))
    theirs = at_one[seed, prompts.shape[1] :][
        : counts[temperatures == 1.0][0, seed]
    ]  # only generate knows where to stop
    assert (mine[: len(theirs)] == theirs).all()

# %% [markdown]
# The assertion compares with the texts that `jaxgen.generate` drew with these keys.
#
# ## Two prompts, one answer
#
# Now something that `generate` has no option for. Two rows hold the same question under two instructions: answer like a
# thug, answer like a pirate. At each step the log-probabilities of the two are added with weights `1 - w` and `w` (a
# product of experts), one token is chosen from the sum, and *both* rows read it. In the loop above, only the choice of the
# token changes.

# %%
QUESTION = "How many helicopters can a human eat in one sitting?"


def chat(style):
    system = f"You are a friendly chatbot who always responds in the style of a {style}"
    messages = [{"role": "system", "content": system}, {"role": "user", "content": QUESTION}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)["input_ids"]


prompts, lengths = packed([chat("thug"), chat("pirate")])


@partial(nnx.jit, static_argnames="new")
def mixed(model, logits, lengths, cache, weights, keys, temperature, new):
    """An answer of both prompts for every weight of the second one and every key [W, K, new]."""

    def one(weight, key):
        def step(carry, _):
            logits, lengths, cache = carry
            scores = jnp.stack([1 - weight, weight]) @ jax.nn.log_softmax(logits)
            noise = jax.random.gumbel(jax.random.fold_in(key, lengths[0]), scores.shape)
            token = (scores + temperature * noise).argmax()
            logits, cache = model.step(jnp.stack([token, token]), lengths, cache)
            return (logits, lengths + 1, cache), token

        return jax.lax.scan(step, (logits, lengths, cache), length=new)[1]

    over_keys = jax.vmap(one, in_axes=(None, 0))
    return jax.vmap(over_keys, in_axes=(0, None))(weights, keys)


def answer(tokens):
    tokens = tokens.tolist()
    end = tokenizer.eos_token_id
    return tokenizer.decode(tokens[: tokens.index(end)] if end in tokens else tokens)


logits, cache = nnx.jit(read, static_argnames="new")(model, prompts, lengths, new=36)  # once, for all that follows
weights = np.linspace(0, 1, 6)
found = np.asarray(mixed(model, logits, lengths, cache, weights, jax.random.key(0)[None], 0.0, new=36))
print("ids:", found[0, 0].tolist())
for weight, tokens in zip(weights, found[:, 0], strict=True):
    print(f"w = {weight:.1f}: {answer(tokens)}")

# %% [markdown]
# No weight gives a mixture of the styles: the answer is one or the other. The first word decides, because from then on
# both rows read an answer in that style, and agree. So where does the first word tip? When sampling it need not tip at
# once; 64 keys for each of 11 weights say how it does, again in one call:

# %%
weights = np.linspace(0, 1, 11)
keys = jax.random.split(jax.random.key(1), 64)
found = np.asarray(mixed(model, logits, lengths, cache, weights, keys, 1.0, new=3))
pirate = np.array([["Arr" in tokenizer.decode(tokens) for tokens in line] for line in found])

figure, ax = plt.subplots(figsize=(7, 3.4))
middle = (pirate.sum(axis=1) + 2) / (len(keys) + 4)  # Agresti and Coull's interval: two more of each
error = 2 * np.sqrt(middle * (1 - middle) / (len(keys) + 4))
ax.fill_between(
    weights, np.clip(middle - error, 0, 1), np.clip(middle + error, 0, 1), color=BLUE, alpha=0.2, linewidth=0
)
ax.plot(weights, pirate.mean(axis=1), "o-", color=BLUE)
ax.set(xlabel="weight of the pirate's prompt", ylabel="answers that say Arr", ylim=(-0.03, 1.03))
ax.set_title("Where the answer tips: 64 keys per weight, 95% intervals")
plt.show()

# %% [markdown]
# ## In short
#
# - A processor or a criterion is a plain `jax.numpy` function; its numbers go into `jax.tree_util.Partial`.
# - `jaxgen.generate` is pure: `jit` it with the model as an argument, and `vmap` it over keys or anything else.
# - A loop by hand needs `extend`, `step` and `logits`. With the same choice of tokens it gives what `generate` gives.
