"""Dataclasses that JAX takes apart and puts together again."""

import dataclasses
import operator
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import jax

Kind = TypeVar("Kind")


def pytree(kind: type[Kind]) -> type[Kind]:
    """A dataclass as a pytree, whose leaves are its fields but for those with metadata `static`; a decorator.

    As `jax.tree_util.register_dataclass`, except that JAX does not put it together through its constructor: the fields
    are checked where a program makes one, and not where JAX fills it with placeholders.
    """
    fields: tuple[Any, ...] = dataclasses.fields(kind)  # pyright: ignore[reportArgumentType]
    static = [field.name for field in fields if field.metadata.get("static")]
    names = [field.name for field in fields if field.name not in static]
    keys = [jax.tree_util.GetAttrKey(name) for name in names]

    leaves, others = _reader(names), _reader(static)

    def children(tree: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        return leaves(tree), others(tree)

    def children_with_keys(tree: Any) -> tuple[tuple[tuple[Any, Any], ...], tuple[Any, ...]]:
        return tuple(zip(keys, leaves(tree), strict=True)), others(tree)

    def together(others: tuple[Any, ...], leaves: Iterable[Any]) -> Kind:
        tree = object.__new__(kind)
        vars(tree).update(zip((*names, *static), (*leaves, *others), strict=True))
        return tree

    jax.tree_util.register_pytree_with_keys(kind, children_with_keys, together, children)
    return kind


def _reader(names: list[str]) -> Callable[[Any], tuple[Any, ...]]:
    """What reads these fields."""
    if len(names) > 1:
        return operator.attrgetter(*names)
    return lambda tree: tuple([getattr(tree, name) for name in names])
