"""`python -m jaxgen.models`: which families there are, and what each supports, as the code says it."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from flax import nnx

from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.families import families

SHOWN_BY = "tests/oracle/test_families_oracle.py"
_HEAD = ("class", "`model_type`", "4-bit formats", "GGUF", "LoRA", "windows", "experts", "kernels on GPUs", "shown by")


def table() -> str:
    """A Markdown table, a line per family."""
    rows = [_HEAD, ("---",) * len(_HEAD), *map(_row, families())]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _row(kind: type[DecoderForCausalLM]) -> tuple[str, ...]:
    config = kind.config_class
    fields = {field.name for field in dataclasses.fields(config)}
    windows = "by layer" if "layer_types" in fields else "all layers"
    experts = config.experts_field is not None
    return (
        f"`{kind.__name__}`",
        f"`{config.model_type}`",
        "yes",
        ", ".join(f"`{name}`" for name in kind.gguf.architectures) if kind.gguf else "",
        "yes; of experts, merged into floats only" if experts else "yes",
        windows if "sliding_window" in fields else "",
        "yes" if experts else "",
        "yes" if _runs_on_kernels(kind) else "no",
        "tests/oracle/test_model_oracle.py" if config.model_type == "mistral" else f"{SHOWN_BY}: {config.model_type}",
    )


def _runs_on_kernels(kind: type[DecoderForCausalLM]) -> bool:
    """Of the default shape, in bfloat16."""
    default: Any = kind.config_class  # a family's has a default for every field
    config = default().with_layers(range(4))
    return nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0), dtype=jnp.bfloat16))._fits_kernels


if __name__ == "__main__":
    print(table())
