"""A quantised weight with a low-rank correction beside it: what a LoRA adapter trained on such a base needs."""

import dataclasses
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.tree_util.register_dataclass
@no_type_check  # JAX rebuilds it around placeholders
@dataclasses.dataclass(frozen=True)
class Adapted:
    """A weight `[out, in]`: `base + up @ down`, never computed as one matrix, which four bits could not hold.

    Source: LoRA (arXiv 2106.09685), QLoRA (arXiv 2305.14314).
    """

    base: Any  # Int4 or Lookup4
    down: Any  # float [r, I], in HF's order of columns
    up: Any  # float [O, r], the adapter's scale multiplied in

    @property
    def shape(self) -> tuple[int, int]:
        """`(out, in)`."""
        return self.base.shape

    @property
    def nbytes(self) -> int:
        """Bytes of all arrays."""
        return sum(array.nbytes for array in jax.tree.leaves(self))

    def dequantize(self, dtype: Any = jnp.float32) -> Float[Array, "O I"]:
        """The weight as one matrix after all, computed in float32 and rounded once."""
        up, down = jnp.asarray(self.up, jnp.float32), jnp.asarray(self.down, jnp.float32)
        return (self.base.dequantize() + jnp.matmul(up, down, precision="highest")).astype(dtype)
