"""Replay: run a record again, and say whether the same came out."""

import dataclasses
import os
import re
from typing import Any

import jax
import numpy as np

from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.generation.config import GenerationConfig
from jaxgen.generation.sample import SAMPLER_VERSION
from jaxgen.generation.score import token_logprobs
from jaxgen.generation.strict import Strict
from jaxgen.records.provenance import parameters_sha256
from jaxgen.records.record import PYTHON, Record, logprobs_sha256
from jaxgen.text.tokenizer import left_pad, tokenizer_for

Result = tuple[list[list[int]], list[np.ndarray]]  # new tokens, and their log-probabilities, by row

IDENTICAL, SAME_TOKENS, DIFFERENT, CANNOT_COMPARE = "identical", "same tokens", "different", "cannot compare"


@dataclasses.dataclass(frozen=True)
class Replay:
    """What came of a replay.

    `status` is "identical" (also every log-probability, to the last bit), "same tokens", "different", or "cannot
    compare"; `exit_code` 0, 0, 1 and 2.
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


def replay(record: "Record | str | os.PathLike[str]", model: Any = None, **python: Any) -> Replay:
    """Run a record (or the file of one) again, and compare tokens and log-probabilities.

    The model is loaded by its hub id and revision; pass one (an object, directory or hub id) that was somewhere else,
    was quantised while loading, or was trained. `python` are functions that a record names but does not hold
    (`logits_processor`, ...), and `tokenizer`, for the stop strings of a model without one. An assistant is left out:
    it changes no token. Raises `JaxgenError` for a file that is no record, and for other names in `python`.

    >>> model, tokenizer = getfixture("demo")
    >>> inputs = tokenizer(["1, 2, 3"], return_tensors="np")
    >>> out = model.generate(**inputs, do_sample=True, seed=7, return_dict_in_generate=True)
    >>> replay(out.record, model).message
    'identical'
    """
    for name in python:
        if name not in (*PYTHON, "tokenizer"):
            raise JaxgenError(f"replay: {name!r} is none of {', '.join(PYTHON)}, tokenizer")
    record = record if isinstance(record, Record) else Record.load(record)
    try:
        model = _model_of(record, model)
        results = [_again(model, number, entry, python) for number, entry in enumerate(record.generations)]
    except _CannotCompareError as error:
        return Replay(CANNOT_COMPARE, f"cannot compare because {error}")
    except JaxgenError as error:  # too long for this model, too large for this device, ...
        return Replay(CANNOT_COMPARE, f"cannot compare because the record cannot be run here: {error}")
    pairs = list(zip(record.generations, results, strict=True))
    for number, (entry, result) in enumerate(pairs):
        if (message := _first_difference(model, entry, result)) is not None:
            return Replay(DIFFERENT, (f"generation {number}: " if len(pairs) > 1 else "") + message)
    if all(logprobs_sha256(logprobs) == entry["logprobs_sha256"] for entry, (_, logprobs) in pairs):
        return Replay(IDENTICAL, IDENTICAL)
    largest = max(_largest_difference(entry, logprobs) for entry, (_, logprobs) in pairs)
    return Replay(SAME_TOKENS, f"same tokens, log-probabilities differ by {largest:.1e}")


def _model_of(record: Record, given: Any) -> Any:
    """The model to run, whose weights are the recorded ones."""
    from jaxgen import demo
    from jaxgen.convert.load import AutoModelForCausalLM
    from jaxgen.quant.config import GROUP_SIZES, WHOLE_ROWS, Int4Config

    known = record.model
    place, options = given, {"dtype": known["dtype"]}
    if given is None:
        if known["id"] is None:
            raise _CannotCompareError("its model was loaded from a directory, or made in memory: pass the model")
        place = demo.path() if known["id"] == "demo" else known["id"]
        options |= {} if known["revision"] is None else {"revision": known["revision"]}
    if not isinstance(place, str | os.PathLike):
        return _checked(place, known)
    model = AutoModelForCausalLM.from_pretrained(place, **options)
    group = next((re.fullmatch(r"Int4, groups of (\d+)", kind) for kind in known["weights"] if "Int4" in kind), None)
    if group is not None and parameters_sha256(model) != known["parameters_sha256"]:
        try:  # as it was most likely quantised while loading
            size = int(group[1])
            config = Int4Config(group_size=size if size in GROUP_SIZES else WHOLE_ROWS)
            model = AutoModelForCausalLM.from_pretrained(place, quantization_config=config, **options)
        except UnsupportedError:
            pass
    return _checked(model, known)


def _checked(model: Any, known: dict[str, Any]) -> Any:
    digest = parameters_sha256(model)
    if digest != known["parameters_sha256"]:
        raise _CannotCompareError(
            f"the weights are not the recorded ones: their sha256 is {digest[:12]}..., the recorded one "
            f"{known['parameters_sha256'][:12]}... ({', '.join(known['weights'])}); pass the model as it was used"
        )
    return model


def _again(model: Any, number: int, entry: dict[str, Any], python: dict[str, Any]) -> Result:
    """The new tokens and their log-probabilities, row by row."""
    config = GenerationConfig.from_hf(entry["config"])
    if config.do_sample and entry["sampler_version"] != SAMPLER_VERSION:
        raise _CannotCompareError(
            f"generations[{number}] was sampled by sampler version {entry['sampler_version']}, and this jaxgen has "
            f"{SAMPLER_VERSION}: the same key gives other tokens"
        )
    if (config.num_beams or 1) > 1 and "time" in entry["finish_reason"]:
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
    if config.stop_strings:
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
    new, logprobs = [], []
    for row, recorded in enumerate(entry["output_ids"]):
        stopped = entry["finish_reason"][row] == "time"  # by the clock: what follows was never made
        count = min(int(output.lengths[row]), len(recorded) if stopped else np.iinfo(np.int32).max)
        new.append(output.sequences[row, ids.shape[1] :][:count].tolist())
        logprobs.append(output.model_logprobs[row, :count])
    return new, logprobs


def _table(rows: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    return left_pad(rows, 0), left_pad([[1] * len(row) for row in rows], 0)


def _first_difference(model: Any, entry: dict[str, Any], result: Result) -> str | None:
    """Where the first row differs, with both candidates' probabilities; None if no row does."""
    for row, (old, new) in enumerate(zip(entry["output_ids"], result[0], strict=True)):
        if old == new:
            continue
        at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        where = f"first difference at row {row}, token {at}: "
        if at == len(old) or at == len(new):
            ended, other = ("the record", "the replay") if at == len(old) else ("the replay", "the record")
            return where + f"{ended} ends there, {other} goes on"
        prompt = entry["prompt_ids"][row * len(entry["prompt_ids"]) // len(result[0])]
        before = [*prompt, *old[:at]]
        p_old, p_new = (np.exp(token_logprobs(model, [[*before, token]])[0, -1]) for token in (old[at], new[at]))
        return where + f"recorded {old[at]} (probability now {p_old:.4g}), now {new[at]} (probability {p_new:.4g})"
    return None


def _largest_difference(entry: dict[str, Any], logprobs: list[np.ndarray]) -> float:
    recorded = [np.array(row, np.float32) for row in entry["logprobs"]]  # None becomes NaN
    return max(float(np.nanmax(np.abs(a - b), initial=0)) for a, b in zip(recorded, logprobs, strict=True))
