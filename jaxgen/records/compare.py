"""What differs between an entry of a record and what came out when it was run again."""

from typing import Any

import numpy as np

from jaxgen.files import JsonObject
from jaxgen.generation.results.score import token_logprobs
from jaxgen.records.check import cut, logprobs_sha256

# When it was, and what replay leaves out: an assistant and an earlier call's cache, which change no token. The version
# of the sampler is looked at before; whether the key is that of the seed, with the record's other contradictions.
_NOT_COMPARED = {"started", "seconds", "helpers", "seed", "sampler_version"}
_OUTCOME = {"output_ids", "finish_reason", "logprobs", "logprobs_sha256"}
_MODEL = ("architecture", "config_sha256", "dtype", "weights")


def until_the_clock(entry: JsonObject, now: JsonObject) -> JsonObject:
    """What came out, of rows that `max_time` ended only as far as the record goes: what follows was never made."""
    if "max_time" not in entry["config"]:
        return now
    now = now | {"config": now["config"] | {"max_time": entry["config"]["max_time"]}}
    ids, logprobs, reasons = (list(now[name]) for name in ("output_ids", "logprobs", "finish_reason"))
    for row, (old, reason) in enumerate(zip(entry["output_ids"], entry["finish_reason"], strict=True)):
        if reason == "time" and row < len(ids) and len(ids[row]) > len(old):
            ids[row], logprobs[row], reasons[row] = ids[row][: len(old)], logprobs[row][: len(old)], reason
    sha256 = logprobs_sha256(map(numbers, logprobs))
    return now | {"output_ids": ids, "logprobs": logprobs, "logprobs_sha256": sha256, "finish_reason": reasons}


def outcome_difference(model: Any, entry: JsonObject, now: JsonObject) -> str | None:
    """Where tokens or reasons first differ, tokens with both candidates' probabilities; None if none does."""
    if (old_rows := len(entry["output_ids"])) != (new_rows := len(now["output_ids"])):
        return f"the record has {old_rows} rows, the replay {new_rows}"
    for row, (old, new) in enumerate(zip(entry["output_ids"], now["output_ids"], strict=True)):
        if old == new:
            continue
        at = next((i for i, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), min(len(old), len(new)))
        where = f"first difference at row {row}, token {at}: "
        if at == len(old) or at == len(new):
            ended, other = ("the record", "the replay") if at == len(old) else ("the replay", "the record")
            return where + f"{ended} ends there, {other} goes on"
        prompt = entry["prompt_ids"][row * len(entry["prompt_ids"]) // new_rows]
        shown = [f"recorded {old[at]}", f"now {new[at]}"]
        for index, (token, when) in enumerate(((old[at], " now"), (new[at], ""))):
            if token < model.config.vocab_size:
                probability = np.exp(token_logprobs(model, [[*prompt, *old[:at], token]])[0, -1])
                shown[index] += f" (probability{when} {probability:.4g})"
        return where + ", ".join(shown)
    for row, (old, new) in enumerate(zip(entry["finish_reason"], now["finish_reason"], strict=True)):
        if old != new:
            return f"finish_reason of row {row}: recorded {old}, now {new}"
    return None


def logprobs_difference(entry: JsonObject, now: JsonObject) -> float | None:
    """The largest difference of log-probabilities of the same tokens; None if all are equal to the last bit."""
    pairs = [(numbers(old), numbers(new)) for old, new in zip(entry["logprobs"], now["logprobs"], strict=True)]
    if all(np.array_equal(old, new, equal_nan=True) for old, new in pairs):
        return None
    apart = (np.abs(old - new) for old, new in pairs)
    return max(float(np.where(np.isnan(gap), np.inf, gap).max(initial=0)) for gap in apart)


def other_difference(entry: JsonObject, now: JsonObject) -> str | None:
    """The first of all other fields that is not as the record states it."""
    skipped = _NOT_COMPARED | (_OUTCOME - {"logprobs_sha256"}) | ({"shapes"} if entry["helpers"] else set())
    return _first_other({k: v for k, v in entry.items() if k not in skipped}, now)


def model_difference(stated: JsonObject, now: JsonObject) -> str | None:
    """The first fact of a model, whose weights are the recorded ones, that is not as the record states it."""
    difference = _first_other({name: stated.get(name) for name in _MODEL}, now)
    return None if difference is None else f"model.{difference}"


def numbers(row: list[float | None]) -> np.ndarray:
    """Log-probabilities as they were computed, in float32; NaN for what JSON does not hold."""
    return np.array(row, np.float32)


def _first_other(stated: JsonObject, now: JsonObject) -> str | None:
    for name, old in stated.items():
        new = now.get(name)
        if isinstance(old, dict) and isinstance(new, dict):
            names = [inner for inner in {**old, **new} if old.get(inner) != new.get(inner)]
            if names:
                return f"{name}.{cut(names[0])[1:-1]}: recorded {cut(old.get(names[0]))}, now {cut(new.get(names[0]))}"
        elif old != new:
            return f"{name}: recorded {cut(old)}, now {cut(new)}"
    return None
