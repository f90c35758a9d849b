"""Chat templates: programs that a repository brings, rendered in a process of their own, which can be ended."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.bounded import Program
from jaxgen.errors import JaxgenError, UnsupportedError

SECONDS = 5  # of a processor, for one chat
_CHARACTERS = 4_000_000  # of a chat as text
_PROGRAM = Program(Path(__file__).with_name("template_process.py"))
# What a template cannot see, and so cannot be asked to respect.
_REFUSED = ("sanitize_control_tokens", "return_assistant_tokens_mask")


def has_template_of_jinja(tokenizer: Any) -> bool:
    """Whether this is a tokenizer of transformers that writes chats by its template, rather than in its own way."""
    owners = [kind.__module__ for kind in type(tokenizer).__mro__ if "apply_chat_template" in vars(kind)]
    theirs = [owner for owner in owners if not owner.startswith("jaxgen.")]  # ours only add to it
    return theirs[:1] == ["transformers.tokenization_utils_base"]


def apply_chat_template(
    tokenizer: Any,
    chat: Sequence[Mapping[str, Any]],
    *,
    tokenizer_kwargs: Mapping[str, Any] | None = None,
    **options: Any,
) -> Any:
    """The tokenizer's output for a chat, as from its method of this name, and within bounds; see `chat_text`."""
    of_tokenizer = {name: options.pop(name) for name in _OF_TOKENIZER if name in options}
    text = chat_text(tokenizer, chat, **options)
    return tokenizer(text, add_special_tokens=False, **of_tokenizer, **(tokenizer_kwargs or {}))


def chat_text(
    tokenizer: Any,
    chat: Sequence[Mapping[str, Any]],
    *,
    tools: Any = None,
    documents: Any = None,
    chat_template: str | None = None,
    continue_final_message: bool | str = False,
    **options: Any,
) -> str:
    """A chat as text, as from the tokenizer's `apply_chat_template` with `tokenize=False`, and within bounds.

    The template may take 5 seconds of a processor, 1 GB of memory (on Linux), and write 4 million characters. Raises
    `JaxgenError` for one that takes more, or fails. Source: transformers `apply_chat_template`.
    """
    if refused := [name for name in _REFUSED if options.pop(name, None)]:
        raise UnsupportedError(f"{refused[0]} is not supported here; call tokenizer.apply_chat_template for the ids")
    return _render(
        conversations=[[{name: value for name, value in message.items() if value is not None} for message in chat]],
        tools=None if tools is None else [_schema(tool) for tool in tools],
        documents=documents,
        chat_template=tokenizer.get_chat_template(chat_template, tools),
        continue_final_message=continue_final_message,
        **{**tokenizer.special_tokens_map, **options},
    )


_OF_TOKENIZER = ("padding", "truncation", "max_length", "return_tensors")


def _schema(tool: Any) -> Any:
    from transformers.utils.chat_template_utils import get_json_schema

    return get_json_schema(tool) if callable(tool) else tool


def _render(**request: Any) -> str:
    """The text that transformers' `render_jinja_template` writes; raises `JaxgenError`."""
    answer = _PROGRAM.ask({**request, "characters": _CHARACTERS}, SECONDS, default=_plain)
    if "error" in answer:
        raise JaxgenError(answer["error"])
    return answer["text"]


def _plain(value: Any) -> Any:
    """What a template sees of an object that JSON does not know; as in transformers."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return dict(value)
    return value.item() if isinstance(value, np.generic) else f"<{type(value).__name__}>"
