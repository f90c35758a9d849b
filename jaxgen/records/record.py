"""Records: what determined the tokens of a generation, as JSON that `jaxgen.replay` can run again."""

import dataclasses
import datetime
import hashlib
import json
import os
import re
from collections.abc import Iterable
from typing import Any

import jax
import numpy as np

from jaxgen.constraints.grammars import Grammar
from jaxgen.constraints.patterns import Constraint
from jaxgen.errors import JaxgenError
from jaxgen.files import JsonObject, read_bytes, write_text
from jaxgen.generation.choosing.sample import SAMPLER_VERSION
from jaxgen.generation.options.table import DEFAULT_NEW_TOKENS
from jaxgen.generation.prepare import Request
from jaxgen.generation.prompts.prefill import Negative, Prompts
from jaxgen.paths import as_path
from jaxgen.records.check import check, cut, logprobs_sha256
from jaxgen.records.provenance import compiler_options, environment, model_of, tokenizer_of

SCHEMA, VERSION = "jaxgen.record", 1
# Arguments of `generate` that decide tokens and are Python, which JSON does not hold; and others that only help.
PYTHON = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
_HELPERS = ("assistant_model", "past_key_values")
_MOST_BYTES = 100_000_000  # of a file: hundreds of rows of thousands of tokens


@dataclasses.dataclass(frozen=True)
class Record:
    """Everything that determined some tokens, and the tokens; made by `output.record`.

    `generations` has one entry per call of `generate`, with its `config`, `key`, `row_ids`, `prompt_ids`, `shapes`,
    and what came out: `output_ids`, `logprobs` (the model's own, before processors), their sha256, `finish_reason`.
    No host names or paths are in it. `record.schema.json` in the package describes the JSON, version 1.

    >>> model, tokenizer = getfixture("demo")
    >>> out = model.generate(**tokenizer(["1, 2, 3"], return_tensors="np"), return_dict_in_generate=True)
    >>> Record.from_json(out.record.to_json()) == out.record
    True
    """

    model: JsonObject
    tokenizer: JsonObject
    environment: JsonObject
    generations: list[JsonObject]

    @classmethod
    def of(cls, outputs: Iterable[Any]) -> "Record":
        """The record of one or more outputs of one model; raises `JaxgenError` for what `generate` did not return."""
        outputs = list(outputs)
        if not outputs or any(output.origin is None for output in outputs):
            raise JaxgenError("a record needs outputs of model.generate(..., return_dict_in_generate=True)")
        recording = Recording()
        for output in outputs:
            recording.add(output)
        return recording.record()

    def check(self) -> None:
        """Raise `JaxgenError`, naming the field, if this is none that `output.record` makes, or contradicts itself."""
        check(self._fields())

    def _fields(self) -> JsonObject:
        return {"schema": SCHEMA, "version": VERSION, **dataclasses.asdict(self)}

    def to_json(self) -> str:
        """The record as JSON text."""
        text = json.dumps(self._fields(), ensure_ascii=False, allow_nan=False, indent=1)
        # One line for a list of numbers (inside a JSON string there is no line break to be mistaken for one).
        return re.sub(r'\[\n([^\[\]{}"]+)\]', lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Read `to_json`'s text, of this or an earlier version.

        Raises `JaxgenError`, naming the field, for anything else: what is missing, of another type, out of range or
        unknown, and parts that contradict each other (rows, a seed and its key, log-probabilities and their sha256).
        """
        try:
            fields = json.loads(text, parse_constant=_no_constant)
        except (ValueError, RecursionError) as error:
            raise JaxgenError(f"not a record: no JSON: {error}") from error
        if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
            raise JaxgenError(f'not a record: expected a JSON object with "schema": "{SCHEMA}"')
        version = fields.get("version")
        if type(version) is not int or not 1 <= version <= VERSION:
            raise JaxgenError(f"record of version {cut(version)}: this jaxgen reads 1 to {VERSION}; use a newer one")
        check(fields)
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write to a file, which appears complete or not at all. Raises `JaxgenError` if it cannot be written."""
        write_text(as_path(path, "the record's file"), self.to_json(), "the record")

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> "Record":
        """Read a file that `save` wrote. Raises `JaxgenError`, naming it, if it is not there or no record."""
        path = as_path(path, "the record's file")
        try:
            return cls.from_json(read_bytes(path, _MOST_BYTES).decode())
        except (OSError, UnicodeDecodeError) as error:
            raise JaxgenError(f"{path}: cannot be read: {error}") from error
        except JaxgenError as error:
            raise JaxgenError(f"{path}: {error}") from error


class Recording:
    """Remembers what calls of `generate` were and gave, without their caches, until their `record` is asked for."""

    def __init__(self, tokenizer: object = None):
        self.tokenizer, self.entries, self.origin = tokenizer, list[JsonObject](), None

    def add(self, output: Any) -> None:
        """Remember an output; raises `JaxgenError` if it is of another model than those before."""
        if self.origin is not None and output.origin.model is not self.origin.model:
            raise JaxgenError(f"output {len(self.entries)} is of another model than those before; a record has one")
        self.origin = output.origin
        self.entries.append(generation_of(output))

    def record(self) -> Record:
        """The record; raises `JaxgenError` without outputs, and when the model's weights are others by now."""
        if self.origin is None:
            raise JaxgenError("nothing was generated, so there is nothing to record")
        self.origin.check()
        model = self.origin.model
        return Record(model_of(model), tokenizer_of(model, self.tokenizer), environment(model), self.entries)


def generation_of(output: Any) -> JsonObject:
    """One entry of a record: the call, and what came out."""
    request = output.origin.request
    width = request.input_ids.shape[1]
    new = [ids[:count].tolist() for ids, count in zip(output.sequences[:, width:], output.lengths, strict=True)]
    logprobs = [row[:count] for row, count in zip(output.model_logprobs, output.lengths, strict=True)]
    rows = len(request.input_ids)
    return {
        "config": _config(request, rows),
        "key": {"impl": str(jax.random.key_impl(request.key)), "data": _key_data(request.key, rows)},
        "seed": list(output.seed) if isinstance(output.seed, tuple) else output.seed,
        "sampler_version": SAMPLER_VERSION,
        "row_ids": [(int(high) << 32) | int(low) for high, low in request.prompts.row_ids[:rows]],
        "prompt_ids": _rows_of(request.prompts, rows),
        "negative_prompt_ids": None if request.prompts.negative is None else _rows_of(request.prompts.negative, rows),
        "strict": None if request.strict is None else dataclasses.asdict(request.strict),
        "python": [name for name in PYTHON if _given(getattr(request.extras, name))],
        **_constraint(request),
        "helpers": [name for name in _HELPERS if getattr(request.extras, name) is not None],
        "shapes": _shapes(request),
        "compiler_options": compiler_options(output.origin.model, request.strict is not None),
        "output_ids": new,
        "logprobs": [_short(row) for row in logprobs],
        "logprobs_sha256": logprobs_sha256(logprobs),
        "finish_reason": list(output.finish_reason),
        "started": datetime.datetime.fromtimestamp(output.origin.started, datetime.UTC).isoformat("T", "milliseconds"),
        "seconds": round(output.seconds, 3),
    }


def _constraint(request: Request) -> JsonObject:
    """What the texts were to look like, if anything."""
    given = request.extras.constraint
    if given is None:
        return {}
    several = [given] if isinstance(given, Constraint | Grammar) else given
    patterns = [one.pattern if isinstance(one, Constraint) else one and dataclasses.asdict(one) for one in several]
    return {"constraint": {"patterns": patterns, "sha256": _constraint_sha256(request)}}


def _constraint_sha256(request: Request) -> str:
    """Of all that decides which tokens may come."""
    parts = [each.sha256() for each in (request.traced.automata, request.grammars) if each is not None]
    return parts[0] if len(parts) == 1 else hashlib.sha256("".join(parts).encode()).hexdigest()


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no number of JSON")


def _config(request: Request, rows: int) -> JsonObject:
    """The fields that were in effect, as JSON has them; how the result is returned decides no token."""
    config = request.config
    fields = {k: v for k, v in config.to_hf().items() if not k.startswith("output_") and k != "return_dict_in_generate"}
    room = (request.prompts.max_lengths - request.prompts.lengths)[:rows]
    if config.max_new_tokens is None and config.max_length is None and (room == DEFAULT_NEW_TOKENS).all():
        fields["max_new_tokens"] = DEFAULT_NEW_TOKENS  # unless some row's context ends before
    return json.loads(json.dumps(fields))


def _key_data(key: jax.Array, rows: int) -> list[Any]:
    data = np.asarray(jax.random.key_data(key))
    return (data[:rows] if key.ndim else data).tolist()


def _rows_of(prompts: Prompts | Negative, rows: int) -> list[list[int]]:
    """Each row's real tokens."""
    return [ids[:count].tolist() for ids, count in zip(prompts.tokens[:rows], prompts.lengths[:rows], strict=True)]


def _shapes(request: Request) -> JsonObject:
    prompts, length = request.prompts.tokens.shape
    layout = request.layout
    return {
        "prompts": prompts,
        "prompt_length": length,
        "samples": layout.samples,
        "total": layout.total,
        "cache_slots": list(layout.slots) if isinstance(layout.slots, tuple) else layout.slots,
        "int8_cache": layout.int8_cache,
        "prefill_chunk": layout.chunk,
    }


def _given(value: Any) -> bool:
    return value is not None and (callable(value) or len(value) > 0)


def _short(values: object) -> list[float | None]:
    """float32 numbers in the fewest digits that give them back; None for what JSON cannot hold."""
    return [float(str(x)) if np.isfinite(x) else None for x in np.asarray(values, np.float32)]
