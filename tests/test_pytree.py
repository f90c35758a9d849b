"""Pytrees are checked where a program makes them, and JAX may fill them with whatever it likes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from beartype import beartype
from jaxtyping import Array, Int, TypeCheckError, jaxtyped

from jaxgen.pytree import pytree


@jaxtyped(typechecker=beartype)
@pytree
@dataclasses.dataclass(frozen=True)
class Pair:
    tokens: Int[Array, "R S"]
    lengths: Int[Array, " R"]
    window: int = dataclasses.field(default=3, metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class OfJax:
    tokens: Any
    lengths: Any
    window: int = dataclasses.field(default=3, metadata={"static": True})


TOKENS, LENGTHS = jnp.zeros((2, 5), jnp.int32), jnp.zeros(2, jnp.int32)


def test_what_a_program_makes_is_checked():
    pair = Pair(TOKENS, LENGTHS)
    with pytest.raises(TypeCheckError):
        Pair(TOKENS, jnp.zeros(3, jnp.int32))
    with pytest.raises(TypeCheckError):
        dataclasses.replace(pair, tokens=LENGTHS)


def test_jax_makes_it_of_placeholders():
    pair = Pair(TOKENS, LENGTHS, 4)
    assert jax.tree.map(lambda leaf: leaf.shape, pair).lengths == (2,)
    assert jax.vmap(lambda pair: pair.tokens.sum(), in_axes=(jax.tree.map(lambda _: 0, pair),))(pair).shape == (2,)
    again = jax.jit(lambda pair: dataclasses.replace(pair, lengths=pair.lengths + 1))(pair)
    assert isinstance(again, Pair) and again.window == 4 and again.lengths.tolist() == [1, 1]


def test_its_leaves_have_the_order_and_names_that_jax_gives_them():
    mine, theirs = Pair(TOKENS, LENGTHS), OfJax(TOKENS, LENGTHS)
    named = [jax.tree_util.tree_flatten_with_path(tree)[0] for tree in (mine, theirs)]
    assert [path for path, _ in named[0]] == [path for path, _ in named[1]]
    assert all(a is b for a, b in zip(jax.tree.leaves(mine), jax.tree.leaves(theirs), strict=True))
    assert jax.tree.structure(mine) != jax.tree.structure(dataclasses.replace(mine, window=4))
