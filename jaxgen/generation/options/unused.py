"""Options that change nothing, in a call or in a stored file: the logger `jaxgen` names each once."""

import logging
from collections.abc import Mapping
from typing import Any

from jaxgen.errors import shown
from jaxgen.generation.options.refused import METADATA, REFUSED
from jaxgen.generation.options.table import OPTIONS, out_of_range

logger = logging.getLogger("jaxgen")
_said: set[str] = set()


def once(about: str, message: str) -> None:
    """Log a warning, unless there was one about this before."""
    if about not in _said:
        _said.add(about)
        logger.warning(message)


def say_unused(given: Mapping[str, Any], samples: bool, beams: bool) -> None:
    """Name the options that a call was given and that its strategy does not use. Source: HF's `validate`."""
    for name, value in given.items():
        option = OPTIONS[name]
        if value is None or not option.unused_without or value in (option.off, option.default):
            continue
        if not (samples if option.only_sampling else beams):
            once(name, f"{name}={shown(value)} changes nothing without {option.unused_without}")


def usable(fields: Mapping[str, Any], where: str) -> dict[str, Any]:
    """What a stored configuration says, without what changes no token, which is named once."""
    kept = {name: value for name, value in fields.items() if value is not None and name not in METADATA}
    passed_over = {
        name: value
        for name, value in kept.items()
        if (name not in OPTIONS and name not in REFUSED)
        or (name in REFUSED and not REFUSED[name].changes_tokens)
        or (name == "cache_implementation" and value not in ("static", "quantized"))
        or (name == "pad_token_id" and value == -1)
    }
    told = {name: value for name, value in passed_over.items() if name not in REFUSED or not REFUSED[name].takes(value)}
    if told:
        listed = ", ".join(f"{name}={shown(value)}" for name, value in sorted(told.items()))
        once(f"{where}: {listed}", f"{where}: passed over, as it changes no token here: {listed[:500]}")
    for name in OPTIONS:
        if fields.get("do_sample") is not True and (reason := out_of_range(name, fields.get(name))):
            once(f"{where}: {reason}", f"{where}: unused without do_sample, and an error with it: {reason}")
    return {name: value for name, value in kept.items() if name not in passed_over}
