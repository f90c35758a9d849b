"""The one table between Hugging Face tensor names and jaxgen's parameters, for loading and for saving."""

import dataclasses
import re

import numpy as np

from jaxgen.config import MistralConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Buffers that transformers once saved beside the weights; every model computes them from its config.
_LEGACY_BUFFER = re.compile(r"model\.(layers\.\d+\.self_attn\.)?rotary_emb\.inv_freq")


@dataclasses.dataclass(frozen=True)
class Part:
    """One HF tensor and the rows of a parameter that it fills.

    The parameter, seen with shape `within`, holds the tensor at index `at`. Only axis 0 is split, so this is a
    view of the parameter, for reading and writing without a copy.
    """

    name: str
    shape: tuple[int, ...]
    within: tuple[int, ...]
    at: tuple[int | slice, ...] = ()

    def view(self, parameter: np.ndarray) -> np.ndarray:
        """The part's rows as a view of the contiguous `parameter`, in HF's order.

        The last axis may have any length: scales and packed weights have the same rows as the weight itself.
        """
        return parameter.reshape(*self.within[:-1], -1)[self.at]


def parameter_parts(config: MistralConfig) -> dict[str, tuple[Part, ...]]:
    """For each parameter of `MistralForCausalLM` (dotted path), the HF tensors that make it up.

    In HF's order, embedding first. Source: `jaxgen/model.py`, which defines the two fused layouts.
    """
    table = _same(EMBEDDING, config.vocab_size, config.hidden_size)
    for index in range(config.num_hidden_layers):
        table |= _layer_parts(f"model.layers.{index}.", config)
    table |= _same("model.norm.weight", config.hidden_size)
    if not config.tie_word_embeddings:
        table |= _same(HEAD, config.vocab_size, config.hidden_size)
    return table


def is_legacy_buffer(name: str) -> bool:
    """Whether a tensor is a rotary buffer of old checkpoints, which carries no information."""
    return _LEGACY_BUFFER.fullmatch(name) is not None


def _layer_parts(layer: str, config: MistralConfig) -> dict[str, tuple[Part, ...]]:
    width, ffn, size = config.hidden_size, config.intermediate_size, config.head_size
    kv_heads, groups = config.num_key_value_heads, config.query_groups
    attention, mlp = f"{layer}self_attn.", f"{layer}mlp."
    by_head = (kv_heads, groups + 2, size, width)
    by_unit = (ffn, 2, width)
    every = slice(None)
    return {
        f"{attention}qkv_proj.weight": (
            Part(
                f"{attention}q_proj.weight",
                (kv_heads * groups * size, width),
                by_head,
                (every, slice(groups)),
            ),
            Part(f"{attention}k_proj.weight", (kv_heads * size, width), by_head, (every, groups)),
            Part(f"{attention}v_proj.weight", (kv_heads * size, width), by_head, (every, groups + 1)),
        ),
        **_same(f"{attention}o_proj.weight", width, kv_heads * groups * size),
        f"{mlp}gate_up_proj.weight": (
            Part(f"{mlp}gate_proj.weight", (ffn, width), by_unit, (every, 0)),
            Part(f"{mlp}up_proj.weight", (ffn, width), by_unit, (every, 1)),
        ),
        **_same(f"{mlp}down_proj.weight", width, ffn),
        **_same(f"{layer}input_layernorm.weight", width),
        **_same(f"{layer}post_attention_layernorm.weight", width),
    }


def _same(name: str, *shape: int) -> dict[str, tuple[Part, ...]]:
    return {name: (Part(name, shape, shape),)}
