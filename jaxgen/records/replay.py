"""Replay: run a record again, and say whether the same came out."""

import dataclasses
import os
import re
from typing import Any

import jax
import numpy as np

from jaxgen.constraints.grammars import Grammar
from jaxgen.constraints.patterns import Constraint
from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.files import JsonObject
from jaxgen.generation.choosing.sample import SAMPLER_VERSION
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.programs.strict import Strict
from jaxgen.records.check import cut
from jaxgen.records.compare import (
    logprobs_difference,
    model_difference,
    other_difference,
    outcome_difference,
    until_the_clock,
)
from jaxgen.records.provenance import facts_of, parameters_sha256
from jaxgen.records.record import PYTHON, Record, generation_of
from jaxgen.text.tokenizer import left_pad, tokenizer_for

IDENTICAL, SAME_TOKENS, DIFFERENT, CANNOT_COMPARE = "identical", "same tokens", "different", "cannot compare"
_ALL_SAME = "same tokens and log-probabilities"


@dataclasses.dataclass(frozen=True)
class Replay:
    """What came of a replay.

    `status` is "identical" (also every log-probability, to the last bit, and all else that the record states of them),
    "same tokens", "different" (tokens, or why a row ended), or "cannot compare"; `exit_code` 0, 0, 1 and 2.
    """

    status: str
    message: str

    @property
    def exit_code(self) -> int:
        """What `jaxgen replay` exits with."""
        return {IDENTICAL: 0, SAME_TOKENS: 0, DIFFERENT: 1, CANNOT_COMPARE: 2}[self.status]

    def __str__(self) -> str:
        return self.message


class _CannotCompareError(Exception):
    """Why a record cannot be run again here."""


def replay(
    record: "Record | str | os.PathLike[str]", model: object = None, *, load_model: bool = False, **python: object
) -> Replay:
    """Run a record (or the file of one) again, and compare with it whatever it states of what came out.

    `model` is an object, a directory or a hub id. Without one, a record of the demo runs on the demo. What any other
    record names is loaded only if you say `load_model=True`, from the Hugging Face hub, by id and revision; without,
    the answer says what that would be. A model that was somewhere else, was quantised by you, or was trained, must be
    passed. `python` are functions that a record names but does not hold (`logits_processor`, ...), and `tokenizer`,
    for the stop strings or the constraint of a model without one. An assistant is left out: it changes no token. Raises
    `JaxgenError` for a file that is no record, or contradicts itself, and for other names in `python`.

    >>> model, tokenizer = getfixture("demo")
    >>> inputs = tokenizer(["1, 2, 3"], return_tensors="np")
    >>> out = model.generate(**inputs, do_sample=True, seed=7, return_dict_in_generate=True)
    >>> replay(out.record, model).message
    'identical'
    """
    for name in python:
        if name not in (*PYTHON, "tokenizer"):
            raise JaxgenError(f"replay: {name!r} is none of {', '.join(PYTHON)}, tokenizer, load_model")
    record = record if isinstance(record, Record) else Record.load(record)
    try:
        model = _model_of(record, model, load_model)
        results = [_again(model, number, entry, python) for number, entry in enumerate(record.generations)]
    except _CannotCompareError as error:
        return Replay(CANNOT_COMPARE, f"cannot compare because {error}")
    except JaxgenError as error:  # too long for this model, too large for this device, ...
        return Replay(CANNOT_COMPARE, f"cannot compare because the record cannot be run here: {error}")
    return _compared(record, model, results)


def source_of(record: Record) -> str | None:
    """What replay loads if it is told `load_model=True`, and from where; None if the record names no model.

    Raises `JaxgenError` for a name that is no hub id, or for which a local directory would be taken.

    >>> model, tokenizer = getfixture("demo")
    >>> source_of(model.generate([[1, 35]], return_dict_in_generate=True).record)
    'the demo that comes with jaxgen'
    """
    name, revision = record.model["id"], record.model["revision"]
    if name is None or name == "demo":
        return name and "the demo that comes with jaxgen"
    if not re.fullmatch(r"[A-Za-z0-9_][\w.-]*(/[A-Za-z0-9_][\w.-]*)?", name, re.ASCII) or ".." in name:
        raise JaxgenError(f"the record names the model {cut(name)}, which is no id of the Hugging Face hub")
    if os.path.lexists(name):
        raise JaxgenError(f"the record names {name!r} of the Hugging Face hub, but there is {os.path.abspath(name)}")
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{name}, " + ("its newest revision" if revision is None else f"revision {revision}")


def _compared(record: Record, model: object, results: list[JsonObject]) -> Replay:
    """The answer, by all that the record states: outcome first, then its last bits, then what else it says of them."""
    pairs = [(entry, until_the_clock(entry, now)) for entry, now in zip(record.generations, results, strict=True)]
    places = [f"generation {number}: " if len(pairs) > 1 else "" for number in range(len(pairs))]
    for place, pair in zip(places, pairs, strict=True):
        if (message := outcome_difference(model, *pair)) is not None:
            return Replay(DIFFERENT, place + message)
    gaps = [gap for pair in pairs if (gap := logprobs_difference(*pair)) is not None]
    if gaps:
        return Replay(SAME_TOKENS, f"same tokens, log-probabilities differ by {max(gaps):.1e}")
    for place, pair in zip(places, pairs, strict=True):
        if (message := other_difference(*pair)) is not None:
            return Replay(SAME_TOKENS, f"{_ALL_SAME}, but {place}{message}")
    message = model_difference(record.model, facts_of(model))
    if message is None:
        try:
            record.check()
        except JaxgenError as error:
            message = str(error)
    return Replay(IDENTICAL, IDENTICAL) if message is None else Replay(SAME_TOKENS, f"{_ALL_SAME}, but {message}")


def _model_of(record: Record, given: object, load_model: bool) -> Any:
    """The model to run, whose weights are the recorded ones."""
    from jaxgen import demo
    from jaxgen.convert.load import AutoModelForCausalLM
    from jaxgen.quant.config import GROUP_SIZES, WHOLE_ROWS, Int4Config

    known = record.model
    place, options = given, {"dtype": known["dtype"]}
    if given is None:
        source = source_of(record)
        if source is None:
            raise _CannotCompareError("its model was loaded from a directory, or made in memory: pass the model")
        if known["id"] != "demo" and not load_model:
            raise _CannotCompareError(
                f"no model was passed, and what the record names is not loaded unasked: it is {source}; pass the "
                "model, or say load_model=True (--load-model)"
            )
        place = demo.path() if known["id"] == "demo" else known["id"]
        options |= {} if known["revision"] is None else {"revision": known["revision"]}
    if not isinstance(place, str | os.PathLike):
        return _checked(place, known)
    model = AutoModelForCausalLM.from_pretrained(place, **options)
    group = next(
        (re.fullmatch(r"Int4, groups of (\d{1,9})", kind) for kind in known["weights"] if "Int4" in kind), None
    )
    if group is not None and parameters_sha256(model) != known["parameters_sha256"]:
        try:  # as it was most likely quantised while loading
            size = int(group[1])
            config = Int4Config(group_size=size if size in GROUP_SIZES else WHOLE_ROWS)
            model = AutoModelForCausalLM.from_pretrained(place, quantization_config=config, **options)
        except UnsupportedError:
            pass
    return _checked(model, known)


def _checked(model: object, known: JsonObject) -> Any:
    digest = parameters_sha256(model)
    if digest != known["parameters_sha256"]:
        raise _CannotCompareError(
            f"the weights are not the recorded ones: their sha256 is {digest[:12]}..., the recorded one "
            f"{known['parameters_sha256'][:12]}... ({', '.join(known['weights'])}); pass the model as it was used"
        )
    return model


def _again(model: Any, number: int, entry: JsonObject, python: JsonObject) -> JsonObject:
    """The entry that running it again gives."""
    config = GenerationConfig(**entry["config"])
    if config.do_sample and entry["sampler_version"] != SAMPLER_VERSION:
        raise _CannotCompareError(
            f"generations[{number}] was sampled by sampler version {entry['sampler_version']}, and this jaxgen has "
            f"{SAMPLER_VERSION}: the same key gives other tokens"
        )
    if config.beams > 1 and "time" in entry["finish_reason"]:
        raise _CannotCompareError(
            f"generations[{number}] is a beam search that max_time ended: which beam was best then, a longer one is not"
        )
    missing = [name for name in entry["python"] if name not in python]
    if missing:
        raise _CannotCompareError(
            f"generations[{number}] used {', '.join(missing)}, functions that a record does not hold; "
            f"pass them: jaxgen.replay(record, model, {missing[0]}=...)"
        )
    options = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    if constraint := entry.get("constraint"):
        asked = [
            Grammar(**one) if isinstance(one, dict) else None if one is None else Constraint(one)
            for one in constraint["patterns"]
        ]
        options["constraint"] = asked[0] if len(asked) == 1 and asked[0] is not None else asked
    if config.stop_strings or constraint:
        options["tokenizer"] = tokenizer_for(model, python.get("tokenizer"))
    if entry["negative_prompt_ids"] is not None:
        options["negative_prompt_ids"], options["negative_prompt_attention_mask"] = _table(entry["negative_prompt_ids"])
    try:
        words: Any = np.array(entry["key"]["data"], np.uint32)
        key = jax.random.wrap_key_data(words, impl=entry["key"]["impl"])
        strict = None if entry["strict"] is None else Strict(**entry["strict"])
    except (TypeError, ValueError, OverflowError) as error:
        raise JaxgenError(f"not a record: generations[{number}]: 'key' or 'strict': {error}") from error
    ids, mask = _table(entry["prompt_ids"])
    options |= {"max_time": None, "return_dict_in_generate": True}
    output = model.generate(
        ids,
        mask,
        key=key,
        row_ids=entry["row_ids"],
        strict=strict,
        **{name: python[name] for name in entry["python"]},
        **options,
    )
    return generation_of(output)


def _table(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return left_pad(rows, 0), left_pad([[1] * len(row) for row in rows], 0)
