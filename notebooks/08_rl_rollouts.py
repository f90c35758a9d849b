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
# # 08. Rollouts for RL
#
# Policy gradients weigh tokens by a ratio: how likely the model finds a token now, against how likely it was when it was
# drawn. Before the first update that ratio is 1. Where a sampler and a trainer are two programs it is not, and training
# starts on noise.
#
# Here the model that trains is the one that samples, and with `strict=` its scores are those of the sampler to the last
# bit. We look at the ratios first, and then teach the demo to count in twos with GRPO
# ([Shao et al. 2024](https://arxiv.org/abs/2402.03300)) and a reward that a program checks.

# %%
try:
    import jaxgen
except ImportError:  # in Colab: adds jaxgen, and leaves what is installed as it is
    # %pip install -q ..
    import jaxgen

# %%
MODEL = jaxgen.demo.path()  # 2.7M parameters, comes with the package
# The real thing: MODEL = "mistralai/Mistral-7B-Instruct-v0.3"
# Training all its weights takes 16 bytes a parameter: more memory than one GPU has.

# %%
import functools
import re

import jax
import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from transformers import AutoTokenizer

plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def load(dtype="float32"):
    return jaxgen.AutoModelForCausalLM.from_pretrained(MODEL, dtype=dtype)


# %% [markdown]
# ## The task
#
# *11, 13* shall go on with *15, 17, 19*. The demo counts in ones (and knows a list of the first odd numbers by heart). The reward
# is the share of the next three numbers that are right, up to the first wrong one. It trains on 52 starts; eight are
# held out.

# %%
PROMPTS, SAMPLES, WIDTH, NEW = 8, 8, 8, 12  # per step; columns of a prompt, and new tokens
STARTS = np.random.default_rng(0).permutation(np.arange(1, 61))
TRAIN, HELD_OUT = STARTS[:52], STARTS[52:]


def prompts(starts):
    texts = [f"{start}, {start + 2}" for start in starts]
    return tokenizer(texts, padding="max_length", max_length=WIDTH, return_tensors="np")


def reward(text, start):
    found = [int(number[:4]) for number in re.findall(r"\d+", text)][:3]
    right = [number == start + 4 + 2 * place for place, number in enumerate(found)]
    return [*right, False].index(False) / 3


def rewards(sequences, starts):
    """One per row; the samples of a prompt lie side by side."""
    texts = tokenizer.batch_decode(sequences[:, WIDTH:], skip_special_tokens=True)
    return np.array([reward(*pair) for pair in zip(texts, np.repeat(starts, len(texts) // len(starts)), strict=True)])


config = jaxgen.GenerationConfig(
    do_sample=True, temperature=1.5, top_k=0, max_new_tokens=NEW, num_return_sequences=SAMPLES
)
strict = jaxgen.Strict(rows=PROMPTS * SAMPLES, tokens=WIDTH + NEW, chunk=WIDTH)


def rollout(model, starts, seed):
    return model.generate(
        **prompts(starts), generation_config=config, strict=strict, seed=seed, return_dict_in_generate=True
    )


out = rollout(load(), TRAIN[:PROMPTS], seed=0)
for row, (text, value) in enumerate(
    zip(
        tokenizer.batch_decode(out.sequences[:4], skip_special_tokens=True),
        rewards(out.sequences, TRAIN[:PROMPTS]),
        strict=False,
    )
):
    print(f"{value:.2f}  {text!r}")
    print("ids:", out.sequences[row].tolist())

# %% [markdown]
# ## Ratios before the first update
#
# In bfloat16, where rounding shows. The same tokens under the same weights are scored three times:
#
# - **exact**: `score_tokens(..., strict=strict)` gives the tokens one by one to the program that drew them;
# - **fast**: `score_tokens` without `strict` reads all tokens of a row at once, as a trainer does: it rounds otherwise;
# - **mismatched**: the model's own log-probabilities, without the temperature. This is no rounding but a mistake, and a common
#   one: tokens were drawn from another distribution than the one that is trained.

# %%
half = load("bfloat16")
out = rollout(half, TRAIN[:PROMPTS], seed=0)
rows = out.sequences, out.prompt_lengths, out.attention_mask
exact = jaxgen.score_tokens(half, *rows, config, strict=strict)
fast = jaxgen.score_tokens(half, *rows, config)

drawn = np.arange(out.logprobs.shape[1]) < out.lengths[:, None]
ratios = {
    "exact": np.exp(exact.logprobs - out.logprobs)[drawn],
    "fast": np.exp(fast.logprobs - out.logprobs)[drawn],
    "mismatched": np.exp(fast.model_logprobs - out.logprobs)[drawn],
}
assert (ratios["exact"] == 1).all()

# %%
figure, axes = plt.subplots(1, 3, figsize=(9, 2.8), sharey=True)
bins = np.linspace(0.795, 1.205, 42)  # one bin is centred on 1
for axis, color, (name, values) in zip(axes, ("#2a7d4f", "#1f5fa8", "#d1662b"), ratios.items(), strict=True):
    outside = np.mean((values < 0.9) | (values > 1.1))
    axis.hist(values.clip(0.8, 1.2), bins, color=color)
    axis.set_title(
        f"{name}: {np.mean(values == 1):.0%} are 1,\n{outside:.0%} outside [0.9, 1.1]", loc="left", fontsize=10
    )
    axis.set(xlabel="ratio", yscale="log")
axes[0].set_ylabel("tokens")
figure.tight_layout()
plt.show()

# %% [markdown]
# ## GRPO
#
# Each step draws eight samples for each of eight prompts. A sample's advantage is its reward against those of the same
# prompt; a batch is used twice, with clipped ratios. `jaxgen.logprobs` is pure and differentiable, and with the `config` of the rollout it gives log-probabilities of
# what was drawn from. Weights go back and forth without a copy, and nothing is compiled after the first step.

# %%
optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(3e-4))


def loss_of(params, graph, ids, mask, starts, old, advantages):
    now = jaxgen.logprobs(nnx.merge(graph, params), ids, mask, config, starts)[:, WIDTH:]
    ratios, new = jnp.exp(now - old), mask[:, WIDTH:]
    gain = jnp.minimum(ratios * advantages, jnp.clip(ratios, 0.8, 1.2) * advantages)
    return -(gain * new).sum() / new.sum()


@functools.partial(jax.jit, static_argnums=0)
def update(graph, params, state, *batch):
    gradients = jax.grad(loss_of)(params, graph, *batch)
    updates, state = optimizer.update(gradients, state, params)
    return optax.apply_updates(params, updates), state


def full(table, width):
    """As wide as rows can get: a batch in which all end early would be narrower."""
    return np.pad(table, ((0, 0), (0, width - table.shape[1])))


def train(seed, steps=32):
    model, rng = load(), np.random.default_rng(seed)
    graph, params = nnx.split(model)
    params, state = jax.device_put((params, optimizer.init(params)), jax.devices()[0])
    means, held_out = [], []
    for step in range(steps):
        nnx.update(model, params)
        if step % 8 == 0:
            held_out.append(rewards(rollout(model, HELD_OUT, seed).sequences, HELD_OUT).mean())
        starts = rng.choice(TRAIN, PROMPTS, replace=False)
        out = rollout(model, starts, seed=1000 * seed + step)
        values = rewards(out.sequences, starts).reshape(PROMPTS, SAMPLES)
        advantages = (values - values.mean(1, keepdims=True)) / (values.std(1, keepdims=True) + 1e-3)
        batch = (
            full(out.sequences, WIDTH + NEW), full(out.attention_mask, WIDTH + NEW), out.prompt_lengths,
            full(out.logprobs, NEW), advantages.reshape(-1, 1).astype(np.float32),
        )  # fmt: skip
        for _ in range(2):  # the second time the ratios are no longer 1
            params, state = update(graph, params, state, *batch)
        means.append(values.mean())
    nnx.update(model, params)
    held_out.append(rewards(rollout(model, HELD_OUT, seed).sequences, HELD_OUT).mean())
    return model, means, held_out


runs = [train(seed) for seed in range(3)]

# %% [markdown]
# ## Did it learn?
#
# The reward of what was drawn, for trained and for held-out starts: mean of three seeds, with the standard error.

# %%
sampled, held_out = (np.array([run[part] for run in runs]) for part in (1, 2))
sampled = sampled.reshape(len(runs), -1, 4).mean(2)  # four steps at a time
figure, axes = plt.subplots(figsize=(7, 3.4))
for color, name, table, places in (
    ("#1f5fa8", "trained starts", sampled, np.arange(sampled.shape[1]) * 4 + 2),
    ("#d1662b", "held-out starts", held_out, np.arange(held_out.shape[1]) * 8),
):
    errors = table.std(0, ddof=1) / np.sqrt(len(table))
    axes.errorbar(places, table.mean(0), errors, fmt="o-", color=color, ms=4, lw=1.4, capsize=3, label=name)
axes.set(xlabel="steps", ylabel="reward", ylim=(0, 1))
axes.set_title("GRPO teaches the demo to count in twos", loc="left", fontsize=11)
axes.legend(frameon=False, fontsize=9)
axes.grid(axis="y", alpha=0.25)
plt.show()
for name, table in (("trained starts", sampled), ("held-out starts", held_out)):
    print(f"{name}: {table[:, 0].mean():.2f} -> {table[:, -1].mean():.2f}")

# %%
out = rollout(runs[0][0], HELD_OUT, seed=0)
for text in tokenizer.batch_decode(out.sequences[::SAMPLES], skip_special_tokens=True):  # one sample of each
    print(text)

# %% [markdown]
# More: [Rollouts](../docs/howto/rollouts.md), and [what is promised](../docs/reproducibility.md) with the differences
# per dtype beside those of transformers.
