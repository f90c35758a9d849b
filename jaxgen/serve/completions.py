"""`/v1/completions`: texts or ids that are continued, and what lm-eval asks of them: `echo` with `logprobs`."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxgen.engine.handle import Completion, Tokens
from jaxgen.serve.answers import FINISH, Asked, model_of
from jaxgen.serve.chat import check_best, check_samples
from jaxgen.serve.checks import bad, check, flag, integer, only
from jaxgen.serve.fields import Fields
from jaxgen.serve.refusal import Refusal, as_json
from jaxgen.serve.sampling import IGNORED, sampling_of, seed_of, stream_of
from jaxgen.serve.service import Prompt, Service, fresh_seed
from jaxgen.serve.shapes import Wanted, shape_of
from jaxgen.serve.token_texts import TokenTexts

DEFAULT_NEW_TOKENS = 16  # as at OpenAI


@dataclasses.dataclass(frozen=True)
class CompletionForm:
    """How OpenAI writes the choices of a completion.

    `echoed` are the prompts that are repeated, `scores` what the model thinks of them, each with `samples` choices.
    """

    texts: TokenTexts
    best: int | None  # alternatives of each token; None without log-probabilities
    samples: int
    echoed: Sequence[Prompt] | None
    scores: Sequence[Tokens] | None
    kind: str = "text_completion"
    shown: dict[int, int] = dataclasses.field(default_factory=dict)  # characters of each choice that is streamed

    def whole(self, place: int, done: Completion) -> dict[str, Any]:
        """A choice of an answer that is sent at once."""
        before = self._before(place)
        return self._choice(place, before + (done.text or ""), done.tokens, done.finish_reason)

    def begin(self, place: int) -> dict[str, Any] | None:
        """The prompt, where it is echoed."""
        if self.echoed is None:
            return None
        choice = self._choice(place, self._before(place), Tokens.joined([]))
        self._count(place, choice["logprobs"])
        return choice

    def piece(self, place: int, said: str, tokens: Tokens) -> dict[str, Any]:
        """A further piece."""
        logprobs = None
        if self.best is not None and len(tokens.ids):
            logprobs = self.texts.completion(tokens, self.best, self.shown.get(place, 0))
            self._count(place, logprobs)
        return {"index": place, "text": said, "logprobs": logprobs, "finish_reason": None}

    def says(self, choice: dict[str, Any]) -> bool:
        """Whether a piece has any text."""
        return bool(choice["text"])

    def end(self, place: int, reason: str) -> dict[str, Any]:
        """The last piece, without text."""
        return {"index": place, "text": "", "logprobs": None, "finish_reason": reason}

    def _count(self, place: int, logprobs: dict[str, Any] | None) -> None:
        if logprobs is not None:
            self.shown[place] = self.shown.get(place, 0) + sum(map(len, logprobs["tokens"]))

    def _before(self, place: int) -> str:
        return "" if self.echoed is None else self.echoed[place // self.samples].text

    def _choice(self, place: int, text: str, tokens: Tokens, reason: str | None = None) -> dict[str, Any]:
        finish = None if reason is None else FINISH.get(reason, "length")
        return {"index": place, "text": text, "logprobs": self._logprobs(place, tokens), "finish_reason": finish}

    def _logprobs(self, place: int, tokens: Tokens) -> dict[str, Any] | None:
        if self.best is None:
            return None
        if self.scores is None:
            return self.texts.completion(tokens, self.best)
        prompt = self.texts.completion(self.scores[place // self.samples], self.best)
        prompt["token_logprobs"][0] = prompt["top_logprobs"][0] = None  # nothing is before it
        new = self.texts.completion(tokens, self.best, offset=sum(map(len, prompt["tokens"])))
        return {name: prompt[name] + new[name] for name in prompt}


@dataclasses.dataclass(frozen=True)
class Completing:
    """What a request for a completion says."""

    prompts: list[Any]
    special: dict[str, bool]
    options: dict[str, Any]
    echo: bool
    new: int | None
    samples: int
    seed: int | None
    stream: tuple[bool, bool, bool]
    best: int | None
    shape: Wanted


def read_completion(fields: Fields, service: Service) -> Completing:
    """Read a request for a completion. Raises `Refusal`."""
    model_of(fields, service)
    prompts = fields.need("prompt", _prompts, "What is continued: texts, or ids of tokens.")
    options = sampling_of(fields, service.model.stored_generation_config, service.model.config.vocab_size)
    echo = fields.take("echo", flag, "Repeat the prompt, with its log-probabilities if there are any.", False)
    new = fields.take("max_tokens", integer(0), f"The most new tokens; {DEFAULT_NEW_TOKENS} if it is not given.")
    if new == 0 and not echo:
        raise Refusal("max_tokens=0: only with echo=true, which asks for the prompt", param="max_tokens")
    samples = fields.take("n", integer(1), "So many texts for each prompt.", 1)
    check_samples(samples, service)
    if fields.take("best_of", integer(1), "1 or n: all texts are sent.", samples) not in (1, samples):
        raise Refusal(f"best_of: not in this server; only 1 or n={samples} is", param="best_of")
    fields.take("suffix", only("", why="this model does not fill in"), "Must be empty.")
    best = fields.take("logprobs", integer(0), "Log-probabilities, with so many of the likeliest tokens each.")
    check_best("logprobs", best or 0, service)
    seed, stream = seed_of(fields), stream_of(fields)
    special = {"add_special_tokens": fields.take("add_special_tokens", flag, "As the tokenizer's option.", True)}
    shape = shape_of(fields)
    fields.end(IGNORED)
    if len(prompts) * samples > service.limits.sequences:
        most = service.limits.sequences
        raise Refusal(f"prompt: {len(prompts)} prompts times n={samples}; at most {most}", param="prompt")
    if new == 0 and stream[0]:
        raise Refusal("max_tokens=0: there is nothing to stream", param="stream")
    return Completing(prompts, special, options, echo, new, samples, seed, stream, best, shape)


async def completions(service: Service, asked: Completing) -> Any:
    """Continue texts. Raises `Refusal`."""
    seed = fresh_seed() if asked.seed is None else asked.seed
    prompts = await service.prompts(
        lambda: [_prompt(service, each, asked.special, asked.echo) for each in asked.prompts]
    )
    scores = await service.scored(prompts) if asked.echo and asked.best is not None else None
    form = CompletionForm(service.texts, asked.best, asked.samples, prompts if asked.echo else None, scores)
    count = sum(len(prompt.ids) for prompt in prompts)
    if asked.new == 0:
        return _echoed(service, form, count, len(prompts) * asked.samples)
    options = asked.options | await service.shapes.option(asked.shape, asked.options)
    options |= {"seed": seed, "top_logprobs": asked.best or None}
    most = ("max_tokens", asked.new, DEFAULT_NEW_TOKENS)
    calls = await service.submitted("prompt", prompts, most, asked.samples, **options)
    return await Asked(service, calls, form, count, seed, asked.stream, "text_completion").answer()


def _echoed(service: Service, form: CompletionForm, count: int, choices: int) -> Any:
    """The answer where nothing is generated."""
    nothing = Completion(np.zeros(0, np.int32), Tokens.joined([]), "", "length", None, None, 0.0)
    asked = Asked(service, [], form, count, 0, (False, False, False), "")
    return as_json(asked.body([form.whole(place, nothing) for place in range(choices)], 0))


_IDS = {"type": "array", "items": {"type": "integer"}, "minItems": 1}
_LISTS = {"type": "array", "items": {"anyOf": [{"type": "string"}, _IDS]}, "minItems": 1}


@check([], anyOf=[{"type": "string"}, _IDS, _LISTS])
def _prompts(name: str, value: Any) -> list[Any]:
    """OpenAI's four forms, as a list: a text, texts, ids, lists of ids."""
    if isinstance(value, str) or (isinstance(value, list) and value and all(map(_is_id, value))):
        return [value]
    if isinstance(value, list) and value and all(map(_is_prompt, value)):
        return value
    bad(name, value, "a text, a list of texts, a list of token ids, or a list of such lists; none of them empty")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and len(value) > 0 and all(map(_is_id, value)))


def _prompt(service: Service, given: Any, special: dict[str, bool], echo: bool) -> Prompt:
    if isinstance(given, str):
        ids = service.encoded("prompt", given, **special)
    else:
        ids, size = given, service.model.config.vocab_size
        if strange := [token for token in ids if not 0 <= token < size]:
            bad("prompt", strange[0], f"an id below {size}, as all of a prompt")
    service.room("prompt", ids)
    text = given if isinstance(given, str) else service.tokenizer.decode(ids) if echo else ""
    return Prompt(ids, text)
