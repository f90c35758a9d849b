"""What tests of constraints share: a model so small that all it could say can be listed, and the list."""

import random
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

import jaxgen
from jaxgen import GenerationConfig, MistralConfig, MistralForCausalLM, demo
from jaxgen.text.tokenizer import load_tokenizer
from tests.helpers import real_logits
from tests.tokenizers import alone, characters

EOS = 2
PROMPT = [[1, 5, 9], [1, 7, 7]]
THREE = ["1, 2, 3", "Portugal is", "1, 2"]
BOTH: dict[str, Any] = {"tokenizer": characters(), "return_dict_in_generate": True}


def tiny_model(dtype: Any = jnp.float32) -> MistralForCausalLM:
    config = MistralConfig(
        vocab_size=len(characters()) - 1, hidden_size=16, intermediate_size=16,
        num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, sliding_window=None,
        bos_token_id=1, eos_token_id=EOS,
    )  # fmt: skip
    model = MistralForCausalLM(config, dtype=dtype, rngs=nnx.Rngs(0))
    model.generation_config = GenerationConfig(
        eos_token_id=EOS, pad_token_id=0, max_new_tokens=8, suppress_tokens=[0, 1]
    )  # special tokens, which a constraint never allows
    return model


def streamed_and_piped(own: list[Any], **streaming: Any) -> tuple[list[str], Any]:
    """What a pipeline says under a constraint for each of three texts, as a stream does; and the pipeline."""
    model, tokenizer = jaxgen.AutoModelForCausalLM.from_pretrained(demo.path()), load_tokenizer(demo.path())
    generator = jaxgen.pipeline("text-generation", model=model, tokenizer=tokenizer)
    asked: dict[str, Any] = {"do_sample": False, "max_new_tokens": 12}
    results = generator(THREE, constraint=own, batch_size=2, return_full_text=False, **asked)
    told = [result["generated_text"] for [result] in results]
    for text, constraint, found in zip(THREE, own, told, strict=True):
        pieces = model.stream(text, tokenizer=tokenizer, constraint=constraint, **asked, **streaming)
        assert "".join(pieces) == found
    return told, generator


def texts_of(out: Any) -> list[str]:
    said = alone("characters")
    new = [row[len(PROMPT[0]) :][:count].tolist() for row, count in zip(out.sequences, out.lengths, strict=True)]
    return [b"".join(said.get(token, b"?") for token in row if token != EOS).decode() for row in new]


def all_of(model: MistralForCausalLM, texts: list[str], prompt: list[int]) -> dict[tuple[int, ...], np.ndarray]:
    """Every spelling of the texts, with an end token, and the logits before each token."""
    said = {token: text.decode() for token, text in alone("characters").items()}

    def spellings(text: str) -> list[tuple[int, ...]]:
        if not text:
            return [(EOS,)]
        return [
            (t, *rest)
            for t, word in said.items()
            if word and text.startswith(word)
            for rest in spellings(text[len(word) :])
        ]

    rows = [spelling for text in texts for spelling in spellings(text)]
    width = max(map(len, rows)) + len(prompt)
    ids = np.array([[*prompt, *row, *[0] * (width - len(prompt) - len(row))] for row in rows])
    logits = real_logits(model, ids, np.ones_like(ids))
    return {row: logits[i][len(prompt) - 1 :][: len(row)] for i, row in enumerate(rows)}


def random_pattern(rng: random.Random, depth: int = 2) -> str:
    """A pattern that means the same to Python and to Rust."""
    if depth == 0:
        return rng.choice(
            [*"aehopst", "st", "op", "é", " ", r"\.", "[a-f]", "[^a]", "[^e-té]", ".", "日本", "[0-9]", "Q:"]
        )
    kind = rng.randrange(6)
    if kind < 2:
        return "".join(random_pattern(rng, depth - 1) for _ in range(rng.randint(1, 4)))
    if kind < 4:
        return f"(?:{'|'.join(random_pattern(rng, depth - 1) for _ in range(rng.randint(1, 3)))})"
    count = rng.choice(["*", "+", "?", "{2}", "{1,3}", "{2,}", "*?"])
    return f"(?:{random_pattern(rng, depth - 1)}){count}"


def random_schema(rng: random.Random, depth: int = 2) -> dict[str, Any]:
    simple: list[dict[str, Any]] = [
        {"type": "integer"}, {"type": "null"}, {"type": "boolean"}, {"type": "number"}, {"type": "string"},
        {"type": "string", "minLength": rng.randint(0, 2), "maxLength": rng.randint(2, 5)},
        {"type": "string", "format": rng.choice(["date", "time", "date-time", "uuid"])},
        {"type": "string", "pattern": rng.choice(["^[A-Z]{2}\\d$", "^(ab|c)+$", "^[\\d.-]+$", "x?y"])},
        {"enum": rng.sample(["a", 'q"\\', "é", 3, None, True, 1.5, {"k": [1]}], 3)}, {"const": "x.y+"},
        {"type": ["integer", "null"], "minimum": rng.randint(-20, 20), "title": "t"},
        {"type": "integer", "minimum": rng.randint(-50, 0), "exclusiveMaximum": rng.randint(1, 2000)},
        {"type": "number", "minimum": 0}, {"$ref": "#/$defs/word"},
    ]  # fmt: skip
    kind = rng.randrange(6) if depth else 9
    if kind == 0:
        least = rng.randint(0, 2)
        return {"type": "array", "items": random_schema(rng, depth - 1), "minItems": least, "maxItems": least + 2}
    if kind == 1:
        parts = [random_schema(rng, depth - 1) for _ in range(2)]
        return {"type": "array", "prefixItems": parts, "minItems": 2, "maxItems": 2}
    if kind in (2, 3):
        names = rng.sample(["name", "age", 'a "b"', "é", "x.y", "n"], rng.randint(1, 4))
        properties = {name: random_schema(rng, depth - 1) for name in names}
        required = [name for name in names if rng.random() < 0.5]
        return {"type": "object", "properties": properties, "required": required, "additionalProperties": False}
    if kind == 4:
        return {"anyOf": [random_schema(rng, depth - 1), random_schema(rng, depth - 1)]}
    if kind == 5:
        return {"type": "object", "additionalProperties": random_schema(rng, 0)}
    return rng.choice(simple)
