"""Text as it is generated: the same prefill and decode as `model.generate`, a few tokens at a time."""

from collections.abc import Iterator
from typing import Any

import jax

from jaxgen.errors import JaxgenError, NonFiniteLogitsError
from jaxgen.generation.compiled import Run
from jaxgen.generation.config import resolve
from jaxgen.generation.request import Request
from jaxgen.text.tokenizer import continuation

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"  # how tokenizers show the first bytes of a character


def stream_text(
    model: Any,
    tokenizer: Any,
    text: str,
    *,
    chunk_size: int = 1,
    seed: int | None = None,
    row_id: int | str = 0,
    **options: Any,
) -> Iterator[str]:
    """Yield the continuation of one prompt piece by piece; joined, it is the text that `model.generate` gives.

    The host looks every `chunk_size` tokens. `options` are those of `model.generate`. Raises what it raises.
    """
    inputs = tokenizer([text], return_tensors="np")
    config = resolve(options, None, model.generation_config)
    if (config.num_return_sequences or 1) > 1:
        raise JaxgenError(f"num_return_sequences={config.num_return_sequences}: one text can be streamed at a time")
    request = Request.read(model, inputs["input_ids"], inputs["attention_mask"], config, seed=seed, row_ids=[row_id])
    run = Run(model, request)
    shown, new_tokens, done = "", 1, False
    while not done:
        state = run.advance(until=new_tokens)
        tokens, length, prompt, done, broken = jax.device_get(
            (state.tokens[0], state.lengths[0], state.prompt_lengths[0], state.done[0], state.broken[0])
        )
        if broken:
            raise NonFiniteLogitsError([0], [int(length - prompt)])
        text = continuation(tokenizer, tokens[:prompt].tolist(), tokens[prompt:length].tolist())
        text = text if done else text.rstrip(_UNFINISHED)
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
        new_tokens += chunk_size
