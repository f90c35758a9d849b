"""The one table between Hugging Face tensors and the parameters of `models/decoder.py`, for loading and saving."""

import dataclasses
import re
from typing import TYPE_CHECKING

import numpy as np

from jaxgen.models.config import NORMS, DecoderConfig

if TYPE_CHECKING:
    from jaxgen.models.experts import Routing

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Buffers that transformers once saved beside the weights; every model computes them from its config.
_LEGACY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Part:
    """One HF tensor and the rows of a parameter that it fills.

    The parameter, seen with shape `within`, holds the tensor's rows at the indices `at`, one piece after the other.
    Only axis 0 is split, so pieces are views of the parameter, for reading and writing without a copy.
    """

    name: str
    shape: tuple[int, ...]
    within: tuple[int, ...]
    at: tuple[tuple[int | slice, ...], ...] = ((),)
    has_bias: bool = False  # whether the model adds a bias to this weight's product
    routed: bool = False  # whether it is of a router or its experts: no linear layer in transformers 5

    def views(self, parameter: np.ndarray) -> list[np.ndarray]:
        """The pieces as views of the contiguous `parameter`.

        The last axis may have any length: scales and packed weights have the same rows as the weight itself.
        """
        whole = parameter.reshape(*self.within[:-1], -1)
        return [whole[index] for index in self.at]

    def put(self, parameter: np.ndarray, tensor: np.ndarray, columns: slice = slice(None)) -> None:
        """Write HF's tensor, or what has its rows, to some columns of the contiguous `parameter`."""
        rest = tensor.reshape(-1)
        for view in self.views(parameter):
            place = view[..., columns]
            place[...] = rest[: place.size].reshape(place.shape)
            rest = rest[place.size :]

    def take(self, parameter: np.ndarray) -> np.ndarray:
        """What `put` has written, `[rows, -1]`."""
        [first, *others] = views = self.views(parameter)
        if not others:
            return first.reshape(self.shape[0], -1)
        tensor = rest = np.empty(sum(view.size for view in views), parameter.dtype)
        for view in views:
            rest[: view.size].reshape(view.shape)[...] = view
            rest = rest[view.size :]
        return tensor.reshape(self.shape[0], -1)


def parameter_parts(config: DecoderConfig) -> dict[str, tuple[Part, ...]]:
    """For each parameter of a model (dotted path), the HF tensors that make it up.

    In HF's order, embedding first. Source: `jaxgen/models/decoder.py`, which defines the two fused layouts.
    """
    table = _same(EMBEDDING, config.vocab_size, config.hidden_size)
    for index in range(config.num_hidden_layers):
        table |= _layer_parts(index, config)
    table |= _same("model.norm.weight", config.hidden_size)
    if not config.tie_word_embeddings:
        table |= _same(HEAD, config.vocab_size, config.hidden_size)
    return table


def is_legacy_buffer(name: str) -> bool:
    """Whether a tensor is a rotary buffer of old checkpoints, which carries no information."""
    return _LEGACY_BUFFER.fullmatch(name) is not None


def logical_axes(config: DecoderConfig, name: str) -> tuple[str | None, ...]:
    """What each axis of a parameter, a dotted path, stands for: what a mesh is mapped to.

    "heads" are key-value heads with all that belongs to them, "mlp" feed-forward units, "experts" whole experts one
    after the other, "embed" the residual stream.

    >>> from jaxgen import MistralConfig
    >>> logical_axes(MistralConfig(), "model.layers.0.self_attn.o_proj.weight")
    ('embed', 'heads')
    """
    owner, module, kind = ["", *name.split(".")][-3:]
    if module in ("q_norm", "k_norm") and config.qk_norm == "whole":
        return ("heads",)
    rows, columns = _AXES.get(module, (None, None))
    rows, columns = ("experts", "mlp" if columns == "mlp" else columns) if owner == "experts" else (rows, columns)
    return (rows, columns) if kind == "weight" and module in _AXES else (rows,)


_AXES = {
    "embed_tokens": ("vocab", "embed"),
    "qkv_proj": ("heads", "embed"),
    "o_proj": ("embed", "heads"),
    "gate_up_proj": ("mlp", "embed"),
    "down_proj": ("embed", "mlp"),
    "lm_head": ("vocab", "embed"),
    "gate": (None, "embed"),
}


def _layer_parts(index: int, config: DecoderConfig) -> dict[str, tuple[Part, ...]]:
    layer = f"model.layers.{index}."
    width, ffn, size = config.hidden_size, config.intermediate_size, config.head_size
    kv_heads, groups = config.num_key_value_heads, config.query_groups
    attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
    queries, every = kv_heads * groups * size, slice(None)

    def qkv(kind: str, *columns: int) -> tuple[Part, ...]:
        within, biased = (kv_heads, groups + 2, size, *columns), config.qkv_bias
        return (
            Part(f"{attention}q_proj.{kind}", (queries, *columns), within, ((every, slice(groups)),), biased),
            Part(f"{attention}k_proj.{kind}", (kv_heads * size, *columns), within, ((every, groups),), biased),
            Part(f"{attention}v_proj.{kind}", (kv_heads * size, *columns), within, ((every, groups + 1),), biased),
        )

    def gate_up(kind: str, *columns: int) -> tuple[Part, ...]:
        within, biased = (ffn, 2, *columns), config.mlp_bias
        return (
            Part(f"{mlp}gate_proj.{kind}", (ffn, *columns), within, ((every, 0),), biased),
            Part(f"{mlp}up_proj.{kind}", (ffn, *columns), within, ((every, 1),), biased),
        )

    def fused(name: str, parts: tuple[Part, ...]) -> dict[str, tuple[Part, ...]]:
        """A parameter of several tensors; or of one, in which HF has their rows one after the other."""
        if not config.stacks_projections:
            return {name: parts}
        shape = (sum(part.shape[0] for part in parts), *parts[0].shape[1:])
        pieces = tuple(index for part in parts for index in part.at)
        return {name: (dataclasses.replace(parts[0], name=name, shape=shape, at=pieces),)}

    table = fused(f"{attention}qkv_proj.weight", qkv("weight", width))
    if config.qkv_bias:
        table |= fused(f"{attention}qkv_proj.bias", qkv("bias"))
    table |= _same(f"{attention}o_proj.weight", width, queries, has_bias=config.o_bias)
    if config.o_bias:
        table |= _same(f"{attention}o_proj.bias", width)
    if config.qk_norm:
        normed = (queries, kv_heads * size) if config.qk_norm == "whole" else (size, size)
        table |= _same(f"{attention}q_norm.weight", normed[0]) | _same(f"{attention}k_norm.weight", normed[1])
    routing = config.routing(index)
    if routing is not None:
        table |= _expert_parts(layer, config.hidden_size, routing)
    else:
        table |= fused(f"{mlp}gate_up_proj.weight", gate_up("weight", width))
        if config.mlp_bias:
            table |= fused(f"{mlp}gate_up_proj.bias", gate_up("bias"))
        table |= _same(f"{mlp}down_proj.weight", width, ffn, has_bias=config.mlp_bias)
        if config.mlp_bias:
            table |= _same(f"{mlp}down_proj.bias", width)
    for name in filter(None, NORMS[config.norms]):
        table |= _same(f"{layer}{name}.weight", width)
    return table


def _expert_parts(layer: str, width: int, routing: "Routing") -> dict[str, tuple[Part, ...]]:
    """Of a router and its experts: the rows of each lie together, as those of one feed-forward."""
    experts, size, every = routing.experts, routing.size, slice(None)
    names = [[f"{layer}{name}.weight" for name in routing.names(expert)] for expert in range(experts)]
    first, second = (experts, size, 2, width), (experts, width, size)
    gates_and_ups = [
        Part(name, (size, width), first, ((expert, every, which),), routed=True)
        for expert, (gate, up, _) in enumerate(names)
        for which, name in enumerate((gate, up))
    ]
    downs = [Part(down, (width, size), second, ((expert,),), routed=True) for expert, (*_, down) in enumerate(names)]
    router = Part(f"{layer}{routing.router}.weight", (experts, width), (experts, width), routed=True)
    return {
        f"{layer}mlp.gate.weight": (router,),
        f"{layer}mlp.experts.gate_up_proj.weight": tuple(gates_and_ups),
        f"{layer}mlp.experts.down_proj.weight": tuple(downs),
    }


def _same(name: str, *shape: int, has_bias: bool = False) -> dict[str, tuple[Part, ...]]:
    return {name: (Part(name, shape, shape, has_bias=has_bias),)}
