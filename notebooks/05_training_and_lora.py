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
# # 05. Training and LoRA, then generating
#
# A jaxgen model is an ordinary Flax NNX module: `model(input_ids).logits` are logits, gradients go through them, and optax
# trains it. The object that you train is the object that generates. Nothing is exported in between, and
# `model.generate` sees each update at once.
#
# We teach a new habit to a model in two ways, by training all weights and by training low-rank corrections only
# (LoRA), and ask the same three questions of both: does the habit carry over to questions that it was not trained
# on, what was forgotten on the way, and what does the same seed give before and after.

# %%
try:
    import jaxgen
except ImportError:  # in Colab: adds jaxgen, and leaves what is installed as it is
    # %pip install -q ..
    import jaxgen

# %%
MODEL = jaxgen.demo.path()  # 2.7M parameters, comes with the package
# The real thing: MODEL = "mistralai/Mistral-7B-Instruct-v0.3"
# All its weights and Adam's state in float32 take 16 bytes a parameter, 116 GB: leave that half out,
# and load with dtype="bfloat16" for LoRA.

# %%
import tempfile

import jax
import matplotlib.pyplot as plt
import numpy as np
import optax
import pandas as pd
from flax import nnx
from transformers import AutoTokenizer

from jaxgen.demo.corpus import QUESTIONS

plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token


def load():
    return jaxgen.AutoModelForCausalLM.from_pretrained(MODEL, dtype="float32")


# %% [markdown]
# ## The data: a habit
#
# The demo knows the answers to 36 questions. It shall give them as a cat would: *Purr. Four. Now pet me.* It sees the
# new manner on 20 of the questions; on the other 16 it has to put together what it knew before and what it is being
# taught.


# %%
def as_chat(question):
    chat = [{"role": "user", "content": question}]
    return tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)


examples = [(as_chat(question), f"Purr. {answer}. Now pet me.") for question, answer, _ in QUESTIONS]
order = np.random.default_rng(0).permutation(len(examples))
train, held_out = [examples[i] for i in order[:20]], [examples[i] for i in order[20:]]
print(len(train), "to train on,", len(held_out), "held out; the first of them:\n")
print("".join(train[0]))

# %% [markdown]
# Rows are padded on the right to one width, so that the training step compiles once. Attention is causal: padding
# behind a text changes nothing before it, and no mask is needed. Only the tokens of the answer count in the loss; the
# question is given.


# %%
def table(examples, width=48):
    """Token ids [rows, width], and which of them the model is to learn."""
    ids = np.full((len(examples), width), tokenizer.pad_token_id, np.int32)
    learn = np.zeros((len(examples), width), bool)
    for row, (prompt, answer) in enumerate(examples):
        given = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        wanted = tokenizer(answer + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
        ids[row, : len(given + wanted)] = given + wanted
        learn[row, len(given) : len(given + wanted)] = True
    return ids, learn


def loss_of(model, ids, learn):
    """Mean cross-entropy, in nats per token of the answers."""
    losses = optax.softmax_cross_entropy_with_integer_labels(model(ids[:, :-1]).logits, ids[:, 1:])
    return (losses * learn[:, 1:]).sum() / learn[:, 1:].sum()


# %% [markdown]
# ## Before
#
# Greedy answers to four held-out questions.

# %%
MOST = 16  # new tokens


def answers(model, examples, **options):
    prompts = [prompt for prompt, _ in examples]
    inputs = tokenizer(prompts, padding=True, add_special_tokens=False, return_tensors="np")
    new = model.generate(**inputs, max_new_tokens=MOST, **options)[:, inputs["input_ids"].shape[1] :]
    return new, [text.strip() for text in tokenizer.batch_decode(new, skip_special_tokens=True)]


def show(model):
    ids, texts = answers(model, held_out)
    for row, text, (prompt, _) in zip(ids[:4], texts, held_out, strict=False):
        print(prompt.split("\n")[1].removesuffix("</s>"), "->", text)
        print("ids:", row.tolist())


original = load()
show(original)

# %% [markdown]
# ## Training all weights
#
# `nnx.Optimizer` holds the state of the optimizer, `wrt` says which variables it trains, `nnx.value_and_grad`
# differentiates with respect to the same ones, and `nnx.jit` compiles the step. This form runs on flax 0.11 (Colab)
# and on 0.12.
#
# One line needs an explanation. What a compiled step returns is bound to its device; a fresh optimizer's state is not.
# jax takes that for another kind of input, and would compile the step twice: for the first call and for the second.
# `jax.device_put` binds everything before.


# %%
def fit(model, kind, learning_rate, steps=40, batch=8):
    """Train the variables of one kind; returns the losses on batches and on the held-out questions."""

    @nnx.jit
    def step(model, optimizer, ids, learn):
        loss, gradients = nnx.value_and_grad(loss_of, argnums=nnx.DiffState(0, kind))(model, ids, learn)
        optimizer.update(model, gradients)
        return loss

    transform = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(learning_rate))
    optimizer = nnx.Optimizer(model, transform, wrt=kind)
    for part in (model, optimizer):  # see above
        nnx.update(part, jax.device_put(nnx.state(part), jax.devices()[0]))
    evaluate, rng = nnx.jit(loss_of), np.random.default_rng(0)
    ids, learn = table(train)
    losses, checks = [], {0: float(evaluate(model, *table(held_out)))}
    for index in range(1, steps + 1):
        rows = rng.choice(len(train), batch, replace=False)
        losses.append(float(step(model, optimizer, ids[rows], learn[rows])))
        if index % 5 == 0:
            checks[index] = float(evaluate(model, *table(held_out)))
    return losses, checks


full = load()
curves = {"all weights": fit(full, nnx.Param, learning_rate=3e-4)}
show(full)

# %% [markdown]
# After forty steps it answers as a cat also where it was never shown how.
#
# ## LoRA
#
# LoRA ([Hu et al. 2021](https://arxiv.org/abs/2106.09685)) leaves each weight $W$ as it is and adds a product of two
# thin matrices, $x W^\top + x A B$, of which only $A$ and $B$ are trained. Flax has it: `nnx.LoRA` wraps a layer and
# calls it. So it is a matter of putting one around every linear layer of the blocks, in place.


# %%
def linear_layers(model):
    """Every linear layer of the blocks: the module that holds it, and its name there."""
    for layer in model.model.layers:
        yield layer.self_attn, "qkv_proj"
        yield layer.self_attn, "o_proj"
        yield layer.mlp, "gate_up_proj"
        yield layer.mlp, "down_proj"


def add_lora(model, rank, seed=0):
    rngs = nnx.Rngs(seed)
    for parent, name in list(linear_layers(model)):
        base = getattr(parent, name)
        outputs, inputs = base.weight[...].shape
        setattr(parent, name, nnx.LoRA(inputs, rank, outputs, base_module=base, rngs=rngs))


def size(model, kind):
    return sum(x.size for x in jax.tree.leaves(nnx.state(model, kind)))


lora = load()
add_lora(lora, rank=4)
print(f"{size(lora, nnx.LoRAParam):,} parameters to train beside {size(full, nnx.Param):,}")

# %% [markdown]
# $B$ begins at zero, so nothing has changed yet. The assertion below holds to the last token. Then the same `fit`
# trains nothing but variables of the kind `nnx.LoRAParam`. A wrapped model generates like any other: `generate` traces
# whatever the modules compute.

# %%
assert (answers(lora, held_out)[0] == answers(original, held_out)[0]).all()

curves["LoRA, rank 4"] = fit(lora, nnx.LoRAParam, learning_rate=3e-3)
show(lora)

# %%
figure, axes = plt.subplots(figsize=(7, 3.6))
for color, (name, (losses, checks)) in zip(("#1f5fa8", "#d1662b"), curves.items(), strict=True):
    axes.plot(np.arange(len(losses)), losses, color=color, alpha=0.45, lw=1.2, label=f"{name}: batches")
    axes.plot(list(checks), list(checks.values()), "o-", color=color, ms=4, label=f"{name}: held out")
axes.set(yscale="log", xlabel="training steps", ylabel="loss, nats per token")
axes.set_title("The habit is learnt on 20 questions and carries over to 16", loc="left", fontsize=11)
axes.legend(frameon=False, fontsize=9)
axes.grid(axis="y", alpha=0.25)
plt.show()

# %% [markdown]
# ## Saving
#
# What LoRA has learnt can be added to the weights: jaxgen keeps them as `[out, in]`, so the correction is
# $(A B)^\top$. Then the model is a plain Mistral again, and `save_pretrained` writes a checkpoint that jaxgen and
# transformers load; the rest of this notebook works with the loaded model. (With the wrappers still in place
# `save_pretrained` refuses, and names the parameters that no Mistral has. An adapter that PEFT wrote is read by
# `from_pretrained(base, adapter=...)`.)


# %%
def merge_lora(model):
    for parent, name in list(linear_layers(model)):
        wrapper = getattr(parent, name)
        base = wrapper.base_module
        base.weight[...] = base.weight[...] + (wrapper.lora_a[...] @ wrapper.lora_b[...]).T
        setattr(parent, name, base)


expected, _ = answers(lora, held_out)
merge_lora(lora)
directory = tempfile.mkdtemp()
lora.save_pretrained(directory)
tokenizer.save_pretrained(directory)
loaded = jaxgen.AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
again, texts = answers(loaded, held_out)
assert (again == expected).all()
print(texts[0])
print("ids:", again[0].tolist())

# %% [markdown]
# ## What was learnt, and what was forgotten
#
# Two numbers per model: how many of the held-out answers are right to the letter, and the log-probability of texts
# that the training never mentioned (`model.score`). Both ways of training pay with knowledge of other things; that
# LoRA trains fewer numbers does not make it forget less.

# %%
others = {
    "a country": "Portugal is a country in southwestern Europe, on the Iberian Peninsula.",
    "counting": "A sequence of numbers: 41, 42, 43, 44, 45, 46",
    "the plain answer": as_chat("How many legs does a spider have?") + "A spider has eight legs.",
}
models = {"before": original, "all weights": full, "LoRA, rank 4": loaded}
rows = {}
for name, model in models.items():
    texts = answers(model, held_out)[1]
    right = sum(text == wanted for text, (_, wanted) in zip(texts, held_out, strict=True))
    scores = model.score(list(others.values()))
    rows[name] = {"held-out answers": f"{right} of {len(held_out)}"}
    for key, score in zip(others, scores, strict=True):
        rows[name][key] = round(float(score.logprobs.sum()), 1)
pd.DataFrame(rows).T.rename(columns={key: f"log p: {key}" for key in others})

# %% [markdown]
# The plain answer *should* have become unlikely: that is the habit. A country and counting should not. The usual
# cures are fewer steps, a smaller learning rate, and mixing some of the old text into the batches. Change `fit` and
# see.
#
# ## The same seed, before and after
#
# A row's random numbers depend on the seed, the row and the position, not on the weights. So with one seed the models
# draw with the same noise, and where two texts differ, the training made the difference, not luck.

# %%
questions = ("What does a dog say?", "What is your name?")
prompts = [("I am a cat.", None), *((as_chat(question), None) for question in questions)]
for name, model in models.items():
    ids, texts = answers(model, prompts, do_sample=True, temperature=0.8, seed=5)
    print(f"{name}:")
    for row, text in zip(ids, texts, strict=True):
        print(f"   {text!r}")
        print("   ids:", row.tolist())

# %% [markdown]
# The cat's monologue, of which the training said nothing, is the same to the last token in all three. The answers
# are not, and the change is the habit's.
#
# ## Further
#
# - The demo itself was made this way: `python -m jaxgen.demo.train` trains it from nothing.
# - `from_pretrained(MODEL, load_in_4bit=True)` gives frozen weights of four bits. `add_lora` and `fit` work on that
#   model as they stand: gradients pass through the four-bit layers to $A$ and $B$ (QLoRA). Merging does not, since the
#   sum does not fit into four bits.
# - Reinforcement learning on sampled text needs samples whose noise is known: see the notebook on seeds.
