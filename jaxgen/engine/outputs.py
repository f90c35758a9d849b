"""Many prompts through an engine, and what became of each."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from jaxgen.engine.handle import Handle
from jaxgen.errors import EngineFullError, JaxgenError
from jaxgen.generation.options.config import resolve
from jaxgen.generation.options.table import Extras
from jaxgen.generation.prompts.layout import checked_prompt

if TYPE_CHECKING:
    from jaxgen.engine.engine import Engine


@dataclasses.dataclass(frozen=True)
class GenerationOutput:
    """What became of one request; the fields are those of transformers' class of this name, and two of jaxgen's."""

    request_id: str
    prompt_ids: list[int]
    generated_tokens: list[int]
    logprobs: list[float]  # of each new token under what it was drawn from, after processors
    error: str | None = None
    status: str = "finished"  # or "failed"
    finish_reason: str | None = None  # jaxgen's own, as in `GenerateOutput`
    model_logprobs: list[float] = dataclasses.field(default_factory=list)  # jaxgen's own: before processors


def outputs_of(
    engine: "Engine",
    inputs: Sequence[Sequence[int]],
    generation_config: Any,
    key: Any,
    seed: Any,
    options: Mapping[str, Any],
) -> dict[str, GenerationOutput]:
    """As `Engine.generate_batch`."""
    prompts = checked_prompts(inputs, engine.model.config.vocab_size)
    samples = samples_of(engine.model, generation_config, options)
    options = {**options, "num_return_sequences": None}
    handles: list[Handle] = []
    try:
        for index, prompt in enumerate(prompts):
            for sample in range(samples):
                row = {"key": key, "seed": seed, "row_id": index, "sample": sample, **options}
                handles.append(_submitted(engine, handles, prompt, {"generation_config": generation_config, **row}))
        for handle in handles:
            handle.wait()
    except BaseException:  # also Ctrl-C: nobody waits for them any more
        for handle in handles:
            handle.cancel()
        raise
    return {f"req_{number}": _output(f"req_{number}", handle) for number, handle in enumerate(handles)}


def checked_prompts(inputs: Sequence[Sequence[int]], vocab_size: int) -> list[list[int]]:
    """Prompts as lists of ids; raises `JaxgenError` as `checked_prompt`, and names which of them it is."""
    return [
        checked_prompt([prompt], None, vocab_size, (f"inputs[{index}]", ""))[0][0].tolist()
        for index, prompt in enumerate(inputs)
    ]


def _submitted(engine: "Engine", before: list[Handle], prompt: list[int], options: dict[str, Any]) -> Handle:
    """A prompt's handle. Where the queue is full, those `before` it come first."""
    while True:
        try:
            return engine.submit(prompt, **options)
        except EngineFullError:
            waiting = [handle for handle in before if not handle.done]
            if not waiting:  # it is full of others' requests
                raise
            waiting[0].wait()


def _output(name: str, handle: Handle) -> GenerationOutput:
    prompt = handle.prompt_ids.tolist()
    try:
        done = handle.result()
    except JaxgenError as error:
        return GenerationOutput(name, prompt, [], [], str(error), "failed", "error")
    tokens, reason = done.tokens, done.finish_reason
    after, own = tokens.logprobs.tolist(), tokens.model_logprobs.tolist()
    return GenerationOutput(name, prompt, done.token_ids, after, finish_reason=reason, model_logprobs=own)


def samples_of(model: Any, generation_config: Any, options: Mapping[str, Any]) -> int:
    """How many rows each prompt gets."""
    return resolve(Extras.take(options)[1], generation_config, model.stored_generation_config).sequences_per_prompt
