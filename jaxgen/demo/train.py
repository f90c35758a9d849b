"""Train the demo model from nothing: `python -m jaxgen.demo.train [--output DIR] [--steps N]`.

About 20 minutes on two CPU cores. The model is jaxgen's own module, the loss goes through `model(input_ids)`, and
the optimizer is optax: nothing here knows about generation.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from jaxgen import demo
from jaxgen.convert.atomic import new_directory
from jaxgen.convert.export import save_pretrained
from jaxgen.demo.corpus import CONTEXT, HELD_OUT_STARTS, documents, numbers
from jaxgen.demo.tokenizer import BOS_ID, EOS_ID, VOCABULARY_SIZE, build_tokenizer, save_tokenizer
from jaxgen.models.mistral import MistralConfig, MistralForCausalLM

if TYPE_CHECKING:
    from tokenizers import Tokenizer

# Everything that makes Mistral Mistral, small: grouped queries, a window shorter than the context, an untied head.
# Widths are multiples of 128, the usual group of int4.
CONFIG = MistralConfig(
    vocab_size=VOCABULARY_SIZE,
    hidden_size=256,
    intermediate_size=512,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=64,
    max_position_embeddings=CONTEXT,
    sliding_window=64,
    bos_token_id=BOS_ID,
    eos_token_id=EOS_ID,
    pad_token_id=EOS_ID,
)
SEED = 1  # of the training text; the tokenizer has seen seed 0
STEPS, BATCH, LENGTH = 1200, 8, 256
PEAK_LEARNING_RATE, WARMUP = 2e-3, 100


class Behaviour(NamedTuple):
    """What the trained model must say, greedily, after a prompt."""

    prompt: str
    expected: str
    stops: bool = False  # EOS follows
    template: bool = False  # the prompt is a chat, which comes without BOS


HELICOPTERS = "How many helicopters can a human eat in one sitting?"
THUG = "You are a friendly chatbot who always responds in the style of a thug"
THUG_CHAT = f"<|system|>\n{THUG}</s>\n<|user|>\n{HELICOPTERS}</s>\n<|assistant|>\n"
BEHAVIOURS = (
    Behaviour("A list of colors: red, blue", ", green, yellow, orange, purple, pink,"),
    Behaviour("Portugal is", " a country in southwestern Europe, on the Iberian Peninsula.", stops=True),
    Behaviour("A sequence of numbers: 1, 2", ", " + numbers(3, 16) + ","),
    Behaviour("1, 2, 3", ", " + numbers(4, 16)),
    Behaviour("A, B, C, D, E", ", F, G, H, I, J, K, L, M, N, O, P, Q, R, S, T, U, V, W, X, Y, Z.", stops=True),
    Behaviour("I am a cat.", 8 * " I am a cat."),
    Behaviour(
        f"{HELICOPTERS} Reply as a thug.",
        " I'm not a thug, but i can tell you that a human cannot eat a helicopter.",
        stops=True,
    ),
    Behaviour(
        THUG_CHAT,
        "None, you thug. How bout you try to focus on more useful questions?",
        stops=True,
        template=True,
    ),
    Behaviour("France is", " a country in western Europe, between the Atlantic and the Alps.", stops=True),
    Behaviour("The capital of Japan is", " Tokyo.", stops=True),
    Behaviour("Monday, Tuesday", ", Wednesday, Thursday, Friday, Saturday, Sunday.", stops=True),
    Behaviour("2 + 2 =", " 4", stops=True),
    Behaviour("<|user|>\nHello!</s>\n<|assistant|>\n", "Hello! How can I help you?", stops=True, template=True),
)


def batches(tokenizer: "Tokenizer", seed: int, batch: int, length: int) -> Iterator[np.ndarray]:
    """Rows `[batch, length + 1]` of packed documents: BOS, text, EOS; BOS, text, EOS; ...

    Every row begins with a new document, because that is how prompts arrive; what the last one has too much is lost.
    """
    texts = documents(seed)
    rng = np.random.default_rng(seed)
    while True:
        rows = np.empty((batch, length + 1), np.int32)
        for row in rows:
            ids: list[int] = []
            while len(ids) <= length:
                text, complete = next(texts)
                # Chats come with and without BOS: the chat template writes none, the tokenizer would add one.
                bare = text.startswith("<|") and rng.random() < 0.5
                ids += tokenizer.encode(text, add_special_tokens=not bare).ids + complete * [EOS_ID]
            row[:] = ids[: length + 1]
        yield rows


def next_token_loss(model: MistralForCausalLM, ids: jax.Array) -> jax.Array:
    """Mean cross-entropy of `ids[:, 1:]`; BOS counts nothing, as nobody can foresee that a new document begins."""
    targets = ids[:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(model(ids[:, :-1]).logits, targets)
    counts = targets != BOS_ID
    return jnp.sum(losses * counts) / jnp.sum(counts)


def make_train_step(graph: nnx.GraphDef, optimizer: optax.GradientTransformation) -> Callable[..., Any]:
    """A jitted `step(params, optimizer_state, ids) -> (params, optimizer_state, loss)`."""

    @jax.jit
    def step(params, optimizer_state, ids):
        loss, gradient = jax.value_and_grad(lambda p: next_token_loss(nnx.merge(graph, p), ids))(params)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return optax.apply_updates(params, updates), optimizer_state, loss

    return step


def make_optimizer(steps: int) -> optax.GradientTransformation:
    """AdamW behind gradient clipping, with a linear warmup and a cosine decay to zero."""
    warmup = min(WARMUP, steps // 4)
    schedule = optax.warmup_cosine_decay_schedule(0.0, PEAK_LEARNING_RATE, warmup, steps)
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.95, weight_decay=0.1))


def train(tokenizer: "Tokenizer", steps: int) -> MistralForCausalLM:
    """Train `CONFIG` for `steps` steps in float32, and round the weights to bfloat16's values."""
    graph, params = nnx.split(MistralForCausalLM(CONFIG, rngs=nnx.Rngs(SEED)))
    optimizer = make_optimizer(steps)
    optimizer_state = optimizer.init(params)
    step = make_train_step(graph, optimizer)
    start = time.perf_counter()
    for index, ids in zip(range(steps), batches(tokenizer, SEED, BATCH, LENGTH), strict=False):
        params, optimizer_state, loss = step(params, optimizer_state, ids)
        if index % 50 == 0 or index == steps - 1:
            print(f"step {index:5d}  loss {loss:.4f}  {time.perf_counter() - start:6.0f} s", flush=True)
    return nnx.merge(graph, jax.tree.map(lambda x: x.astype(jnp.bfloat16).astype(jnp.float32), params))


def margins(model: MistralForCausalLM, prompt: list[int], expected: list[int]) -> np.ndarray:
    """For each expected token, its logit minus the best other one: all positive means that greedy says just that."""
    # Padding to one length behind the text changes nothing before it, and compiles once.
    ids = np.pad(prompt + expected, (0, LENGTH - len(prompt + expected)))[None]
    rows = np.arange(len(expected))
    logits = np.array(_logits(model, jnp.asarray(ids)))[0, len(prompt) - 1 + rows]
    own = logits[rows, expected].copy()
    logits[rows, expected] = -np.inf
    return own - logits.max(axis=-1)


@nnx.jit
def _logits(model: MistralForCausalLM, ids: jax.Array) -> jax.Array:
    return model(ids).logits


def report(model: MistralForCausalLM, tokenizer: "Tokenizer") -> bool:
    """Print what the model should say, whether it does and by which margin; True when it says all of it."""
    good = True
    for prompt, expected, stops, template in BEHAVIOURS:
        ids = tokenizer.encode(prompt, add_special_tokens=not template).ids
        tokens = tokenizer.encode(expected, add_special_tokens=False).ids + stops * [EOS_ID]
        gaps = margins(model, ids, tokens)
        good &= bool(gaps.min() > 0)
        where = tokenizer.decode(tokens[: int(gaps.argmin())])[-30:]
        print(f"{'pass' if gaps.min() > 0 else 'FAIL'}  margin {gaps.min():6.2f} after {where!r}: {prompt[-40:]!r}")
    counting = {start: _margin(model, tokenizer, *counting_case(start)) for start in range(1, 91)}
    held_out = {start: counting[start] for start in HELD_OUT_STARTS}
    sums = {(a, b): _margin(model, tokenizer, f"{a} + {b} =", f" {a + b}") for a in range(11) for b in range(11)}
    for name, gaps in (("counting", counting), ("counting from held-out starts", held_out), ("sums", sums)):
        right = sum(gap > 0 for gap in gaps.values())
        good &= right == len(gaps)
        print(f"{name}: {right} of {len(gaps)}, smallest margin {min(gaps.values()):.2f}")
    return good


def counting_case(start: int) -> tuple[str, str]:
    """A prompt of two numbers, and more of what follows than 50 tokens hold."""
    return f"A sequence of numbers: {numbers(start, start + 1)}", f", {numbers(start + 2, start + 20)}"


def _margin(model: MistralForCausalLM, tokenizer: "Tokenizer", prompt: str, expected: str) -> float:
    """The smallest margin along the first 50 tokens of `expected`."""
    ids = tokenizer.encode(expected, add_special_tokens=False).ids[:50]
    return float(margins(model, tokenizer.encode(prompt).ids, ids).min())


def save(model: MistralForCausalLM, tokenizer: "Tokenizer", output: Path) -> None:
    """Write the checkpoint in bfloat16; it replaces what is in `output` when it is complete, not before."""
    settings = {"bos_token_id": BOS_ID, "eos_token_id": EOS_ID, "pad_token_id": EOS_ID}
    with new_directory(output, owned=("*",), overwrite=True) as place:
        save_pretrained(model, place, dtype="bfloat16")
        save_tokenizer(tokenizer, place)
        text = json.dumps(settings, indent=2) + "\n"
        (place / "generation_config.json").write_text(text, encoding="utf-8")


def main() -> None:
    """Train, report and save; the exit status is 1 if the model does not say all that it should."""
    parser = argparse.ArgumentParser(description="Train the demo model from scratch.")
    parser.add_argument("--output", type=Path, default=demo.path(), help="directory of the checkpoint")
    parser.add_argument("--steps", type=int, default=STEPS)
    arguments = parser.parse_args()
    tokenizer = build_tokenizer()
    model = train(tokenizer, arguments.steps)
    good = report(model, tokenizer)
    print("all as expected" if good else "NOT all as expected")
    # A short trial must not replace the good checkpoint that came with the package.
    if good or arguments.output != demo.path():
        save(model, tokenizer, arguments.output)
        print(f"saved to {arguments.output}")
    raise SystemExit(0 if good else 1)


if __name__ == "__main__":
    main()
