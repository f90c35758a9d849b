"""text-generation-inference's interface: `/generate`, `/generate_stream` and `/info`, for clients that know it.

`details.tokens` have the model's own log-probabilities. TGI's `watermark`, `adapter_id`, `best_of` and its
`frequency_penalty`, which is not OpenAI's, are refused. A text is greedy unless `do_sample` is true or a filter or
temperature is given, as there.
"""

import dataclasses
import functools
from collections.abc import AsyncGenerator
from typing import Any

from starlette.responses import Response

from jaxgen.engine.handle import Completion, Handle, Tokens
from jaxgen.serve.chat import check_best
from jaxgen.serve.checks import flag, integer, number, only, text, whole
from jaxgen.serve.fields import Fields, inside
from jaxgen.serve.follow import finished, follow, held
from jaxgen.serve.refusal import Refusal, as_json
from jaxgen.serve.sampling import MOST_STOPS, stops_of
from jaxgen.serve.service import Prompt, Service, fresh_seed, version
from jaxgen.serve.shapes import Wanted, grammar_of
from jaxgen.serve.sse import Events
from jaxgen.serve.token_texts import LEAST

_FINISH = {"eos": "eos_token", "stop_string": "stop_sequence", "complete": "eos_token"}
_DEFAULT_NEW_TOKENS = 100


@dataclasses.dataclass(frozen=True)
class _Parameters:
    options: dict[str, Any]
    shape: Wanted
    new: int | None
    truncate: int | None
    seed: int | None
    best: int
    full: bool  # whether the text has the prompt in front
    details: bool
    prefill: bool


@dataclasses.dataclass(frozen=True)
class Inputs:
    """What a request says."""

    inputs: str
    stream: bool
    parameters: _Parameters


@dataclasses.dataclass(frozen=True)
class _Asked:
    """A request under way."""

    parameters: _Parameters
    prompt: Prompt
    seed: int
    scores: Tokens | None
    handle: Handle


def info(service: Service) -> Response:
    """What TGI says of itself, as far as there is such a thing here."""
    shape = service.engine.strict
    return as_json(
        {
            "model_id": service.name,
            "model_dtype": service.model.dtype.name,
            "model_device_type": service.model.device.platform,
            "max_total_tokens": shape.tokens,
            "max_input_tokens": shape.tokens - 1,
            "max_concurrent_requests": service.limits.connections,
            "max_stop_sequences": MOST_STOPS,
            "max_best_of": 1,
            "router": "jaxgen",
            "version": version(),
            "system_fingerprint": service.fingerprint,
        }
    )


def read_inputs(fields: Fields, service: Service) -> Inputs:
    """Read a request, for either route. Raises `Refusal`."""
    read = functools.partial(_parameters, service=service)
    inputs, stream = fields.need("inputs", text, "The prompt."), fields.take("stream", flag, "Answer by events.", False)
    parameters = fields.take("parameters", inside(read), "How it is continued.")
    fields.end()
    return Inputs(inputs, stream, read(Fields({})) if parameters is None else parameters)


async def generate(service: Service, inputs: Inputs) -> Any:
    """A text, at once; or as events, if it is asked to `stream`."""
    if inputs.stream:
        return await generate_stream(service, inputs)
    asked = await _submitted(service, inputs)
    parameters, handle = asked.parameters, asked.handle
    with held([handle]):
        await finished([handle])
        done = _completed(service, handle)
    said: dict[str, Any] = {"generated_text": _whole_text(asked, done)}
    if parameters.details:
        prefill = [] if asked.scores is None else _prefill(service, asked.scores)
        said["details"] = {**_details(done, asked), "prefill": prefill, "tokens": _tokens(service, done.tokens)}
        if parameters.best:
            said["details"]["top_tokens"] = _top_tokens(service, done.tokens, parameters.best)
    return as_json(said)


async def generate_stream(service: Service, inputs: Inputs) -> Events:
    """A text as events, one per token."""
    if inputs.parameters.prefill:
        raise Refusal("decoder_input_details: not in a stream", param="parameters.decoder_input_details")
    asked = await _submitted(service, inputs)

    def failed(error: Exception) -> dict[str, Any]:
        body = service.failed(error)["error"]
        return {"error": body["message"], "error_type": "generation"}

    return Events(_events(service, asked), [asked.handle], failed, service.limits.seconds + 60)


async def _events(service: Service, asked: _Asked) -> AsyncGenerator[Any, None]:
    """The last token comes with the whole text, so each is held back until there is another one."""
    index, last, best = 0, None, asked.parameters.best
    async for _, tokens in follow([asked.handle]):
        for place in range(0 if tokens is None else len(tokens.ids)):
            assert tokens is not None
            if last is not None:
                yield {**last, "generated_text": None, "details": None}
            index += 1
            one = tokens[place : place + 1]
            last = {"index": index, "token": _tokens(service, one)[0]}
            if best:
                last["top_tokens"] = _top_tokens(service, one, best)[0]
    done = _completed(service, asked.handle)
    details = {**_details(done, asked), "input_length": len(asked.prompt.ids)}
    yield {**(last or {}), "generated_text": _whole_text(asked, done), "details": details}


def _parameters(p: Fields, service: Service) -> _Parameters:
    filters = {
        "temperature": p.take("temperature", number("(0, inf)"), "What logits are divided by."),
        "top_k": p.take("top_k", integer(1), "Draw from so many of the likeliest tokens."),
        "top_p": p.take("top_p", number("(0, 1]"), "Draw from the likeliest tokens that have this share."),
        "typical_p": p.take("typical_p", number("(0, 1]"), "Draw from the most typical tokens that have this share."),
    }
    given = {name: value for name, value in filters.items() if value is not None}
    drawn = p.take("do_sample", flag, "Draw tokens, as a temperature or a filter also says.", False)
    options: dict[str, Any] = {"do_sample": drawn or bool(given)}
    if options["do_sample"]:
        options |= {"top_k": 0, **given}
    penalty = p.take("repetition_penalty", number("(0, inf)"), "As in transformers; the prompt's tokens count too.")
    if penalty is not None:
        options["repetition_penalty"] = penalty
    if stops := stops_of(p):
        options["stop_strings"] = stops
    p.take("frequency_penalty", only(0, 0.0), "Must be 0.")
    p.take("watermark", only(False), "Must be false.")
    p.take("best_of", only(1), "Must be 1.")
    seed = p.take("seed", whole, "The same seed gives the same text. Without one, `details` say which it was.")
    new = p.take("max_new_tokens", integer(1), f"The most new tokens; {_DEFAULT_NEW_TOKENS} if it is not given.")
    best = p.take("top_n_tokens", integer(0), "So many of the likeliest tokens in each place.", 0)
    truncate = p.take("truncate", integer(1), "Only so many of the prompt's last tokens are read.")
    check_best(p.full("top_n_tokens"), best, service)
    full = p.take("return_full_text", flag, "Whether the text has the prompt in front.", False)
    details = p.take("details", flag, "Whether the answer has its tokens, the seed and why it ended.", False)
    prefill = p.take("decoder_input_details", flag, "Whether these have the prompt's tokens too.", False)
    shape = grammar_of(p)
    p.end()
    options["top_logprobs"] = best or None
    return _Parameters(options, shape, new, truncate, seed, best, full, details or prefill, prefill)


async def _submitted(service: Service, inputs: Inputs) -> _Asked:
    given = inputs.parameters
    options = given.options | await service.shapes.option(given.shape, given.options)
    ids = await service.prompts(service.encoded, "inputs", inputs.inputs)
    ids = ids if given.truncate is None else ids[-given.truncate :]
    prompt, seed = Prompt(ids, inputs.inputs), fresh_seed() if given.seed is None else given.seed
    scores = (await service.scored([prompt]))[0] if given.prefill else None
    new = ("parameters.max_new_tokens", given.new, _DEFAULT_NEW_TOKENS)
    [call] = await service.submitted("inputs", [prompt], new, 1, **options, seed=seed)
    return _Asked(given, prompt, seed, scores, call.handles[0])


def _completed(service: Service, handle: Handle) -> Completion:
    done = handle.result(0)
    service.metrics.observe(handle, len(done.token_ids))
    if done.finish_reason == "cancelled":
        raise Refusal("the server is closing", status=503, code="closing")
    return done


def _details(done: Completion, asked: _Asked) -> dict[str, Any]:
    finish = _FINISH.get(done.finish_reason, "length")
    seed = asked.seed if asked.parameters.options["do_sample"] else None
    return {"finish_reason": finish, "generated_tokens": len(done.token_ids), "seed": seed}


def _whole_text(asked: _Asked, done: Completion) -> str:
    return (asked.prompt.text if asked.parameters.full else "") + (done.text or "")


def _tokens(service: Service, tokens: Tokens) -> list[dict[str, Any]]:
    pairs = zip(tokens.ids.tolist(), tokens.model_logprobs.tolist(), strict=True)
    return [_token(service, token, logprob) for token, logprob in pairs]


def _token(service: Service, token: int, logprob: float) -> dict[str, Any]:
    special = token in service.tokenizer.all_special_ids
    return {"id": token, "text": service.texts.text_of(token), "logprob": max(logprob, LEAST), "special": special}


def _top_tokens(service: Service, tokens: Tokens, best: int) -> list[list[dict[str, Any]]]:
    assert tokens.top_ids is not None and tokens.top_logprobs is not None
    rows = zip(tokens.top_ids.tolist(), tokens.top_logprobs.tolist(), strict=True)
    return [[_token(service, *pair) for pair in zip(ids[:best], own[:best], strict=True)] for ids, own in rows]


def _prefill(service: Service, scores: Tokens) -> list[dict[str, Any]]:
    told = [
        {"id": token, "text": service.texts.text_of(token), "logprob": max(logprob, LEAST)}
        for token, logprob in zip(scores.ids.tolist(), scores.model_logprobs.tolist(), strict=True)
    ]
    return [told[0] | {"logprob": None}, *told[1:]]
