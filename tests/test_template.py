"""Chat templates: transformers' text, or one typed error, in bounded time and memory, whatever a template does."""

import os
import random
import signal
from typing import Any

import pytest

from jaxgen import JaxgenError, UnsupportedError, demo
from jaxgen.text import template
from jaxgen.text.inputs import encode
from jaxgen.text.tokenizer import load_tokenizer
from tests.mutate import mutate_text

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is <|x|> 1 + 1? é"},
    {"role": "assistant", "content": " It is 2. ", "tool_calls": None},
    {"role": "user", "content": "Sure?"},
]
CHATML = (
    "{%- for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim }}"
    "{{ '<|im_end|>\\n' }}{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
TEMPLATES = {
    "demo": None,
    "chatml": CHATML,
    "mistral": (
        "{{ bos_token }}{% set ns = namespace(n=0) %}{% for message in messages %}{% if message.role == 'user' %}"
        "{{ '[INST] ' ~ message.content ~ ' [/INST]' }}{% set ns.n = ns.n + 1 %}{% elif message.role == 'system' %}"
        "{% continue %}{% else %}{% generation %}{{ message.content ~ eos_token }}{% endgeneration %}{% endif %}\n"
        "    {% if loop.last %}{% break %}{% endif %}{% endfor %}{{ ns.n }}"
    ),
    "tools and documents": (
        "{{ tools | tojson(indent=1) }}{% for d in documents %}{{ d.title }}{% endfor %}{{ strftime_now('%Y') }}"
        "{{ messages | length }}{{ extra | default('nothing') }}"
    ),
}  # fmt: skip


def current_weather(city: str) -> str:
    """
    The weather.

    Args:
        city: where
    """
    return city


@pytest.fixture
def tokenizer() -> Any:
    return load_tokenizer(demo.path())


@pytest.fixture
def quickly(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(template, "SECONDS", 0.5)


def theirs(tokenizer: Any, chat: list[dict[str, Any]] = CHAT, **options: Any) -> Any:
    options = {"add_generation_prompt": True} | options
    return dict(tokenizer.apply_chat_template(chat, tokenize=True, return_dict=True, **options))


@pytest.mark.parametrize("name", TEMPLATES)
def test_ids_are_those_of_transformers(tokenizer, name):
    tokenizer.chat_template = TEMPLATES[name] or tokenizer.chat_template
    given: dict[str, Any] = {
        "tools": [current_weather, {"type": "function"}],
        "documents": [{"title": "t", "text": "x"}],
    }
    assert dict(encode(tokenizer, CHAT, **given)) == theirs(tokenizer, **given)
    given |= {"extra": (1, None, "x"), "truncation": True, "max_length": 9}
    assert dict(encode(tokenizer, CHAT, **given)) == theirs(tokenizer, **given)
    assert dict(encode(tokenizer, CHAT, chat_template=CHATML)) == theirs(tokenizer, chat_template=CHATML)
    if name in ("demo", "chatml"):
        begun = CHAT[:3]
        expected = theirs(tokenizer, begun, add_generation_prompt=False, continue_final_message=True)
        assert dict(encode(tokenizer, begun)) == expected


def test_tokenizers_that_write_chats_in_their_own_way(tokenizer):
    class Own(type(tokenizer)):
        def apply_chat_template(self, chat: Any, **options: Any) -> Any:
            return {"input_ids": [len(chat)], "options": sorted(options)}

    tokenizer.__class__ = Own
    options = ["add_generation_prompt", "continue_final_message", "return_dict", "tokenize"]
    assert encode(tokenizer, CHAT) == {"input_ids": [4], "options": options}


def test_one_of_several_templates(tokenizer):
    tokenizer.chat_template = {"default": CHATML, "tool_use": "tools {{ messages[0].content }}", "other": "o"}
    given: dict[str, Any]
    for given in ({}, {"tools": [current_weather]}, {"chat_template": "other"}):
        assert dict(encode(tokenizer, CHAT, **given)) == theirs(tokenizer, **given)


def test_what_a_template_sees_is_plain(tokenizer):
    """As in the newest transformers; older ones hand over objects, and keys without a value."""
    tokenizer.chat_template = "{{ messages[0].content[0].image }} {{ 'name' in messages[0] }}"
    chat = [{"role": "user", "content": [{"image": object()}], "name": None}]
    assert tokenizer.decode(encode(tokenizer, chat)["input_ids"]) == "<object> False"


BOMBS = {
    "a long text": "{{ 'a' * 10**11 }}",
    "a padded text": "{{ 'a'.ljust(10**11) }}",
    "a formatted text": "{{ '%99999999999d' % 1 }}",
    "a text that doubles": "{% set n = namespace(x=1) %}{% for i in range(99) %}{% set n.x = n.x ~ n.x %}{% endfor %}",
    "loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% for k in range(99999) %}" + "{% endfor %}" * 3,
    "a power": "{{ 7 ** (10 ** 9) }}",
    "much output": "{% for i in range(99999) %}{{ messages[0].content * 50 }}{% endfor %}",
    "a macro of itself": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "deep nesting": "{{ " + "(" * 50_000 + "1" + ")" * 50_000 + " }}",
    "a deep list": "{{ " + "[" * 3_000 + "]" * 3_000 + " }}",
}


@pytest.mark.parametrize("bomb", BOMBS)
def test_bombs_end_and_the_next_chat_is_written(tokenizer, quickly, bomb):
    expected = theirs(tokenizer)
    with pytest.raises(
        JaxgenError, match=r"checkpoint: the tokenizer's chat template cannot write this chat: ."
    ) as caught:
        encode(tokenizer, CHAT, chat_template=BOMBS[bomb])
    assert len(str(caught.value)) < 800
    assert dict(encode(tokenizer, CHAT)) == expected


FAULTS = {
    "{{ 1 // 0 }}": "ZeroDivisionError: ",
    "{{ messages + 1 }}": "TypeError: ",
    "{{ nothing.x }}": "'nothing' is undefined",
    "{% for %}": "Expected",
    "{{ raise_exception('roles must alternate') }}": "roles must alternate",
    "{{ ''.__class__.__mro__ }}": "is unsafe",
    "{{ messages.append(1) }}": "is unsafe",
    "{{ '%d' % 'x' }}": "TypeError: ",
    "{{ (10.0 ** 300) ** 2 }}": "OverflowError: ",
    "{% include 'other' %}": "no loader",
    "{{ 9 ** 99999 }}": "integer string conversion",
}


@pytest.mark.parametrize("fault", FAULTS)
def test_whatever_a_template_raises_is_one_error(tokenizer, fault):
    tokenizer.chat_template = fault
    with pytest.raises(JaxgenError, match=rf"cannot write this chat: .*{FAULTS[fault]}"):
        encode(tokenizer, CHAT)


def test_what_needs_the_template_itself_is_refused(tokenizer):
    for name in ("sanitize_control_tokens", "return_assistant_tokens_mask"):
        with pytest.raises(UnsupportedError, match=f"{name} is not supported here"):
            encode(tokenizer, CHAT, **{name: True})


def test_the_program_may_be_killed_at_any_time(tokenizer):
    expected = dict(encode(tokenizer, CHAT))
    assert template._PROGRAM._running is not None
    os.kill(template._PROGRAM._running._popen.pid, signal.SIGKILL)
    try:
        assert dict(encode(tokenizer, CHAT)) == expected
    except JaxgenError as error:  # it had not ended yet
        assert "exit status -9" in str(error)
    assert dict(encode(tokenizer, CHAT)) == expected


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::SyntaxWarning")  # of escapes in texts
def test_damaged_templates_do_what_they_do_in_transformers(tokenizer, quickly):
    draw, written = random.Random(0), 0
    for _ in range(300):
        tokenizer.chat_template = mutate_text(draw, draw.choice([CHATML, TEMPLATES["mistral"]]))
        try:
            ours = dict(encode(tokenizer, CHAT))
        except JaxgenError:
            with pytest.raises(Exception):  # noqa: B017  (any at all)
                theirs(tokenizer)
        else:
            assert ours == theirs(tokenizer)
            written += 1
    assert 30 < written < 270
