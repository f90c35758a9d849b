"""Records: what determined the tokens of a generation, as JSON that `jaxgen.replay` can run again."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxgen.errors import JaxgenError
from jaxgen.generation.config import DEFAULT_NEW_TOKENS
from jaxgen.generation.sample import SAMPLER_VERSION
from jaxgen.records.provenance import compiler_options, environment, model_of, tokenizer_of

SCHEMA, VERSION = "jaxgen.record", 1
# Arguments of `generate` that decide tokens and are Python, which JSON does not hold; and others that only help.
PYTHON = ("logits_processor", "stopping_criteria", "prefix_allowed_tokens_fn")
_HELPERS = ("assistant_model", "past_key_values")
# What replay reads of a record, and what it must be.
_MODEL_TYPES: dict[str, Any] = {
    "id": str | None, "revision": str | None, "dtype": str, "weights": list, "parameters_sha256": str,
}  # fmt: skip
_ENTRY_TYPES: dict[str, Any] = {
    "config": dict, "key": dict, "sampler_version": int, "row_ids": list, "prompt_ids": list,
    "negative_prompt_ids": list | None, "strict": dict | None, "python": list, "output_ids": list, "logprobs": list,
    "logprobs_sha256": str, "finish_reason": list,
}  # fmt: skip


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

    model: dict[str, Any]
    tokenizer: dict[str, Any]
    environment: dict[str, Any]
    generations: list[dict[str, Any]]

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

    def to_json(self) -> str:
        """The record as JSON text."""
        fields = {"schema": SCHEMA, "version": VERSION, **dataclasses.asdict(self)}
        text = json.dumps(fields, ensure_ascii=False, allow_nan=False, indent=1)
        # One line for a list of numbers (inside a JSON string there is no line break to be mistaken for one).
        return re.sub(r'\[\n([^\[\]{}"]+)\]', lambda found: "[" + " ".join(found[1].split()) + "]", text) + "\n"

    @classmethod
    def from_json(cls, text: str) -> "Record":
        """Read `to_json`'s text, of this or an earlier version; raises `JaxgenError` for anything else."""
        try:
            fields = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise JaxgenError(f"not a record: no JSON: {error}") from error
        if not isinstance(fields, dict) or fields.get("schema") != SCHEMA:
            raise JaxgenError(f'not a record: expected a JSON object with "schema": "{SCHEMA}"')
        version = fields.get("version")
        if not isinstance(version, int) or not 1 <= version <= VERSION:
            raise JaxgenError(f"record of version {version!r}: this jaxgen reads 1 to {VERSION}; use a newer one")
        names = [field.name for field in dataclasses.fields(cls)]
        for name in names:
            if not isinstance(fields.get(name), list if name == "generations" else dict):
                raise JaxgenError(f"not a record: its field {name!r} is missing or of another type")
        if not fields["generations"]:
            raise JaxgenError("not a record: its generations are empty")
        for number, entry in enumerate(fields["generations"]):
            _check_entry(f"generations[{number}]", entry)
        _check_types("model", fields["model"], _MODEL_TYPES)
        return cls(**{name: fields[name] for name in names})

    def save(self, path: "str | os.PathLike[str]") -> None:
        """Write to a file, which appears complete or not at all. Raises `JaxgenError` if it cannot be written."""
        path = Path(os.path.realpath(path))  # a link stays one
        if path.exists() and not path.is_file():
            raise JaxgenError(f"{path}: the record was not written: it is there, and no plain file")
        aside = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        try:
            with aside.open("w", encoding="utf-8") as file:
                file.write(self.to_json())
                file.flush()
                os.fsync(file.fileno())
            aside.replace(path)
        except BaseException as error:
            with contextlib.suppress(OSError):
                aside.unlink()
            if not isinstance(error, OSError):
                raise
            raise JaxgenError(f"{path}: the record was not written: {error}") from error

    @classmethod
    def load(cls, path: "str | os.PathLike[str]") -> "Record":
        """Read a file that `save` wrote. Raises `JaxgenError`, naming it, if it is not there or no record."""
        try:
            return cls.from_json(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError) as error:
            raise JaxgenError(f"{path}: cannot be read: {error}") from error
        except JaxgenError as error:
            raise JaxgenError(f"{path}: {error}") from error


class Recording:
    """Remembers what calls of `generate` were and gave, without their caches, until their `record` is asked for."""

    def __init__(self, tokenizer: Any = None):
        self.tokenizer, self.entries, self.origin = tokenizer, list[dict[str, Any]](), None

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


def generation_of(output: Any) -> dict[str, Any]:
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


def logprobs_sha256(rows: Iterable[Any]) -> str:
    """The sha256 of log-probabilities as float32, row after row: equal for results that are equal to the last bit."""
    return hashlib.sha256(b"".join(np.asarray(row, "<f4").tobytes() for row in rows)).hexdigest()


def _check_entry(where: str, entry: Any) -> None:
    """Raise `JaxgenError`, naming the field, for an entry that cannot be run again and compared."""
    _check_types(where, entry, _ENTRY_TYPES)
    _check_types(f"{where}: key", entry["key"], {"impl": str, "data": list})
    for name in ("prompt_ids", "output_ids", "logprobs"):
        if not all(isinstance(row, list) for row in entry[name]) or not entry[name]:
            raise JaxgenError(f"not a record: {where}: {name!r} is no list of rows")
    for name in ("prompt_ids", "output_ids"):
        if any(type(token) is not int for row in entry[name] for token in row):
            raise JaxgenError(f"not a record: {where}: {name!r} holds something else than ints")
    if len(entry["finish_reason"]) != len(entry["output_ids"]) or len(entry["output_ids"]) % len(entry["prompt_ids"]):
        raise JaxgenError(f"not a record: {where}: 'output_ids', 'finish_reason' and 'prompt_ids' do not fit together")
    if list(map(len, entry["logprobs"])) != list(map(len, entry["output_ids"])):
        raise JaxgenError(f"not a record: {where}: 'logprobs' and 'output_ids' have rows of different lengths")


def _check_types(where: str, value: Any, types: dict[str, Any]) -> None:
    for name, expected in types.items():
        if not isinstance(value, dict) or name not in value or not isinstance(value[name], expected):
            raise JaxgenError(f"not a record: {where} has no {name!r}, or it is of another type")


def _config(request: Any, rows: int) -> dict[str, Any]:
    """The fields that were in effect, as JSON has them; how the result is returned decides no token."""
    config = request.config
    fields = {k: v for k, v in config.to_hf().items() if not k.startswith("output_") and k != "return_dict_in_generate"}
    room = (request.prompts.limits - request.prompts.lengths)[:rows]
    if config.max_new_tokens is None and config.max_length is None and (room == DEFAULT_NEW_TOKENS).all():
        fields["max_new_tokens"] = DEFAULT_NEW_TOKENS  # unless some row's context ends before
    return json.loads(json.dumps(fields))


def _key_data(key: Any, rows: int) -> list[Any]:
    data = np.asarray(jax.random.key_data(key))
    return (data[:rows] if key.ndim else data).tolist()


def _rows_of(prompts: Any, rows: int) -> list[list[int]]:
    """Each row's real tokens."""
    return [ids[:count].tolist() for ids, count in zip(prompts.tokens[:rows], prompts.lengths[:rows], strict=True)]


def _shapes(request: Any) -> dict[str, Any]:
    prompts, length = request.prompts.tokens.shape
    plan = request.plan
    return {
        "prompts": prompts,
        "prompt_length": length,
        "samples": plan.samples,
        "total": plan.total,
        "cache_slots": plan.slots,
        "int8_cache": plan.int8_cache,
        "prefill_chunk": plan.chunk,
    }


def _given(value: Any) -> bool:
    return value is not None and (callable(value) or len(value) > 0)


def _short(values: Any) -> list[float | None]:
    """float32 numbers in the fewest digits that give them back; None for what JSON cannot hold."""
    return [float(str(x)) if np.isfinite(x) else None for x in np.asarray(values, np.float32)]
