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
# # 01. The LLM tutorial, in JAX
#
# This notebook follows the *LLM tutorial* of transformers, cell by cell: load a model, generate, and fall into each of
# the usual traps once, on purpose. What changes against the original is short:
#
# - `AutoModelForCausalLM` comes from `jaxgen`, and the model is a Flax NNX module;
# - the tokenizer returns numpy arrays (`return_tensors="np"`), and there is no `.to("cuda")`;
# - randomness is an argument: `seed=`, not a global state.

# %%
try:
    import jaxgen
except ImportError:  # from the clone that this notebook is in; leaves what is installed as it is
    # %pip install -q ..
    import jaxgen

# %% [markdown]
# The model below is a demo that comes with jaxgen: 2.7 million parameters, trained on lists, small facts, a cat and a few
# chats. It knows the prompts of this tutorial and little else, and it runs anywhere. Every cell works the same way with a
# real model; the texts will then be others.

# %%
MODEL = jaxgen.demo.path()  # the real one, on a GPU: MODEL = "mistralai/Mistral-7B-Instruct-v0.3"

# %% [markdown]
# ## Generate text
#
# A language model reads tokens (numbers that stand for pieces of text) and says how likely each token of its vocabulary is
# to come next. `generate` picks one, appends it, and asks again. So there are four steps: load, tokenize, generate, decode.

# %%
from transformers import AutoTokenizer

model = jaxgen.AutoModelForCausalLM.from_pretrained(MODEL)  # on a small GPU: load_in_4bit=True
tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")

# %%
inputs = tokenizer(["A list of colors: red, blue"], return_tensors="np")
print("ids:", inputs.input_ids[0].tolist())
print("pieces:", tokenizer.convert_ids_to_tokens(inputs.input_ids[0]))

# %%
ids = model.generate(**inputs)
print("ids:", ids[0].tolist())
print(tokenizer.batch_decode(ids, skip_special_tokens=True)[0])

# %% [markdown]
# The result holds the prompt's ids first, then the new ones, as in transformers. To see the new ones alone, cut the prompt
# off: `ids[:, inputs.input_ids.shape[1]:]`.
#
# The first call took a few seconds, because it compiled the program. Prompts of about the same length share it, so the
# next such call starts at once.
#
# ### Several prompts at once
#
# Prompts have different lengths, and an array is a rectangle, so the shorter ones are filled up with a padding token.
# `attention_mask` says which tokens are real. Pass both, ids and mask: `**batch` does.

# %%
tokenizer.pad_token = tokenizer.eos_token  # most language models have no pad token of their own
batch = tokenizer(["A list of colors: red, blue", "Portugal is"], padding=True, return_tensors="np")
print(batch.attention_mask)

# %%
ids = model.generate(**batch)
for row in ids:
    print("ids:", row.tolist())
for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
    print(text)

# %% [markdown]
# ### What the model thought
#
# With `return_dict_in_generate=True` the result says more than ids: the probability of each token, why each row ended, and
# the seed. `top_logprobs=5` keeps the five best tokens of every step. As the last line of a cell the result shows itself:
# the stronger the colour, the less sure the model was. Point at a token to see its alternatives.

# %%
open_ended = tokenizer(["The sun", "A bird"], padding=True, return_tensors="np")
out = model.generate(**open_ended, return_dict_in_generate=True, top_logprobs=5)
out

# %%
print("new tokens per row:", out.lengths.tolist())
print("ended because of:  ", out.finish_reason)

# %% [markdown]
# ## How generation is configured
#
# A checkpoint brings its own defaults, in `model.generation_config`. What you pass to `generate` wins over it, field by
# field. The names are those of transformers.

# %%
{name: value for name, value in vars(model.generation_config).items() if value is not None}

# %% [markdown]
# The options that are needed most:
#
# | option | what it does |
# |---|---|
# | `max_new_tokens` | how many tokens may be added (default: 20) |
# | `do_sample` | draw from the distribution instead of taking the best token (default: off) |
# | `temperature` | below 1: safer; above 1: wilder. Only when sampling |
# | `top_p`, `top_k`, `min_p` | sample from the likelier tokens only |
# | `num_beams` | above 1: search several continuations at a time |
# | `repetition_penalty` | above 1: repeat less |
# | `eos_token_id`, `stop_strings` | where to stop |
# | `seed` or `key` | the randomness (jaxgen's own) |
#
# Options that belong together go into a `GenerationConfig`. It is passed to one call, or becomes the model's own:

# %%
inputs = tokenizer(["I am a cat."], return_tensors="np")
short = jaxgen.GenerationConfig(max_new_tokens=6)
ids = model.generate(**inputs, generation_config=short)
print("ids:", ids[0].tolist())
print(tokenizer.decode(ids[0], skip_special_tokens=True))

# %% [markdown]
# Changing a number, such as a temperature, never compiles anything again. And an option that is not supported raises an
# error; none is ignored.

# %%
try:
    model.generate(**inputs, temprature=0.7)
except jaxgen.JaxgenError as error:
    print(error)

# %% [markdown]
# ## Common pitfalls
#
# ### 1. The output is too short, or too long
#
# If nobody says how long the text may become, `generate` stops after 20 new tokens, here in the middle of the row.

# %%
inputs = tokenizer(["A sequence of numbers: 1, 2"], return_tensors="np")
ids = model.generate(**inputs)
print(tokenizer.batch_decode(ids, skip_special_tokens=True)[0])

# %% [markdown]
# `max_new_tokens` says how long it may become. It is a limit and no target: a model that has finished says so with its
# end-of-sequence token, and the row ends there.

# %%
ids = model.generate(**inputs, max_new_tokens=50)
print("ids:", ids[0].tolist())
print(tokenizer.batch_decode(ids, skip_special_tokens=True)[0])

# %%
question = tokenizer(["7 + 8 ="], return_tensors="np")
out = model.generate(**question, max_new_tokens=50, return_dict_in_generate=True)
print("ids:", out.sequences[0].tolist())
print(tokenizer.batch_decode(out.sequences, skip_special_tokens=True)[0])
print(out.lengths.tolist(), "new tokens of at most 50; ended because of:", out.finish_reason)

# %% [markdown]
# ### 2. The wrong decoding strategy
#
# By default the most likely token is taken each time (greedy search). That is right for a question with one answer. For
# free text it is dull: a sentence that was written once becomes likelier, and the model ends in a loop.

# %%
inputs = tokenizer(["I am a cat."], return_tensors="np")
ids = model.generate(**inputs, max_new_tokens=40)
print(tokenizer.batch_decode(ids, skip_special_tokens=True)[0])

# %% [markdown]
# With `do_sample=True` each token is drawn at random, according to its probability. In transformers you would call
# `set_seed(42)` before, which changes a global state. Here the seed is an argument, and the same seed gives the same text:
# today and tomorrow, alone and in a batch (notebook 02 is about this).

# %%
for seed in (42, 42, 45):
    ids = model.generate(**inputs, do_sample=True, seed=seed, max_new_tokens=40)
    print("ids:", ids[0].tolist())
    print(f"seed {seed}:", tokenizer.batch_decode(ids, skip_special_tokens=True)[0])

# %% [markdown]
# `num_return_sequences` draws several texts for one prompt, and reads the prompt only once.

# %%
ids = model.generate(**inputs, do_sample=True, seed=42, num_return_sequences=4, max_new_tokens=40)
for text in tokenizer.batch_decode(ids, skip_special_tokens=True):
    print(text)

# %% [markdown]
# ### 3. The wrong padding side
#
# A model goes on from the *last* token of a row. If that is padding, it goes on from nothing. That is why transformers wants
# padding on the left; with padding on the right its tutorial gets `1, 2, 33333333333`.
#
# jaxgen reads the mask and packs each row before anything else: padding is no part of a prompt, on either side. So this
# pitfall is gone, and the new tokens are the same. Left remains the better habit: the new text then follows the prompt
# directly, and the same code is right in transformers too.

# %%
new = {}
for side in ("right", "left"):
    tokenizer.padding_side = side
    padded = tokenizer(["1, 2, 3", "A, B, C, D, E"], padding=True, return_tensors="np")
    ids = model.generate(**padded)
    new[side] = ids[:, padded.input_ids.shape[1] :]
    print(side, "| mask:", padded.attention_mask[0].tolist(), "| new text:", tokenizer.decode(new[side][0]))
print("ids:", new["left"].tolist())
print("the same:", (new["left"] == new["right"]).all())

# %% [markdown]
# What remains of this pitfall: **forgetting the mask**. A padding token is then read like any other, and changes the text.
# transformers guesses a mask in some of these cases; jaxgen takes ids as they are given.

# %%
tokenizer.padding_side = "right"
padded = tokenizer(["1, 2, 3", "A, B, C, D, E"], padding=True, return_tensors="np")
tokenizer.padding_side = "left"
ids = model.generate(**padded)
bare = model.generate(padded.input_ids)  # no attention_mask
print("prompt:", tokenizer.decode(padded.input_ids[0]))
print("with the mask:   ", tokenizer.decode(ids[0], skip_special_tokens=True))
print("without the mask:", tokenizer.decode(bare[0], skip_special_tokens=True))

# %% [markdown]
# ### 4. The wrong prompt
#
# A model that was trained on chats expects a chat, in a certain format. It does not complain about another one; it just
# answers worse. Here is the tutorial's question as plain text. The model does not reply as a thug:

# %%
prompt = "How many helicopters can a human eat in one sitting? Reply as a thug."
inputs = tokenizer([prompt], return_tensors="np")
ids = model.generate(**inputs, max_new_tokens=60)
print(tokenizer.batch_decode(ids[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)[0])

# %% [markdown]
# The tokenizer knows the format: it is its chat template. Write the conversation as messages, and let the template do the
# rest.

# %%
messages = [
    {"role": "system", "content": "You are a friendly chatbot who always responds in the style of a thug"},
    {"role": "user", "content": "How many helicopters can a human eat in one sitting?"},
]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="np", return_dict=True)
print(tokenizer.decode(inputs["input_ids"][0]))

# %%
ids = model.generate(**inputs, do_sample=True, seed=0, max_new_tokens=60)
new = ids[:, inputs["input_ids"].shape[1] :]
print("ids:", new[0].tolist())
print(tokenizer.batch_decode(new, skip_special_tokens=True)[0])

# %% [markdown]
# `add_generation_prompt=True` opens the answer: without it, the model may go on with the user's words. For a whole
# conversation there are `jaxgen.pipeline("text-generation", model=model)`, which takes messages, and `jaxgen chat` in a
# terminal.
#
# ## Streaming
#
# With `model.stream` you read while the model writes: it is an iterator over the same text, in whole words.

# %%
for piece in model.stream("An increasing sequence: 1, 2,", tokenizer=tokenizer, max_new_tokens=20):
    print(repr(piece), end=" ")

# %% [markdown]
# Streaming changes nothing else: the tokens are those of `generate`, also when sampling. As the last line of a cell the
# stream shows itself and grows. And transformers' own streamers work:

# %%
from transformers import TextStreamer

inputs = tokenizer(["An increasing sequence: 1, 2,"], return_tensors="np")
ids = model.generate(**inputs, streamer=TextStreamer(tokenizer, skip_special_tokens=True), max_new_tokens=20)

# %%
model.stream("I am a cat.", tokenizer=tokenizer, do_sample=True, seed=42, max_new_tokens=40)

# %% [markdown]
# ## Where to stop
#
# `stop_strings` ends a row at a piece of text, wherever it falls between the tokens; each row ends by itself, and
# `finish_reason` says why.

# %%
out = model.generate(
    **batch,
    stop_strings=["green", "Europe"],
    tokenizer=tokenizer,
    max_new_tokens=50,
    return_dict_in_generate=True,
)
for text, reason in zip(
    tokenizer.batch_decode(out.sequences, skip_special_tokens=True), out.finish_reason, strict=True
):
    print(reason, "|", text)

# %% [markdown]
# ## Where to go on
#
# - [02 Seeds and common random numbers](02_seeds.ipynb): experiments that reproduce, with error bars.
# - [03 Quantisation (int4)](03_int4.ipynb): a quarter of the memory, and what it costs.
# - [04 Your own loop](04_your_own_loop.ipynb): processors, criteria, `jit`, `vmap`, and decoding by hand.
# - [05 Training and LoRA](05_training_and_lora.ipynb), [06 Speculation and beams](06_speculation_and_beams.ipynb),
#   [07 Looking inside](07_looking_inside.ipynb).
