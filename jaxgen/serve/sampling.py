"""From the fields of a request, as OpenAI and vLLM name them, to the options of `Engine.submit`."""

import json
from typing import Any

from jaxgen.errors import JaxgenError, shown
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.serve.checks import Check, bad, each, flag, ids, integer, mapping, number, text, whole
from jaxgen.serve.fields import Fields, inside
from jaxgen.serve.refusal import Refusal

# What OpenAI keeps for itself, and what changes no token: these may be there, and are ignored.
IGNORED = frozenset(
    (
        *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
        *("prompt_cache_retention", "prediction"),
    )
)
MOST_STOPS, LONGEST_STOP, MOST_BIASES = 16, 500, 512
# Fields whose value decides which option has to say what is wrong with it.
_FIELD_OF = {
    "stop_strings": "stop",
    "sequence_bias": "logit_bias",
    "min_new_tokens": "min_tokens",
    "eos_token_id": "stop_token_ids",
}


def sampling_of(fields: Fields, stored: GenerationConfig, vocab_size: int) -> dict[str, Any]:
    """How to choose tokens: the options of `generate` that these fields ask for.

    What is not given is as the checkpoint's generation_config has it, or else as at OpenAI: tokens are drawn, at
    temperature 1, from all of them. Temperature 0 is greedy search.
    """
    temperature = fields.take("temperature", number("[0, inf)"), "0 is greedy search.", stored.temperature)
    filters = {
        "top_p": fields.take("top_p", number("(0, 1]"), "Draw from the likeliest tokens that have this share."),
        "top_k": fields.take(
            "top_k", integer(-1), "Draw from so many of the likeliest; 0 or -1: all.", stored.top_k or 0
        ),
        "min_p": fields.take("min_p", number("[0, 1]"), "Draw from what has this share of the likeliest one's."),
        "temperature": temperature,
    }
    filters["top_k"] = max(filters["top_k"], 0)  # -1 is vLLM's word for none
    options: dict[str, Any] = {"do_sample": temperature != 0}
    if options["do_sample"]:
        options |= {name: value for name, value in filters.items() if value is not None}
    repeated, each_time, once = "repetition_penalty", "frequency_penalty", "presence_penalty"
    least, bias = "No end before so many new tokens.", "What is added to the logits of tokens, by their ids."
    given = {
        repeated: fields.take(repeated, number("(0, inf)"), "As in transformers; the prompt's tokens count too."),
        each_time: fields.take(each_time, number("[-2, 2]"), "Is taken from a token's logit each time that it came."),
        once: fields.take(once, number("[-2, 2]"), "Is taken from a token's logit if it came."),
        "min_new_tokens": fields.take("min_tokens", integer(0), least),
        "sequence_bias": fields.take("logit_bias", _biases(vocab_size), bias),
        "stop_strings": stops_of(fields),
    }
    ends = fields.take("stop_token_ids", ids(vocab_size), "Further tokens that end a text.", [])
    if fields.take("ignore_eos", flag, "The model's end token does not end a text.", False):
        options["eos_token_id"] = None if not ends else tuple(ends)
    elif ends:
        options["eos_token_id"] = tuple(dict.fromkeys((*stored.eos_token_ids, *ends)))
    special, stop = "skip_special_tokens", "include_stop_str_in_output"
    texts = {
        special: fields.take(special, flag, "Whether texts leave out special tokens."),
        stop: fields.take(stop, flag, "Whether the text has the `stop` at its end.", False),
    }
    return options | {name: value for name, value in (given | texts).items() if value is not None}


def seed_of(fields: Fields) -> int | None:
    """The seed, an int of any size; None if none was given."""
    return fields.take("seed", whole, "The same seed gives the same text. Without one, the answer says which it was.")


def stream_of(fields: Fields) -> tuple[bool, bool, bool]:
    """Whether the answer is streamed, with its usage at the end, and with it in every event."""
    streams = fields.take("stream", flag, "Answer by events, as the text comes.", False)
    usage = fields.take("stream_options", inside(_usage), "What the events of a stream have.")
    if usage is not None and not streams:
        raise Refusal("stream_options needs stream=true", param="stream_options")
    at_end, every = usage or (False, False)
    return streams, at_end, every


def _usage(fields: Fields) -> tuple[bool, bool]:
    usage = fields.take("include_usage", flag, "Whether the last event has the usage.", False)
    every = fields.take("continuous_usage_stats", flag, "Whether each event has it.", False)
    fields.end(("include_obfuscation",))
    return usage, every


def with_field(error: JaxgenError, new: str) -> JaxgenError:
    """An error of the engine that begins with an option's name, as one of the field that it came from.

    `new` is the field of the most new tokens. What is wrong with a constraint by itself was said before.
    """
    name = str(error).partition("=")[0].partition(":")[0]
    field = {**_FIELD_OF, "max_new_tokens": new, "constraint": new}.get(name, name)
    if isinstance(error, Refusal) or type(error).__name__.startswith("Engine") or not field.isidentifier():
        return error
    return Refusal(f"{field}{str(error)[len(name) :].replace('max_new_tokens', new)}", param=field)


def stops_of(fields: Fields) -> list[str] | None:
    """The texts at which an answer ends. Raises `Refusal`."""
    stops = fields.take("stop", _texts, "Texts at which an answer ends.")
    if not stops:
        return None
    if len(stops) > MOST_STOPS:
        raise Refusal(f"stop: {len(stops)} texts; at most {MOST_STOPS}", param="stop")
    for place, stop in enumerate(stops):
        if not 0 < len(stop) <= LONGEST_STOP:
            raise Refusal(f"stop[{place}] has {len(stop)} characters; 1 to {LONGEST_STOP}", param="stop")
    return list(dict.fromkeys(stops))


def _text_or_texts(name: str, value: Any) -> list[str]:
    return [value] if isinstance(value, str) else each(text)(name, value)


_texts = Check(_text_or_texts, lambda: {"anyOf": [text.says(), each(text).says()]}, list)


def _biases(vocab_size: int) -> Check:
    """OpenAI's biases of single tokens, by their ids as texts."""
    bias = number("[-100, 100]")

    def test(name: str, value: Any) -> dict[tuple[int], float] | None:
        given = mapping(name, value)
        if len(given) > MOST_BIASES:
            raise Refusal(f"{name}: {len(given)} entries; at most {MOST_BIASES}", param=name)
        for token in given:
            if not (token.isascii() and token.isdecimal() and len(token) < 10 and int(token) < vocab_size):
                raise Refusal(f"{name}: {shown(token)} is no id of the {vocab_size} tokens", param=name)
        return {(int(token),): bias(name, value) for token, value in given.items()} or None

    says = {"type": "object", "propertyNames": {"pattern": "^[0-9]{1,9}$"}, "maxProperties": MOST_BIASES}
    return Check(test, lambda: {**says, "additionalProperties": bias.says()}, dict)


def arguments_of(name: str, value: Any) -> Any:
    """The arguments of a tool call, which clients send as JSON in a string, as templates want them: an object."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return bad(name, value, "JSON")
