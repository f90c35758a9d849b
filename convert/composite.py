"""The text model of a checkpoint that holds a vision tower too: its config, and its tensors under their usual names."""

import re
from typing import Any

from jaxgen.errors import CheckpointError
from jaxgen.generation.options.unused import once
from jaxgen.models.families import is_composite, text_fields
from jaxgen.models.tensors import HEAD

from .checkpoint import Checkpoint
from .formats import FIELDS

# As the hub's files have it, and as transformers 5 names its modules.
_TEXT = re.compile(r"language_model\.(?=(?:model|lm_head)\.)|(?<=^model\.)language_model\.")
_OTHERS = re.compile(r"(?:model\.)?(?:vision_tower|multi_modal_projector)\.")


def text_model(fields: dict[str, Any], checkpoint: Checkpoint) -> dict[str, Any]:
    """The fields of config.json that describe the text model, and how it is quantised.

    Of a model that sees, `checkpoint` then has the text model's tensors alone, which a message says once. Raises
    `CheckpointError` for two tensors of one name.
    """
    if not is_composite(fields):
        return fields
    text = text_fields(fields) | {name: fields[name] for name in FIELDS if name in fields}
    kept, left = {}, 0
    for name, info in checkpoint.tensors.items():
        if _OTHERS.match(name):
            left += 1
        elif kept.setdefault(text_name(name), info) is not info:
            raise CheckpointError(str(checkpoint.directory), [f"{text_name(name)!r} is there twice: once as {name!r}"])
    checkpoint.tensors = kept
    checkpoint.unreadable = {text_name(name) for name in checkpoint.unreadable if not _OTHERS.match(name)}
    there = HEAD in checkpoint.tensors or HEAD in checkpoint.unreadable
    text["tie_word_embeddings"] = text["tie_word_embeddings"] and not there  # a head that is there counts
    once(
        f"vision {checkpoint.directory}",
        f"{checkpoint.directory} is a {fields['model_type']} model: jaxgen runs its text part, and leaves out the "
        f"vision tower and its projector ({left} tensors)",
    )
    return text


def text_name(name: str) -> str:
    """What a text model calls a tensor."""
    return _TEXT.sub("", name, count=1) if _TEXT.match(name) or name.startswith("model.language_model.") else name
