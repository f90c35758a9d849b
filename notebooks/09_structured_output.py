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
# # 09. Structured output
#
# A program that reads what a model says needs a form that it can rely on. With `constraint=` only such tokens may come
# that lead to a text of that form, so every text is valid, whatever the model and the seed.
#
# Valid is not right. A constraint takes probability away from what the model would have said, and where it takes nearly
# all of it the model is led where it has never been. `generate` tells how much that was, token by token.

# %%
try:
    import outlines_core  # noqa: F401  # reads patterns

    import jaxgen
except ImportError:  # in Colab: adds jaxgen with what constraints need, and leaves what is installed as it is
    # %pip install -q "..[constraints]"
    import jaxgen

# %%
MODEL = jaxgen.demo.path()  # 2.7M parameters, comes with the package
# The real thing: MODEL = "mistralai/Mistral-7B-Instruct-v0.3"

# %%
import re
from typing import Literal, get_args

import matplotlib.pyplot as plt
import numpy as np
from pydantic import BaseModel, Field
from transformers import AutoTokenizer

plt.rcParams.update({"figure.dpi": 110, "axes.spines.top": False, "axes.spines.right": False})

tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = jaxgen.AutoModelForCausalLM.from_pretrained(MODEL)


def ask(prompts, constraint=None, **options):
    """What comes behind each prompt, and all that `generate` tells."""
    inputs = tokenizer(prompts, padding=True, return_tensors="np")
    out = model.generate(
        **inputs, constraint=constraint, tokenizer=tokenizer, return_dict_in_generate=True, max_new_tokens=64, **options
    )
    return tokenizer.batch_decode(out.sequences[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True), out


# %% [markdown]
# ## From sentences to objects
#
# The demo knows a few animals. We want objects of this class:


# %%
class Animal(BaseModel):
    name: Literal["cat", "dog", "cow", "horse", "sheep", "duck", "penguin", "spider", "bee"]
    legs: Literal["two", "four", "six", "eight"]
    habit: str = Field(pattern="^[a-z ]{5,15}$")


# %% [markdown]
# Left alone the demo says what it likes, and a program cannot tell what it will have to read.

# %%
NAMES = get_args(Animal.model_fields["name"].annotation)
free, _ = ask([f"A {name}" for name in NAMES[:4]], do_sample=True, seed=0)
for name, text in zip(NAMES, free, strict=False):
    print(f"A {name}{text}")

# %% [markdown]
# A pattern may be a sentence, as the model has learnt it, with a group for each field. `re` takes it apart again, and
# pydantic checks the fields.

# %%
SENTENCE = r" is an animal\. It has (?P<legs>two|four|six|eight) legs and (?P<habit>[a-z ]{5,15})\."
texts, sentences = ask([f"A {name}" for name in NAMES], jaxgen.regex(SENTENCE))
animals = [
    Animal(name=name, **re.fullmatch(SENTENCE, text).groupdict()) for name, text in zip(NAMES, texts, strict=True)
]
for animal in animals:
    print(animal)
print("ids:", sentences.sequences[0].tolist())

# %% [markdown]
# ## Several seeds
#
# The same pattern with the name in it, behind no prompt at all. Each column is a seed, each row a sample. They differ,
# some are wrong, and all of them are objects of the class.

# %%
ANY = f"A (?P<name>{'|'.join(NAMES)}){SENTENCE}"
SEEDS, SAMPLES = 3, 6
columns = []
for seed in range(SEEDS):
    texts, out = ask([""], jaxgen.regex(ANY), do_sample=True, top_k=0, seed=seed, num_return_sequences=SAMPLES)
    columns.append([Animal(**re.fullmatch(ANY, text).groupdict()) for text in texts])
    print(f"seed {seed}, first sample, ids: {out.sequences[0].tolist()}")
print()
for row in [[f"seed {seed}" for seed in range(SEEDS)], *zip(*columns, strict=True)]:
    cells = [" ".join(animal.model_dump().values()) if isinstance(animal, Animal) else animal for animal in row]
    print("".join(f"{cell:34}" for cell in cells).rstrip())

# %% [markdown]
# ## The same in JSON
#
# `jaxgen.json_schema(Animal)` is the form that programs like best. The demo has never read any JSON.

# %%
texts, json = ask([f"A {name}. " for name in NAMES], jaxgen.json_schema(Animal))
for name, text in zip(NAMES, texts, strict=True):
    print(f"{name:8}", Animal.model_validate_json(text))

# %% [markdown]
# Valid, all of it, and wrong. How could we have known?
#
# ## The mass that was removed
#
# `model_logprobs` are those of the model, before the mask; `logprobs` those of the distribution that tokens were drawn
# from, after it. The mask takes away what may not come, and what is left is divided by its sum. With nothing else between
# the two that sum is `exp(model_logprobs - logprobs)`, and the rest of 1 was removed.


# %%
def masses(out, row):
    """The tokens of a row, and of each distribution the part that was left."""
    count = out.lengths[row]
    tokens = out.sequences[row, -out.logprobs.shape[1] :][:count]
    words = [repr(tokenizer.decode(token))[1:-1] for token in tokens]
    return words, np.exp((out.model_logprobs - out.logprobs)[row, :count].astype(float))


figure, axes = plt.subplots(2, 1, figsize=(9, 5))
row = NAMES.index("spider")
for axis, color, name, out in (
    (axes[0], "#2a7d4f", "a sentence", sentences),
    (axes[1], "#d1662b", "JSON", json),
):
    words, left = masses(out, row)
    axis.bar(range(len(words)), 1 - left, color=color)
    axis.set_xticks(range(len(words)), words, rotation=60, ha="right", fontsize=8)
    axis.set(ylim=(0, 1), ylabel="mass removed")
    axis.set_title(f"{name}: in all {left.prod():.1g} of the mass is left", loc="left", fontsize=11)
figure.tight_layout()
plt.show()

# %% [markdown]
# The sentence is one that the demo might have said anyway: only its beginning was decided for it. In JSON nearly every
# token was forced upon it, and what it says between them says little of animals. A larger model has read much JSON: set
# `MODEL`, and look at the mass before you trust the fields.
#
# More: [Constraints](../docs/howto/constraints.md), with grammars, batches and what a constraint costs.
