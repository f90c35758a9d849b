"""`model.generate_batch`: many prompts of different lengths through an engine, without a server."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from jaxgen.engine.engine import Engine
from jaxgen.errors import JaxgenError
from jaxgen.generation.options.config import resolve
from jaxgen.generation.prompts.contexts import context_of
from jaxgen.generation.prompts.layout import bucket, checked_prompt

MOST_ROWS = 32


@dataclasses.dataclass(frozen=True)
class GenerationOutput:
    """What became of one request; the fields are those of transformers' class of this name."""

    request_id: str
    prompt_ids: list[int]
    generated_tokens: list[int]
    logprobs: list[float]
    error: str | None = None
    status: str = "finished"  # or "failed"
    finish_reason: str | None = None  # jaxgen's own, as in `GenerateOutput`


def generate_batch(
    model: Any,
    inputs: Sequence[Sequence[int]],
    generation_config: Any = None,
    *,
    seed: Any = None,
    rows: int | None = None,
    slots: int | None = None,
    **options: Any,
) -> dict[str, GenerationOutput]:
    """Generate for prompts of any lengths with continuous batching: no row waits for the longest.

    `inputs` are lists of ids. The result has `req_0`, `req_1`, ... in their order, and with `num_return_sequences` so
    many of each, one behind the other. Row i draws with the seed `seed` and the row id i, as in `generate`. `rows` run
    at a time, 32 at most by default, of `slots` tokens at most, by default as many as the longest needs. Raises
    `JaxgenError` for bad options; what goes wrong with one request is in its output.
    Source: transformers `ContinuousMixin.generate_batch`.

    >>> model, _ = getfixture("demo")
    >>> outputs = generate_batch(model, [[1, 5, 9], [1, 7]], max_new_tokens=3)
    >>> [len(output.generated_tokens) for output in outputs.values()]
    [3, 3]
    """
    prompts = [checked_prompt([prompt], None, model.config.vocab_size)[0][0].tolist() for prompt in inputs]
    if not prompts:
        return {}
    fields = {name: value for name, value in options.items() if name != "tokenizer"}
    config = resolve(fields, generation_config, model.stored_generation_config)
    samples = config.sequences_per_prompt
    if samples > 1:
        options["num_return_sequences"] = None
    if slots is None:
        new = config.max_new_tokens or config.max_length or 0
        longest = max(map(len, prompts))
        slots = min(longest + max(new, 20), max(context_of(model.config, len(prompt)) for prompt in prompts))
    rows = min(bucket(len(prompts) * samples), MOST_ROWS) if rows is None else rows
    requests = [(index, sample, prompt) for index, prompt in enumerate(prompts) for sample in range(samples)]
    tokenizer = options.pop("tokenizer", None)
    with Engine(model, tokenizer, rows=rows, slots=slots, queue=len(requests)) as engine:
        handles = [
            engine.submit(
                prompt, generation_config=generation_config, seed=seed, row_id=index, sample=sample, **options
            )
            for index, sample, prompt in requests
        ]
    outputs = {}
    for number, ((_, _, prompt), handle) in enumerate(zip(requests, handles, strict=True)):
        name = f"req_{number}"
        try:
            done = handle.result()
        except JaxgenError as error:
            outputs[name] = GenerationOutput(name, prompt, [], [], str(error), "failed", "error")
            continue
        logprobs = done.tokens.logprobs.tolist()
        outputs[name] = GenerationOutput(name, prompt, done.token_ids, logprobs, finish_reason=done.finish_reason)
    return outputs
