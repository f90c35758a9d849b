"""Options that change nothing, in a call or in a stored file: the logger `jaxgen` names each once."""

import logging
from collections.abc import Mapping
from typing import Any

from jaxgen.errors import shown
from jaxgen.generation.fields import CHECKS, INERT_IN_FILES, METADATA, REFUSED, SAMPLING, out_of_range

logger = logging.getLogger("jaxgen")
_said: set[str] = set()
# What one strategy alone uses, and the values at which it does nothing there either.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "temperature": (1.0,), "top_k": (0, 50), "top_p": (1.0,), "min_p": (0.0,), "top_h": (1.0,), "typical_p": (1.0,),
    "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,), "length_penalty": (1.0,), "early_stopping": (False,),
}  # fmt: skip


def once(about: str, message: str) -> None:
    """Log a warning, unless there was one about this before."""
    if about not in _said:
        _said.add(about)
        logger.warning(message)


def say_unused(given: Mapping[str, Any], samples: bool, beams: bool) -> None:
    """Name the options that a call was given and that its strategy does not use. Source: HF's `validate`."""
    for name, value in given.items():
        if value is None or name not in _NEUTRAL or value in _NEUTRAL[name]:
            continue
        if name in SAMPLING and not samples:
            once(name, f"{name}={shown(value)} changes nothing without do_sample=True")
        elif name not in SAMPLING and not beams:
            once(name, f"{name}={shown(value)} changes nothing without num_beams of at least 2")


def usable(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a stored configuration says, without what changes no token, which is named once."""
    kept = {name: value for name, value in fields.items() if value is not None and name not in METADATA}
    passed_over = {
        name: value
        for name, value in kept.items()
        if (name not in CHECKS and name not in REFUSED)
        or name in INERT_IN_FILES
        or (name == "cache_implementation" and value not in ("static", "quantized"))
        or (name == "pad_token_id" and value == -1)
    }
    told = {name: value for name, value in passed_over.items() if value not in REFUSED.get(name, ((),))[0]}
    if told:
        listed = ", ".join(f"{name}={shown(value)}" for name, value in sorted(told.items()))
        once(f"{where}: {listed}", f"{where}: passed over, as it changes no token here: {listed[:500]}")
    for name in SAMPLING:
        if fields.get("do_sample") is not True and (reason := out_of_range(name, fields.get(name))):
            once(f"{where}: {reason}", f"{where}: unused without do_sample, and an error with it: {reason}")
    return {name: value for name, value in kept.items() if name not in passed_over}
