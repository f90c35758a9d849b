"""Bodies that a server may be sent, and what is wrong with its answers."""

import json
import random
from typing import Any

from jsonschema import Draft202012Validator

import jaxgen
from jaxgen import demo
from jaxgen.serve.service import Limits, Service
from jaxgen.text.tokenizer import tokenizer_for
from tests.mutate import mutate_bytes, mutate_json

_CALL = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
_TOOL = {"type": "function", "function": {"name": "f", "description": "", "parameters": {"type": "object"}}}
_NO_PARAMETERS = {"type": "function", "function": {"name": "g"}}
_SCHEMA = {"type": "object", "properties": {"a": {"enum": ["x", 1]}}, "required": ["a"], "additionalProperties": False}
_PARTS = [{"type": "text", "text": "1, "}, {"type": "text", "text": "2"}]
_OFTEN = {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "min_p": 0.1, "seed": 1, "stop": ["zz"], "logit_bias": {"5": 1}}
_OFTEN |= {"frequency_penalty": 0.1, "presence_penalty": -0.1, "repetition_penalty": 1.1, "min_tokens": 1, "n": 2}
_STREAMED = {"stream": True, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
_NAMED = {"name": "x", "strict": True, "schema": _SCHEMA}

# Valid ones, of every route and every field.
BODIES: list[tuple[str, dict[str, Any]]] = [
    ("/v1/chat/completions", {"messages": [{"role": "user", "content": "1"}], "max_tokens": 2, **_OFTEN}),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "system", "content": _PARTS}, {"role": "user", "content": "é"}],
            **{"model": "demo", "max_completion_tokens": 3, "logprobs": True, "top_logprobs": 2, **_STREAMED},
            **{"tools": [_TOOL], "tool_choice": "none", "user": "me", "metadata": {"a": "b"}, "modalities": ["text"]},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [
                {"role": "user", "content": "1", "name": "me"},
                {"role": "assistant", "tool_calls": [_CALL], "content": None},
                {"role": "tool", "content": "2", "tool_call_id": "1"},
                {"role": "assistant", "content": "3"},
            ],
            **{"continue_final_message": True, "chat_template_kwargs": {"x": 1}, "max_tokens": 1, "temperature": 0},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "1"}],
            "response_format": {"type": "json_schema", "json_schema": _NAMED},
            "max_tokens": 20,
        },
    ),
    (
        "/v1/chat/completions",
        {
            **{"messages": [{"role": "user", "content": "1"}], "max_tokens": 20, "tools": [_NO_PARAMETERS]},
            **{"tool_choice": {"type": "function", "function": {"name": "g"}}, "logprobs": True, "n": 2, **_STREAMED},
        },
    ),
    (
        "/v1/chat/completions",
        {
            "messages": [{"role": "user", "content": "1"}],
            **{"tools": [_NO_PARAMETERS], "tool_choice": "required", "parallel_tool_calls": False, "max_tokens": 20},
        },
    ),
    ("/v1/completions", {"prompt": "1, 2, 3", "max_tokens": 2, "logprobs": 2, "echo": True, **_OFTEN}),
    ("/v1/completions", {"prompt": [[1, 5], [1, 7, 9]], "max_tokens": 0, "echo": True, "logprobs": 1}),
    ("/v1/completions", {"prompt": ["1", "2"], "max_tokens": 3, "ignore_eos": True, "logprobs": 1, **_STREAMED}),
    (
        "/v1/completions",
        {
            **{"prompt": [1, 5, 7], "max_tokens": 9, "best_of": 1, "suffix": "", "add_special_tokens": False},
            **{"stop_token_ids": [5], "include_stop_str_in_output": True, "skip_special_tokens": False},
            "structured_outputs": {"regex": "[ab]{2}"},
        },
    ),
    ("/generate", {"inputs": "1, 2", "parameters": {"max_new_tokens": 2, "details": True, "top_n_tokens": 2}}),
    (
        "/generate",
        {
            "inputs": "1, 2",
            "stream": False,
            "parameters": {
                **{"do_sample": True, "temperature": 0.5, "top_k": 3, "top_p": 0.9, "typical_p": 0.9, "seed": 3},
                **{"repetition_penalty": 1.1, "stop": ["zz"], "best_of": 1, "watermark": False, "truncate": 3},
                **{"return_full_text": True, "decoder_input_details": True, "max_new_tokens": 9},
                "grammar": {"type": "json", "value": _SCHEMA},
            },
        },
    ),
    ("/generate_stream", {"inputs": "1, 2", "parameters": {"max_new_tokens": 3, "top_n_tokens": 1, "details": True}}),
    ("/tokenize", {"prompt": "1, 2", "add_special_tokens": False, "return_token_strs": True, "model": "demo"}),
    ("/tokenize", {"messages": [{"role": "user", "content": "1"}], "add_generation_prompt": False, "tools": [_TOOL]}),
    ("/detokenize", {"tokens": [1, 5, 7], "model": "demo"}),
]
TYPES = ["application/json"] * 9 + ["text/plain", "application/octet-stream", "application/json; charset=utf-16", ""]


def served(slots: int, limits: Limits) -> Service:
    """The demo as a server, with a template that these bodies may name."""
    model = jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    tokenizer = tokenizer_for(model)
    tokenizer.chat_template = TEMPLATE
    return Service(jaxgen.Engine(model, tokenizer, rows=4, slots=slots, chunk=16, top_logprobs=5), "demo", limits)


def mutated(draw: random.Random) -> tuple[str, bytes, str]:
    """A route, a body for it with something wrong, mostly, and what it says it is."""
    path, body = draw.choice(BODIES)
    kind, data = draw.randrange(13), json.dumps(body).encode()
    if kind < 7:
        data = mutate_json(draw, body).encode()
    elif kind < 9:  # some fields of another one
        other = draw.choice([each for there, each in BODIES if there == path])
        data = json.dumps(body | {name: other[name] for name in other if draw.random() < 0.3}).encode()
    elif kind < 10:
        data = mutate_bytes(draw, data)
    else:
        name = draw.choice([*body])
        data = json.dumps({**body, name: "HERE"}).encode().replace(b'"HERE"', draw.choice(_EXTREMES)(draw), 1)
    return path, data, draw.choice(TYPES)


_EXTREMES = (
    lambda draw: b"[" * (deep := 10 ** draw.randint(1, 4)) + b"]" * deep,
    lambda draw: b'{"a":' * (deep := 10 ** draw.randint(1, 3)) + b"1" + b"}" * deep,
    lambda draw: b"[" + b",".join([draw.choice((b"1", b'"a"', b"[1]", b"{}", b"null"))] * 9000) + b"]",
    lambda draw: b'"' + draw.choice(("a", "1, ", "é", " ", "\\u0000", "\\ud83d\\ude00", "(")).encode() * 3000 + b'"',
    lambda draw: draw.choice((b"NaN", b"-Infinity", b"1e999", b"-1e-999", b"1" * 5000, b"-" + b"9" * 300, b"0.1e-45")),
    lambda draw: b'"\xff\xfe"' if draw.random() < 0.5 else b'"\\ud800"',
    lambda draw: b'1, "seed": 2, "seed": [], "model": 1, "model": "demo"',  # keys that come again
    lambda draw: b"{" + b",".join(b'"%d": 1' % key for key in range(2000)) + b"}",
)


class Document:
    """What a server says of itself, to check its answers by."""

    def __init__(self, document: dict[str, Any]):
        self._document = document

    def valid(self, where: dict[str, Any], value: Any) -> bool:
        """Whether a value is as a `content` says."""
        return not [*self.errors(where["application/json"]["schema"], value)]

    def errors(self, schema: dict[str, Any], value: Any) -> list[str]:
        """What a schema, which may point into the document, finds wrong with a value."""
        validator = Draft202012Validator({**schema, "components": self._document["components"]})
        return [error.message[:300] for error in validator.iter_errors(value)]

    def accepts(self, path: str, body: Any) -> bool:
        """Whether a body is as it should be."""
        return self.valid(self._document["paths"][path]["post"]["requestBody"]["content"], body)

    def wrong(self, path: str, answer: Any, method: str = "post") -> list[str]:
        """What is wrong with an answer: its status, its type, its form, or that it says too much."""
        said = answer.text
        found = [secret for secret in (str(demo.path()), "Traceback", 'File "', "site-packages") if secret in said]
        response = self._document["paths"][path][method]["responses"].get(str(answer.status_code))
        if response is None or answer.status_code >= 500:
            return [*found, f"the status is {answer.status_code}"]
        kind = answer.headers["content-type"].partition(";")[0]
        if kind not in response["content"]:
            return [*found, f"{kind} is none of {[*response['content']]}"]
        if kind.startswith("text/") and method == "get":
            return found
        if kind == "application/json":
            return found + self.errors(response["content"][kind]["schema"], answer.json())
        return found + self._wrong_events(path, said)

    def _wrong_events(self, path: str, said: str) -> list[str]:
        lines = [line.removeprefix("data: ") for line in said.split("\n\n")[:-1]]
        chunks = {"/v1/chat/completions": "ChatCompletionChunk", "/v1/completions": "CompletionChunk"}
        schema = {"$ref": f"#/components/schemas/{chunks.get(path, 'GeneratedToken')}"}
        if path in chunks and lines.pop() != "[DONE]":
            return ["no [DONE] at the end"]
        return [error for line in lines for error in self.errors(schema, json.loads(line))]


# As real ones are: it shows tools and calls, and takes what it does not know for granted.
TEMPLATE = """{{ bos_token }}{% if tools %}{{ tools | tojson }}{% endif %}
{%- for message in messages %}{{ message.role + ": " + message.content }}
{%- for call in message.tool_calls or [] %}{{ call.function.name + call.function.arguments | tojson }}{% endfor %}
{%- endfor %}{% if add_generation_prompt %}{{ "assistant:" + (x | string if x else "") }}{% endif %}"""
