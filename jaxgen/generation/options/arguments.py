"""The arguments of `generate` in the forms that scripts for transformers have."""

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxgen.errors import JaxgenError


class LogitsProcessorList(list):
    """Several logits processors, under HF's name for the list; each is a `f(tokens, lengths, logits) -> logits`."""


class StoppingCriteriaList(list):
    """Several stopping criteria, under HF's name for the list; each is a `f(tokens, lengths, scores) -> bool [R]`."""


class Arguments(NamedTuple):
    """The arguments of `generate`, each in its one place."""

    input_ids: Any
    attention_mask: Any
    generation_config: Any
    options: dict[str, Any]


def sorted_out(
    input_ids: object, attention_mask: object, generation_config: object, options: Mapping[str, Any]
) -> Arguments:
    """Read what HF takes too: `inputs=`, a tokenizer's whole output as the prompt, `generation_config` in second place.

    `token_type_ids` are dropped, as in HF. Raises `JaxgenError` for what is given twice.
    """
    rest = {name: value for name, value in options.items() if name not in ("inputs", "token_type_ids")}
    if _is_config(attention_mask):
        generation_config = _only("generation_config", attention_mask, generation_config)
        attention_mask = None
    input_ids = _only("input_ids (or inputs)", options.get("inputs"), input_ids)
    if isinstance(input_ids, Mapping):
        encoded = {name: value for name, value in input_ids.items() if name != "token_type_ids"}
        if encoded.get("input_ids") is None:
            raise JaxgenError(f"the mapping given as prompt has no input_ids; it has {sorted(map(str, encoded))!r:.80}")
        input_ids = encoded.pop("input_ids")
        attention_mask = _only("attention_mask", encoded.pop("attention_mask", None), attention_mask)
        for name in encoded.keys() & rest.keys():
            raise JaxgenError(f"{name} was given twice")
        rest |= encoded
    return Arguments(input_ids, attention_mask, generation_config, rest)


def _only(name: str, value: object, other: object) -> Any:
    """The one of two that is given."""
    if value is not None and other is not None:
        raise JaxgenError(f"{name} was given twice")
    return other if value is None else value


def _is_config(value: object) -> bool:
    return callable(getattr(value, "to_dict", None)) and not hasattr(value, "shape")
