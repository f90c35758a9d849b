"""JSON schemas of what a server answers; those of what it is asked come from the code that reads it."""

from typing import Any

from jaxgen.serve.checks import Schema

TEXT, NUMBER, COUNT = {"type": "string"}, {"type": "number"}, {"type": "integer", "minimum": 0}
NULL: Schema = {"type": "null"}


def _object(optional: dict[str, Any] | None = None, /, **needed: Any) -> Schema:
    properties = {**needed, **(optional or {})}
    return {"type": "object", "properties": properties, "required": [*needed], "additionalProperties": False}


def _list(items: Schema) -> Schema:
    return {"type": "array", "items": items}


def _or_null(schema: Schema) -> Schema:
    return {"anyOf": [schema, NULL]}


def ref(name: str) -> Schema:
    """What stands among the components under a name."""
    return {"$ref": f"#/components/schemas/{name}"}


def _frame(kind: str) -> dict[str, Schema]:
    return {
        "id": TEXT,
        "object": {"const": kind},
        "created": COUNT,
        "model": TEXT,
        "system_fingerprint": {"type": "string", "description": "A hash of what the last bits depend on."},
    }


_SEED = {"type": "integer", "description": "The seed: that of the request, or a fresh one."}
_FINISH = {"enum": ["stop", "length"]}
_CHAT_FINISH = {"enum": ["stop", "length", "tool_calls"]}
_CALL = {"id": TEXT, "type": {"const": "function"}}
_CALL_PIECE = _object({**_CALL, "function": _object({"name": TEXT}, arguments=TEXT)}, index=COUNT)
_BYTES = _list({"type": "integer", "minimum": 0, "maximum": 255})
_ONE = {"token": TEXT, "logprob": NUMBER, "bytes": _BYTES}
_CHAT_LOGPROBS = _or_null(_object(content=_list(_object(**_ONE, top_logprobs=_list(_object(**_ONE)))), refusal=NULL))
_COMPLETION_LOGPROBS = _or_null(
    _object(
        tokens=_list(TEXT),
        token_logprobs=_list(_or_null(NUMBER)),
        top_logprobs=_list(_or_null({"type": "object", "additionalProperties": NUMBER})),
        text_offset=_list(COUNT),
    )
)


def _choice(**said: Schema) -> Schema:
    return _list(_object(index=COUNT, **said))


def _chunk(kind: str, choices: Schema) -> Schema:
    return _object({"usage": _or_null(ref("Usage")), "seed": _SEED}, **_frame(kind), choices=choices)


_TGI_TOKEN = _object(id=COUNT, text=TEXT, logprob=NUMBER, special={"type": "boolean"})
_TGI_DETAILS = {
    "finish_reason": {"enum": ["eos_token", "stop_sequence", "length"]},
    "generated_tokens": COUNT,
    "seed": _or_null({"type": "integer"}),
}
_TGI_PREFILL = _list(_object(id=COUNT, text=TEXT, logprob=_or_null(NUMBER)))
_TGI_TOP = {"top_tokens": _list(_TGI_TOKEN)}

SCHEMAS: dict[str, Schema] = {
    "Error": _object(
        error=_object(
            message=TEXT,
            type=TEXT,
            param={"type": ["string", "null"], "description": "The field that is wrong."},
            code=_or_null(TEXT),
        )
    ),
    "Usage": _object(prompt_tokens=COUNT, completion_tokens=COUNT, total_tokens=COUNT),
    "ChatCompletion": _object(
        **_frame("chat.completion"),
        choices=_choice(
            message=_object(
                {"tool_calls": _list(_object(**_CALL, function=_object(name=TEXT, arguments=TEXT)))},
                **{"role": {"const": "assistant"}, "content": _or_null(TEXT), "refusal": NULL},
            ),
            logprobs=_CHAT_LOGPROBS,
            finish_reason=_CHAT_FINISH,
        ),
        usage=ref("Usage"),
        seed=_SEED,
    ),
    "ChatCompletionChunk": _chunk(
        "chat.completion.chunk",
        _choice(
            delta=_object(
                {"role": {"const": "assistant"}, "content": _or_null(TEXT), "tool_calls": _list(_CALL_PIECE)}
            ),
            logprobs=_CHAT_LOGPROBS,
            finish_reason=_or_null(_CHAT_FINISH),
        ),
    ),
    "Completion": _object(
        **_frame("text_completion"),
        choices=_choice(text=TEXT, logprobs=_COMPLETION_LOGPROBS, finish_reason=_FINISH),
        usage=ref("Usage"),
        seed=_SEED,
    ),
    "CompletionChunk": _chunk(
        "text_completion",
        _choice(text=TEXT, logprobs=_COMPLETION_LOGPROBS, finish_reason=_or_null(_FINISH)),
    ),
    "Generated": _object(
        {
            "details": _object(
                {"top_tokens": _list(_list(_TGI_TOKEN))},
                **_TGI_DETAILS,
                prefill=_TGI_PREFILL,
                tokens=_list(_TGI_TOKEN),
            )
        },
        generated_text=TEXT,
    ),
    "GeneratedToken": _object(
        {"index": COUNT, "token": _TGI_TOKEN, **_TGI_TOP},
        generated_text=_or_null(TEXT),
        details=_or_null(_object(**_TGI_DETAILS, input_length=COUNT)),
    ),
    "GenerateError": _object(error=TEXT, error_type=TEXT),
    "Tokens": _object(tokens=_list(COUNT), count=COUNT, max_model_len=COUNT, token_strs=_list(TEXT)),
    "Text": _object(prompt=TEXT),
    "Models": _object(object={"const": "list"}, data=_list(ref("Model"))),
    "Model": _object(
        id=TEXT,
        object={"const": "model"},
        created=COUNT,
        owned_by=TEXT,
        max_model_len=COUNT,
        max_top_logprobs=COUNT,
        system_fingerprint=TEXT,
        fingerprint_of={"type": "object", "description": "What `system_fingerprint` is a hash of."},
    ),
    "Info": _object(
        **dict.fromkeys(("model_id", "model_dtype", "model_device_type", "router", "version"), TEXT),
        system_fingerprint=TEXT,
        **dict.fromkeys(("max_total_tokens", "max_input_tokens", "max_concurrent_requests"), COUNT),
        **dict.fromkeys(("max_stop_sequences", "max_best_of"), COUNT),
    ),
    "State": _object(status={"enum": ["alive", "ready", "compiling", "closing", "failed"]}),
    "Record": {"type": "object", "description": "The record of an answer, which `jaxgen replay` runs again."},
}
