"""Ministral 3 and Devstral 2: positions stretched by YaRN, and queries that grow with the distance."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, Self, no_type_check

from jaxgen.errors import UnsupportedError
from jaxgen.models import rope
from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.config import read_config
from jaxgen.models.gguf import Gguf
from jaxgen.models.mistral import MistralConfig

_ROPE = rope.Yarn(
    factor=16.0, original_max_position_embeddings=16384, beta_fast=32.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
    llama_4_scaling_beta=0.1,
)  # fmt: skip


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class Ministral3Config(MistralConfig):
    """The shape of a `Ministral3ForCausalLM`, with transformers 5's defaults.

    `rope_scaling` as for `LlamaConfig`; with `llama_4_scaling_beta`, the query at position p is multiplied by
    `1 + llama_4_scaling_beta * log(1 + p // original_max_position_embeddings)`. Raises `JaxgenError` for sizes that do
    not fit together. Source: transformers `Ministral3Config`.

    >>> Ministral3Config().rope_parameters["llama_4_scaling_beta"]
    0.1
    """

    vocab_size: int = 131072
    num_hidden_layers: int = 34
    head_dim: int | None = 128
    max_position_embeddings: int = 262144
    rms_norm_eps: float = 1e-5
    rope_theta: float = 1000000.0
    rope_scaling: Any = _ROPE
    sliding_window: int | None = None
    pad_token_id: int | None = 11

    model_type = "ministral3"
    architecture = "Ministral3ForCausalLM"
    rope_types = ("default", "yarn")
    scales_queries = True

    @classmethod
    def from_hf(cls, source: "str | os.PathLike[str] | Mapping[str, Any]") -> Self:
        """As `DecoderConfig.from_hf`; a config that says nothing of rotary positions has those of the release."""
        fields = read_config(source)
        if not any(fields.get(name) for name in rope.FIELDS):
            fields["rope_parameters"] = rope.to_hf(_ROPE) | {"rope_theta": cls.rope_theta}
        return super().from_hf(fields)


def _with_steepness(fields: dict[str, Any]) -> dict[str, Any]:
    """`Gguf.derived`: what the file says of queries is part of HF's scaling; the other `mscale` is always 1."""
    scaling = fields.get("rope_scaling")
    if scaling is None:
        raise UnsupportedError("attention.temperature_scale is not supported without rope.scaling.type='yarn'")
    moved = {"mscale_all_dim": fields.get("mscale_all_dim"), "llama_4_scaling_beta": fields["llama_4_scaling_beta"]}
    if moved["mscale_all_dim"] is not None:
        moved["mscale"] = 1.0
    return {name: value for name, value in fields.items() if name not in moved} | {"rope_scaling": scaling | moved}


class Ministral3ForCausalLM(DecoderForCausalLM):
    """A Ministral 3 language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = Ministral3Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                           num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    >>> Ministral3ForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 50)
    """

    config_class = Ministral3Config
    gguf = Gguf(
        "mistral3",
        rotates_neighbours=True,
        told_by="attention.temperature_scale",
        fields={"attention.temperature_scale": "llama_4_scaling_beta"},
        optional={"rope.scaling.yarn_log_multiplier": "mscale_all_dim"},
        derived=_with_steepness,
    )
