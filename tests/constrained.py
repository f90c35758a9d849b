"""What tests of constraints share: a model so small that all it could say can be listed, and the list."""

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
