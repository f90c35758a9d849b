"""What may be continued: a text, a chat, or a list of either; and its ids."""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

from jaxgen.errors import JaxgenError
from jaxgen.text import template
from jaxgen.text.template import has_template_of_jinja
from jaxgen.text.tokenizer import telling

Messages = list[dict[str, Any]]  # a chat: each message has "role" and "content"


def is_message(value: object) -> bool:
    """Whether this is a message of a chat."""
    return isinstance(value, Mapping) and "role" in value and "content" in value


def is_chat(value: object) -> bool:
    """Whether this is a chat: a list of messages, not empty."""
    return isinstance(value, list | tuple) and len(value) > 0 and is_message(value[0])


def checked_texts(texts: Any) -> tuple[list[str | Messages], bool]:
    """The texts and chats in a list, and whether only one was given, by itself.

    Raises `JaxgenError` for anything else, naming the place.
    """
    single = isinstance(texts, str) or is_chat(texts)
    if not single and not isinstance(texts, list | tuple):
        raise JaxgenError(f"{type(texts).__name__} is neither a text nor a chat, nor a list of these")
    return [checked_text(text, row) for row, text in enumerate([texts] if single else texts)], single


def checked_text(text: Any, row: int = 0) -> str | Messages:
    """One text or chat, checked; `row` is named in errors. Raises `JaxgenError`."""
    if isinstance(text, str):
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise JaxgenError(f"text {row}: {text!r} is not Unicode text: {error}") from error
        return text
    if not is_chat(text):
        raise JaxgenError(f"text {row}: {text!r} is neither a string nor a list of messages with 'role' and 'content'")
    for place, message in enumerate(text):
        if not is_message(message):
            raise JaxgenError(f"text {row}: message {place} is {message!r}; it needs a 'role' and a 'content'")
    return list(text)


def continues_final_message(chat: Sequence[Mapping[str, Any]], asked: bool | None = None) -> bool:
    """Whether the answer goes on from the last message: if asked, or else if that is the assistant's, as in HF."""
    return chat[-1]["role"] == "assistant" if asked is None else asked


def encode(tokenizer: Any, text: str | Messages, continue_final_message: bool | None = None, **options: Any) -> Any:
    """The tokenizer's `input_ids` and `attention_mask` (lists) of a text, or of a chat through its template.

    `options` go to the tokenizer, or to `apply_chat_template` (`tools`, for instance). Raises `JaxgenError` for a
    chat where there is no template, or where the template refuses it, fails, or takes too long.
    """
    if isinstance(text, str):
        with telling(f"{_where(tokenizer)}the tokenizer cannot encode this text"):
            return tokenizer(text, **options)
    goes_on = continues_final_message(text, continue_final_message)
    options = {"add_generation_prompt": not goes_on, "continue_final_message": goes_on} | options
    with _writing(tokenizer):
        if has_template_of_jinja(tokenizer):
            return template.apply_chat_template(tokenizer, text, **options)
        return tokenizer.apply_chat_template(text, tokenize=True, return_dict=True, **options)


def chat_text(tokenizer: Any, chat: Messages, **options: Any) -> str:
    """The text of a chat, by the tokenizer's template. Raises as `encode`."""
    with _writing(tokenizer):
        if has_template_of_jinja(tokenizer):
            return template.chat_text(tokenizer, chat, **options)
        return tokenizer.apply_chat_template(chat, tokenize=False, **options)


def _writing(tokenizer: Any) -> contextlib.AbstractContextManager[None]:
    return telling(f"{_where(tokenizer)}the tokenizer's chat template cannot write this chat")


def _where(tokenizer: Any) -> str:
    return f"{place}: " if (place := getattr(tokenizer, "name_or_path", None)) else ""
