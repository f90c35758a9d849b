"""CausalLMOutput: what `model(...)` returns, read as HF's outputs are, and not as the array that it holds."""

import dataclasses
from collections.abc import ItemsView, KeysView, ValuesView
from typing import Any, NoReturn

import jax
from jaxtyping import Array, Float

from jaxgen.errors import JaxgenError, shown
from jaxgen.pytree import pytree

# What arrays answer to through operators, conversion and iteration; names without underscores are `__getattr__`'s.
_OF_ARRAYS = (
    "array", "jax_array", "iter", "bool", "int", "float", "complex", "index", "neg", "pos", "abs", "invert",
    "eq", "ne", "lt", "le", "gt", "ge", "add", "radd", "sub", "rsub", "mul", "rmul", "truediv", "rtruediv", "floordiv",
    "rfloordiv", "mod", "rmod", "pow", "rpow", "matmul", "rmatmul", "and", "rand", "or", "ror", "xor", "rxor",
)  # fmt: skip
_FROM_GENERATE = ("past_key_values", "cache", "hidden_states", "attentions")  # which HF's output has too


class NoSuchOutputError(JaxgenError, AttributeError, LookupError):
    """Something was read from a model's output that it has not; AttributeError, so that `hasattr` says no."""


@pytree
@dataclasses.dataclass(frozen=True, eq=False)
class CausalLMOutput:
    """What a model returns: `logits` [B, T, V] float32, and the `loss` (a scalar, in nats) where labels were given.

    A pytree, so it goes through `jax.jit`, `jax.grad` and `jax.vmap`. `out["logits"]`, `out[0]`, `to_tuple()`, `keys()`
    and `**out` work as in HF: what is None is left out, so `out[0]` is the loss if there is one. It is no array:
    what only arrays have raises a `JaxgenError` that says to write `.logits`.
    Source: transformers `CausalLMOutputWithPast`; there is no past here.

    >>> model, tokenizer = getfixture("demo")
    >>> out = model(**tokenizer(["1, 2, 3"], return_tensors="np"))
    >>> out.logits.shape, out.loss, out[0] is out.logits
    ((1, 8, 640), None, True)
    """

    logits: Float[Array, "B T V"]
    loss: Float[Array, ""] | None = None

    def __getitem__(self, key: object) -> Any:
        present = self._present()
        if isinstance(key, str) and key in present:
            return present[key]
        if isinstance(key, int) and not isinstance(key, bool) and -len(present) <= key < len(present):
            return self.to_tuple()[key]
        if isinstance(key, str | int):
            raise NoSuchOutputError(f"the model's output has no {shown(key)}; it has {', '.join(present)}")
        raise _no_array("slices")

    def __len__(self) -> int:
        return len(self._present())

    def __contains__(self, name: object) -> bool:
        return name in self._present()

    def keys(self) -> KeysView[str]:
        """The names of what is there: `loss`, if labels were given, and `logits`."""
        return self._present().keys()

    def values(self) -> ValuesView[Any]:
        """What is there."""
        return self._present().values()

    def items(self) -> ItemsView[str, Any]:
        """Names, and what is there."""
        return self._present().items()

    def to_tuple(self) -> tuple[Any, ...]:
        """What is there: (loss, logits), or (logits,)."""
        return tuple(self.values())

    def _present(self) -> dict[str, Any]:
        both = {"loss": self.loss, "logits": self.logits}  # in HF's order
        return {name: value for name, value in both.items() if value is not None}

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):
            raise AttributeError(name)  # what libraries ask any object for
        if name in _FROM_GENERATE:
            raise NoSuchOutputError(f"model(...) has no .{name}; generate(..., return_dict_in_generate=True) can")
        if hasattr(jax.Array, name):
            raise _no_array(f".{name}")
        raise NoSuchOutputError(f"model(...) has no .{name:.60}; it has .logits, and with labels= .loss")

    __hash__ = object.__hash__


def _no_array(access: str) -> NoSuchOutputError:
    return NoSuchOutputError(
        f"model(...) is no array, and has no {access}: write model(...).logits for the array [B, T, V]"
    )


def _refusal(name: str) -> Any:
    def refuse(self: CausalLMOutput, *_: object, **__: object) -> NoReturn:
        raise _no_array(f"__{name}__")

    return refuse


for _name in _OF_ARRAYS:
    setattr(CausalLMOutput, f"__{_name}__", _refusal(_name))
