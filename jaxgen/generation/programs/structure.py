"""A Flax module as jit takes it: a hashable structure, and a flat list of arrays.

`nnx.split` walks the module in Python, and jit hashes what it found: some tenths of a millisecond per layer and
call. A module rarely changes between two calls, so its structure is remembered, and a shorter walk tells whether it
is still the same. The arrays are read anew each time: training goes on.
"""

import threading
import weakref
from typing import Any

import jax
from flax import nnx

_comparing = threading.local()


def references(weights: list[Any]) -> tuple[Any, ...]:
    """Which arrays the weights are made of, without keeping them."""
    return tuple(map(weakref.ref, jax.tree.leaves(weights)))


def same_arrays(references: tuple[Any, ...], weights: list[Any]) -> bool:
    """Whether the weights are made of the arrays that `references` are to: ids would be taken again by later ones."""
    arrays = jax.tree.leaves(weights)
    return len(references) == len(arrays) and all(a() is b for a, b in zip(references, arrays, strict=True))


class Untracked:
    """A static attribute of a module that decides nothing in prefill and decode.

    `Structure` takes all of them for equal, so that changing one does not recompile. Everyone else (a user's own
    jit, where `jaxgen.generate` reads the value) compares what they hold.
    """

    def __init__(self, value: Any):
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Untracked) and (getattr(_comparing, "loosely", False) or self.value == other.value)

    def __hash__(self) -> int:
        return hash(Untracked)


class Structure:
    """Everything of a module but its arrays: a static argument of jit, hashed once."""

    def __init__(self, graph: Any, variables: list[tuple[Any, Any]]):
        self._graph = graph
        # jit keeps its static arguments for ever: they must not hold on to the arrays.
        self._variables = [(path, variable.replace(_abstract(variable))) for path, variable in variables]
        self._hash = hash((graph, tuple(path for path, _ in variables)))

    def module(self, arrays: list[Any]) -> Any:
        """The module again, with these arrays; in the form that it has for those who trace it, if it has one."""
        pairs = zip(self._variables, arrays, strict=True)
        flat = [(path, variable.replace(array)) for (path, variable), array in pairs]
        module = nnx.merge(self._graph, nnx.from_flat_state(flat))
        return module.as_traced() if hasattr(module, "as_traced") else module

    def __eq__(self, other: object) -> bool:
        if self is other or not isinstance(other, Structure) or self._hash != other._hash:
            return self is other
        _comparing.loosely = True
        try:
            return self._graph == other._graph
        finally:
            _comparing.loosely = False

    def __hash__(self) -> int:
        return self._hash


def split(model: nnx.Module) -> tuple[Structure, list[Any]]:
    """A module's structure and arrays; the structure is computed again only if the module was changed."""
    parts: list[Any] = []
    _collect(model, parts, set())
    known = _known.get(model)
    if known is None or len(known.parts) != len(parts) or any(a is not b for a, b in zip(known.parts, parts)):  # noqa: B905
        known = _known[model] = _Known(model, parts)
    return known.structure, [value_of(variable) for variable in known.variables]


class _Known:
    """What a module looked like when it was last split. Holds its parts, so that their identities stay taken."""

    def __init__(self, model: nnx.Module, parts: list[Any]):
        graph, state = nnx.split(model)
        flat = list(nnx.to_flat_state(state))
        self.parts = parts
        self.structure = Structure(graph, flat)
        self.variables = [_at(model, path) for path, _ in flat]


_known: weakref.WeakKeyDictionary[nnx.Module, _Known] = weakref.WeakKeyDictionary()


def _collect(node: Any, parts: list[Any], seen: set[int]) -> None:
    """Every attribute and item below a module, in order, down to the variables but not into them."""
    for value in vars(node).values() if isinstance(node, nnx.Module) else node:
        parts.append(value)
        if isinstance(value, nnx.Module | list | tuple | dict) and id(value) not in seen:
            seen.add(id(value))  # a module may hold another one twice, or lead back to itself
            _collect(list(value.values()) if isinstance(value, dict) else value, parts, seen)


def _at(node: Any, path: tuple[Any, ...]) -> Any:
    for name in path:
        node = getattr(node, name) if isinstance(name, str) else node[name]
    return node


def _abstract(variable: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), value_of(variable))


def value_of(variable: Any) -> Any:
    """The array itself: `variable[...]` would dispatch an operation."""
    return variable.get_value() if hasattr(variable, "get_value") else variable.value  # flax before 0.12
