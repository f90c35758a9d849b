"""Classifier-free guidance: every row has a negative row, with another prompt and the same new tokens.

The negative rows are processed in the same batch, after the rows themselves, with caches of their own.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def with_negatives(
    tokens: Int[Array, "R *T"], positions: Int[Array, " R"], shift: Int[Array, " R"] | None
) -> tuple[Int[Array, "model_rows *T"], Int[Array, " model_rows"]]:
    """The tokens to process and their positions: for the rows, and once more for the negative rows if there are any."""
    if shift is None:
        return tokens, positions
    return jnp.concatenate([tokens, tokens]), jnp.concatenate([positions, positions + shift])


def guided(logits: Float[Array, "model_rows V"], scale: Float[Array | np.ndarray, ""] | None) -> Float[Array, "R V"]:
    """`scale * (c - u) + u`, where c and u are the log-probabilities of the rows and of the negative rows.

    Source: Sanchez et al. 2023 (arXiv 2306.17806); transformers `UnbatchedClassifierFreeGuidanceLogitsProcessor`.
    """
    if scale is None:
        return logits
    conditional, unconditional = jnp.split(jax.nn.log_softmax(logits, axis=1), 2)
    return jnp.asarray(scale) * (conditional - unconditional) + unconditional
