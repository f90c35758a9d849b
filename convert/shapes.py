"""What the parameters of a checkpoint will be, before they are read."""

import dataclasses
import re
from typing import Any

import jax
import numpy as np
from flax import nnx

from jaxgen.models.config import DecoderConfig
from jaxgen.models.families import family_of
from jaxgen.models.tensors import parameter_parts
from jaxgen.quant import Weight

from .assemble import Assembler


def shapes_of(assembler: Assembler, config: DecoderConfig) -> dict[str, Any]:
    """Each parameter, by its dotted path: `jax.ShapeDtypeStruct`, or a `Weight` of them.

    How a matrix of four bits is packed only its tensors say: of those, one of each kind is read, in one layer. What a
    file quantises differently in other layers is not known here.
    """
    model = nnx.eval_shape(lambda: family_of(config)(config, rngs=nnx.Rngs(0), dtype=assembler.dtype))
    variables = {".".join(map(str, path)): value for path, value in nnx.to_flat_state(nnx.state(model))}

    shapes: dict[str, Any] = {}
    samples: dict[str, Weight] = {}
    for name, parts in parameter_parts(config).items():
        shape = variables[name].shape
        shapes[name] = jax.ShapeDtypeStruct(shape, assembler.dtype)
        if assembler.becomes_quantized(parts):
            kind = re.sub(r"\d+", "", name)
            if kind not in samples:
                samples[kind] = assembler.sample(parts[0])
            shapes[name] = _of_rows(samples[kind], shape[0])
    return shapes


def _of_rows(weight: Weight, rows: int) -> Weight:
    """The shapes of such a weight of so many rows."""
    whole = jax.tree.map(lambda x: jax.ShapeDtypeStruct(np.shape(x), x.dtype), weight)
    by_row = {name: x for name in whole.by_row if (x := getattr(whole, name)) is not None}
    longer = {name: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype) for name, x in by_row.items()}
    return dataclasses.replace(whole, **longer)
