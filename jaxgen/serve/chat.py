"""`/v1/chat/completions`: a chat through the tokenizer's template, and the assistant's next message."""

import dataclasses
from typing import Any

from jaxgen.engine.handle import Completion, Tokens
from jaxgen.errors import shown
from jaxgen.serve.answers import FINISH, Asked, model_of
from jaxgen.serve.checks import Check, each, flag, integer, mapping, one_of, only, text, unchanged
from jaxgen.serve.fields import Fields, inside
from jaxgen.serve.refusal import Refusal
from jaxgen.serve.sampling import IGNORED, arguments_of, sampling_of, seed_of, stream_of
from jaxgen.serve.service import Prompt, Service, fresh_seed
from jaxgen.serve.shapes import Wanted, shape_of
from jaxgen.serve.token_texts import TokenTexts
from jaxgen.serve.tools import CHOICE, Forced, forced_by

_ROLES = ("system", "developer", "user", "assistant", "tool", "function")
# What a template gets from the server, and not from a client.
_OURS = {"tokenize", "chat_template", "tools", "continue_final_message", "add_generation_prompt", "tokenizer_kwargs"}
_OURS |= {"padding", "truncation", "max_length", "return_tensors", "return_dict", "documents", "conversation"}


@dataclasses.dataclass(frozen=True)
class ChatForm:
    """How OpenAI writes the choices of a chat; `best` alternatives of each token, None without log-probabilities."""

    texts: TokenTexts
    best: int | None
    forced: Forced | None = None
    kind: str = "chat.completion"

    def whole(self, place: int, done: Completion) -> dict[str, Any]:
        """A choice of an answer that is sent at once."""
        message: dict[str, Any] = {"role": "assistant", "content": done.text, "refusal": None}
        if self.forced:
            message |= {"content": None, "tool_calls": [self.forced.call(done.text or "")]}
        return {
            "index": place,
            "message": message,
            "logprobs": self._logprobs(done.tokens),
            "finish_reason": self._reason(FINISH.get(done.finish_reason, "length")),
        }

    def begin(self, place: int) -> dict[str, Any] | None:
        """Who speaks."""
        called = {"content": None, "tool_calls": [{"index": 0, **self.forced.call("")}]} if self.forced else {}
        return self._delta(place, {"role": "assistant", "content": "", **called})

    def piece(self, place: int, said: str, tokens: Tokens) -> dict[str, Any]:
        """A further piece."""
        called = {"tool_calls": [{"index": 0, "function": {"arguments": said}}]}
        return self._delta(
            place, called if self.forced else {"content": said}, self._logprobs(tokens) if len(tokens.ids) else None
        )

    def says(self, choice: dict[str, Any]) -> bool:
        """Whether a piece has any text."""
        delta = choice["delta"]
        return bool(delta["tool_calls"][0]["function"]["arguments"] if self.forced else delta["content"])

    def end(self, place: int, reason: str) -> dict[str, Any]:
        """The last piece, without text."""
        return self._delta(place, {}, reason=self._reason(reason))

    def _reason(self, reason: str) -> str:
        return self.forced.complete if self.forced and reason == "stop" else reason

    def _delta(self, place: int, delta: Any, logprobs: Any = None, reason: str | None = None) -> dict[str, Any]:
        return {"index": place, "delta": delta, "logprobs": logprobs, "finish_reason": reason}

    def _logprobs(self, tokens: Tokens) -> dict[str, Any] | None:
        return None if self.best is None else {"content": self.texts.chat(tokens, self.best), "refusal": None}


@dataclasses.dataclass(frozen=True)
class Chat:
    """What a request for a chat says."""

    messages: list[dict[str, Any]]
    template: dict[str, Any]
    options: dict[str, Any]
    new: tuple[str, int | None]
    samples: int
    seed: int | None
    stream: tuple[bool, bool, bool]
    best: int | None
    shape: Wanted
    forced: Forced | None


def read_chat(fields: Fields, service: Service) -> Chat:
    """Read a request for a chat. Raises `Refusal`."""
    model_of(fields, service)
    messages, template, forced = template_of(fields)
    options = sampling_of(fields, service.model.stored_generation_config, service.model.config.vocab_size)
    new = max_tokens_of(fields)
    samples = fields.take("n", integer(1), "So many answers.", 1)
    check_samples(samples, service)
    seed, stream = seed_of(fields), stream_of(fields)
    best = _logprobs(fields, service)
    fields.take("modalities", only(["text"]), "Texts are all there is.")
    shape = shape_of(fields)
    if shape and forced:
        raise Refusal(f"tool_choice: a call and {shape[0]} exclude each other", param="tool_choice")
    shape = forced.wanted if forced else shape
    fields.end(IGNORED)
    return Chat(messages, template, options, new, samples, seed, stream, best, shape, forced)


async def chat_completions(service: Service, chat: Chat) -> Any:
    """Answer a chat. Raises `Refusal`."""
    options = chat.options | await service.shapes.option(chat.shape, chat.options)
    seed = fresh_seed() if chat.seed is None else chat.seed
    ids = await service.prompts(lambda: service.encoded("messages", chat.messages, **chat.template))
    options |= {"seed": seed, "top_logprobs": chat.best or None}
    new, prompts = (*chat.new, None), [Prompt(ids, "")]
    calls = await service.submitted("messages", prompts, new, chat.samples, **options)
    form = ChatForm(service.texts, chat.best, chat.forced)
    asked = Asked(service, calls, form, len(ids), seed, chat.stream, "chat.completion.chunk")
    return await asked.answer()


def max_tokens_of(fields: Fields) -> tuple[str, int | None]:
    """The field that says how many new tokens there are at most, and what it says."""
    names = ("max_completion_tokens", "max_tokens")
    given = {
        name: value
        for name in names
        if (value := fields.take(name, integer(1), "The most new tokens; as many as fit if it is not given."))
        is not None
    }
    if len({*given.values()}) > 1:
        raise Refusal("max_tokens and max_completion_tokens say different things", param="max_tokens")
    return next(iter(given.items()), ("max_tokens", None))


def check_samples(count: int, service: Service) -> None:
    """Raise `Refusal` for more samples than one request may ask for."""
    if count > service.limits.samples:
        raise Refusal(f"n={count}; at most {service.limits.samples}", param="n")


def check_best(name: str, best: int, service: Service) -> None:
    """Raise `Refusal` for more alternatives than the engine keeps."""
    if best > service.engine.top_logprobs:
        raise Refusal(f"{name}={best}; this server keeps {service.engine.top_logprobs}", param=name)


def _logprobs(fields: Fields, service: Service) -> int | None:
    wanted = fields.take("logprobs", flag, "Whether the answer has log-probabilities.", False)
    best = fields.take("top_logprobs", integer(0), "With so many of the likeliest tokens each.", 0)
    if best and not wanted:
        raise Refusal("top_logprobs needs logprobs=true", param="top_logprobs")
    check_best("top_logprobs", best, service)
    return best if wanted else None


def template_of(fields: Fields) -> tuple[list[dict[str, Any]], dict[str, Any], Forced | None]:
    """The messages, what the template is told beside them, and the call that must come, if any."""
    messages = fields.need("messages", each(inside(_message), least=1), "The chat until now.")
    tools = fields.take("tools", each(unchanged(inside(_tool))), "Functions that the template tells of.") or None
    says = "Whether the template is told of the tools; or which of them must be called, 'required' where there is one."
    choice = fields.take("tool_choice", CHOICE, says)
    fields.take("parallel_tool_calls", flag, "Changes nothing.")
    told = fields.take("chat_template_kwargs", mapping, "What else the template is told.", {})
    if strange := _OURS & told.keys():
        raise Refusal(f"chat_template_kwargs: {min(strange)} is not a template's", param="chat_template_kwargs")
    goes_on = fields.take("continue_final_message", flag, "Go on with the last message.", False)
    prompts = fields.take("add_generation_prompt", flag, "Whether a new message begins.", not goes_on)
    if goes_on and prompts:
        raise Refusal(
            "continue_final_message and add_generation_prompt exclude each other", param="add_generation_prompt"
        )
    told = {**told, "continue_final_message": goes_on, "add_generation_prompt": prompts}
    return messages, {**told, "tools": None if choice == "none" else tools}, forced_by(choice, tools)


def _tool(fields: Fields) -> None:
    fields.need("function", inside(lambda function: function.need("name", text, "Its name.")), "What can be called.")


def _message(fields: Fields) -> dict[str, Any]:
    """A message as templates know them."""
    role = fields.need("role", one_of(*_ROLES), "Who speaks.")
    calls = fields.take("tool_calls", each(_CALL), "The functions that the model called.")
    said: dict[str, Any] = {"role": "system" if role == "developer" else role}
    said["content"] = fields.take("content", _CONTENT, "What is said.", "" if calls else None)
    if calls:
        said["tool_calls"] = calls
    others = {"name": "The speaker's name.", "tool_call_id": "Which call it answers."}
    for other, says in {**others, "reasoning_content": "What the model thought before it."}.items():
        if (value := fields.take(other, text, says)) is not None:
            said[other] = value
    fields.end(("refusal", "annotations", "audio", "function_call"))
    if said["content"] is None:
        fields.missing("content")
    return said


def _part(fields: Fields) -> str:
    """What a part of a message says; OpenAI has others than texts."""
    if (kind := fields.take("type", text, "The kind of a part: text.", "text")) not in ("text", "input_text"):
        where = fields.where.rpartition("[")[0]
        raise Refusal(f"{fields.full('type')}={shown(kind)}: this model reads texts only", param=where)
    return fields.need("text", text, "What it says.")


_PARTS = each(inside(_part))


def _content(name: str, value: Any) -> str:
    """A text, or OpenAI's list of parts, all of which must be texts."""
    return "".join(_PARTS(name, value)) if isinstance(value, list) else text(name, value)


def _call(name: str, call: Any) -> dict[str, Any]:
    """A call of a tool, with its arguments as an object."""
    function = {**_CALLED(name, call)}
    if "arguments" in function:
        function["arguments"] = arguments_of(f"{name}.function.arguments", function["arguments"])
    return {**call, "function": function}


_CONTENT = Check(_content, lambda: {"anyOf": [text.says(), _PARTS.says()]}, text.example)
_CALLED = inside(lambda fields: fields.need("function", mapping, "Its name, and its arguments as JSON."))
_CALL = Check(_call, _CALLED.says, _CALLED.example)
