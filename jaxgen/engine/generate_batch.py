"""`model.generate_batch`: many prompts of different lengths through an engine, without a server."""

from collections.abc import Sequence
from typing import Any

from jaxgen.engine.engine import Engine
from jaxgen.engine.outputs import GenerationOutput, checked_prompts, samples_of
from jaxgen.generation.options.config import resolve
from jaxgen.generation.options.table import Extras
from jaxgen.generation.prompts.contexts import context_of
from jaxgen.generation.prompts.layout import bucket

MOST_ROWS = 32


def generate_batch(
    model: Any,
    inputs: Sequence[Sequence[int]],
    generation_config: Any = None,
    *,
    key: Any = None,
    seed: Any = None,
    rows: int | None = None,
    slots: int | None = None,
    chunk: int = 64,
    **options: Any,
) -> dict[str, GenerationOutput]:
    """Generate for prompts of any lengths with continuous batching: no row waits for the longest.

    As `Engine.generate_batch`, on an engine for this call: `rows` run at a time, 32 at most by default, of `slots`
    tokens at most, by default as many as the longest needs. Sizes are rounded up as those of an engine.

    >>> model, _ = getfixture("demo")
    >>> outputs = generate_batch(model, [[1, 5, 9], [1, 7]], max_new_tokens=3)
    >>> [len(output.generated_tokens) for output in outputs.values()]
    [3, 3]
    """
    prompts = checked_prompts(inputs, model.config.vocab_size)
    if not prompts:
        return {}
    samples = samples_of(model, generation_config, options)
    if slots is None:
        config = resolve(Extras.take(options)[1], generation_config, model.stored_generation_config)
        new = config.max_new_tokens or config.max_length or 0
        longest = max(map(len, prompts))
        slots = min(longest + max(new, 20), max(context_of(model.config, len(prompt)) for prompt in prompts))
    rows = min(bucket(len(prompts) * samples), MOST_ROWS) if rows is None else rows
    with Engine(model, options.pop("tokenizer", None), rows=rows, slots=slots, chunk=chunk) as engine:
        return engine.generate_batch(prompts, generation_config, key=key, seed=seed, **options)
