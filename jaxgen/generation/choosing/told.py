"""Tokens that a row is given and does not choose: so the program that generates also scores, to the last bit."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxgen.generation.choosing.stop import LENGTH, RUNNING


class Told(NamedTuple):
    """What rows are told to get next."""

    here: Bool[Array, " R"]  # whether the row is told anything
    tokens: Int[Array, " R"]
    last: Bool[Array, " R"]  # nothing comes after it

    @classmethod
    def at(cls, given: Int[Array, "R S"], lengths: Int[Array, " R"]) -> "Told":
        """From a table of the tokens in their slots, -1 where a row chooses, and how many tokens rows hold."""
        slots = lengths[:, None] + jnp.arange(2)
        now, then = jnp.take_along_axis(given, slots, axis=1, mode="fill", fill_value=-1).T
        return cls(now >= 0, now, then < 0)

    def instead_of(self, chosen: Int[Array, " R"]) -> Int[Array, " R"]:
        """The rows' next tokens, where they chose these."""
        return jnp.where(self.here, self.tokens, chosen)

    def removed(self, logprobs: Float[Array, " R"]) -> Bool[Array, " R"]:
        """Which tokens a filter has removed: given ones may be, chosen ones never are."""
        return self.here & jnp.isneginf(logprobs)

    def ended(self, status: Int[Array, " R"]) -> Int[Array, " R"]:
        """The status of rows, where it were `status`: what is told ends a row behind its last token, and only there."""
        own = jnp.where(self.last, jnp.int8(LENGTH), jnp.int8(RUNNING))
        return jnp.where(self.here, own, status)
