"""What a text must look like: OpenAI's `response_format`, vLLM's `structured_outputs`, TGI's `grammar`."""

import asyncio
import concurrent.futures
from collections.abc import Callable
from typing import Any

import jaxgen
from jaxgen.constraints.anything import any_object
from jaxgen.constraints.patterns import Constraint
from jaxgen.engine.engine import Engine
from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.generation.options.config import resolve
from jaxgen.serve.checks import Check, each, flag, json_schema, one_of, only, text
from jaxgen.serve.fields import Fields, inside
from jaxgen.serve.refusal import Refusal

# The field that asks, and what makes its constraint: schemas may be large, and are read elsewhere.
Wanted = tuple[str, Callable[[], Constraint]] | None
MOST_WAITING, SECONDS = 16, 20.0  # constraints that are worked out at a time, and how long a client waits for one


class Shapes:
    """Works out constraints in a thread of its own, so that a schema of one client holds up no other one's text."""

    def __init__(self, engine: Engine):
        self._engine, self._waiting = engine, 0
        self._thread = concurrent.futures.ThreadPoolExecutor(1, "jaxgen constraints")

    async def option(self, wanted: Wanted, options: dict[str, Any]) -> dict[str, Any]:
        """The option `constraint` of a request with these other options, if it wants one. Raises `Refusal`."""
        if wanted is None:
            return {}
        field, make = wanted
        if self._waiting >= MOST_WAITING:
            raise Refusal(f"{field}: {self._waiting} others are being worked out", status=429, code="queue_full")
        self._waiting += 1
        job = self._thread.submit(self._checked, make, options)
        work = asyncio.wrap_future(job)
        work.add_done_callback(self._done)
        try:
            return {"constraint": await asyncio.wait_for(asyncio.shield(work), SECONDS)}
        except TimeoutError as error:
            if job.cancel():  # it never began, and now holds up nobody
                said = f"{field}: others were being worked out for {SECONDS:g} s; come again later"
                raise Refusal(said, param=field, status=429, code="queue_full") from error
            said = f"{field}: not worked out within {SECONDS:g} s; ask for something simpler"
            raise Refusal(said, param=field, code="timeout") from error
        except asyncio.CancelledError:  # nobody waits any more
            job.cancel()
            raise
        except Refusal:
            raise
        except JaxgenError as error:
            raise Refusal(f"{field}: {str(error).partition(': ')[2] or error}", param=field) from error

    def _checked(self, make: Callable[[], Constraint], options: dict[str, Any]) -> Constraint:
        """The constraint, whose automaton the engine can have: it is kept for those that come."""
        if (room := self._engine.room) is None:
            raise UnsupportedError("constraint: this server has no room for any")
        own = {name: options[name] for name in ("eos_token_id",) if name in options}
        constraint, config = make(), resolve(own, None, self._engine.model.stored_generation_config)
        room.automaton(constraint, self._engine.tokenizer, config.eos_token_ids)
        return constraint

    def _done(self, work: "asyncio.Future[Constraint]") -> None:
        self._waiting -= 1
        if not work.cancelled():
            work.exception()  # whoever waited has been told, or has gone

    def close(self) -> None:
        """Work out nothing more."""
        self._thread.shutdown(wait=False, cancel_futures=True)


def shape_of(fields: Fields) -> Wanted:
    """What OpenAI's or vLLM's field asks for. Raises `Refusal`."""
    one = fields.take("response_format", inside(_response_format), "OpenAI's way to ask for JSON.")
    other = fields.take("structured_outputs", inside(_structured_outputs), "vLLM's way to ask for a shape.")
    if one and other:
        raise Refusal("structured_outputs and response_format exclude each other", param="structured_outputs")
    return one or other


def grammar_of(fields: Fields) -> Wanted:
    """What TGI's `parameters.grammar` asks for. Raises `Refusal`."""
    return fields.take("grammar", inside(_grammar), "The shape of the text.")


def _grammar(fields: Fields) -> Wanted:
    kind = fields.need("type", one_of("json", "regex", "json_schema"), "What the value is.")
    checks = {"regex": text, "json_schema": inside(_named)}
    read = Check(checks.get(kind, json_schema), json_schema.says, json_schema.example)
    value = fields.need("value", read, "A JSON schema, one with a name, or a regular expression.")
    fields.end()
    if kind == "json_schema":
        return value
    name = fields.full("value")
    return _matching(name, value) if kind == "regex" else by_schema(name, value)


def _response_format(fields: Fields) -> Wanted:
    kind = fields.need("type", one_of("text", "json_object", "json_schema"), "Any text, any object, or a schema's.")
    named = fields.take("json_schema", inside(_named), "The schema, for the type of this name.")
    fields.end()
    if kind == "json_schema":
        return named or fields.missing("json_schema")
    if named:
        raise Refusal(
            f"{fields.full('json_schema')}: only for the type 'json_schema'", param=fields.full("json_schema")
        )
    return (fields.full("type"), any_object) if kind == "json_object" else None


def _structured_outputs(fields: Fields) -> Wanted:
    kinds = {
        "json": (json_schema, "JSON of a schema."),
        "regex": (text, "What a regular expression matches."),
        "choice": (each(text), "One of some texts."),
        "json_object": (only(True), "Any object of JSON."),
    }
    kind, value = fields.one(kinds)
    fields.end()
    name = fields.where
    if kind == "json":
        return by_schema(f"{name}.json", value)
    if kind == "regex":
        return _matching(f"{name}.regex", value)
    return f"{name}.{kind}", any_object if kind == "json_object" else lambda: jaxgen.choice(value)


def _named(fields: Fields) -> Wanted:
    """A schema with a name, which says nothing here; strict is what is done anyway."""
    for told, check in {"name": text, "description": text, "strict": flag}.items():
        fields.take(told, check, "Changes nothing.")
    schema = fields.need("schema", json_schema, "What the text must be.")
    fields.end()
    return by_schema(fields.full("schema"), schema)


def by_schema(name: str, schema: Any) -> Wanted:
    """What a JSON schema asks for."""

    def made() -> Constraint:
        constraint = jaxgen.json_schema(schema)
        if not isinstance(constraint, Constraint):
            raise Refusal(f"{name}: the schema leads back to itself, which needs a grammar; not here", param=name)
        return constraint

    return name, made


def _matching(name: str, pattern: str) -> Wanted:
    return name, lambda: jaxgen.regex(pattern)
