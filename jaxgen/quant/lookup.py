"""The lookup-table weight: bitsandbytes' NF4 and FP4, kept as they are."""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxgen.lowering import own_rules
from jaxgen.quant.weight import Weight


@jax.tree_util.register_dataclass
@no_type_check  # JAX rebuilds it around placeholders
@dataclasses.dataclass(frozen=True)
class Lookup4(Weight):
    """A weight `[out, in]` of 16 different values per block: `w[o, i] = table[code[o, i]] * scale[o, i // block]`.

    Source: QLoRA (arXiv 2305.14314); bitsandbytes `Linear4bit`.
    """

    by_row = ("packed", "scale")

    packed: Any  # uint8 [O, I/2]: codes 0 to 15, the even column in the low nibble
    scale: Any  # float [O, blocks]
    table: Any  # float [16]

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.packed.shape[0], 2 * self.packed.shape[1]

    @property
    def group_size(self) -> int:
        """Weights per scale."""
        return self.shape[1] // self.scale.shape[1]

    def describe(self) -> str:
        """With the size of the blocks."""
        return f"{type(self).__name__}, groups of {self.group_size}"

    @own_rules()
    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "O I"]:
        """The weight, computed in float32 and rounded once."""
        wide = jnp.asarray(self.packed).astype(jnp.int32)
        codes = jnp.stack([wide & 15, wide >> 4], axis=-1).reshape(*self.scale.shape, self.group_size)
        values = jnp.asarray(self.table)[codes] * jnp.asarray(self.scale)[..., None].astype(jnp.float32)
        return values.reshape(self.shape).astype(dtype)
