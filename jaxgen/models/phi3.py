"""Phi-3, Phi-3.5, Phi-4 and Phi-4-mini: projections stacked as one tensor, and a part of each head that is rotated."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, no_type_check

from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.config import DecoderConfig
from jaxgen.models.fields import POSITIVE_INT
from jaxgen.models.gguf import Gguf
from jaxgen.models.rope import LongRope


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class Phi3Config(DecoderConfig):
    """The shape of a `Phi3ForCausalLM`, with transformers 5's defaults.

    `partial_rotary_factor`: the share of a head's dimensions that is rotated. `rope_scaling`: None, or a mapping as
    HF's, of `rope_type` "longrope". Such a model has other rotary positions for rows that are longer than its original
    context, from the first token on: a prompt within the original context may not go on beyond it. Raises `JaxgenError`
    for sizes that do not fit together. Source: transformers `Phi3Config`.

    >>> Phi3Config(partial_rotary_factor=0.75).rotary_size
    72
    """

    vocab_size: int = 32064
    hidden_size: int = 3072
    intermediate_size: int = 8192
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 4096
    rms_norm_eps: float = 1e-5
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 32000
    pad_token_id: int | None = 32000
    sliding_window: int | None = None
    partial_rotary_factor: float = 1.0
    rope_scaling: Any = None

    model_type = "phi3"
    architecture = "Phi3ForCausalLM"
    rope_types = ("default", "longrope")
    fixed_fields = {"lm_head_bias": (False,), "full_attn_mod": (1,), "interpolate_factor": (1,)}  # noqa: RUF012
    ignored_fields = frozenset({"resid_pdrop", "embd_pdrop", "embed_pdrop"})  # dropout, of training
    field_checks = {  # noqa: RUF012
        "partial_rotary_factor": (
            lambda value: isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1,
            "a number above 0 and at most 1",
        )
    }
    stacks_projections = True

    @property
    def rotary_size(self) -> int:
        """As `DecoderConfig.rotary_size`."""
        return int(self.head_size * self.partial_rotary_factor)

    @property
    def short_context(self) -> int | None:
        """How long a row may become whose prompt is not longer; None where all may have the whole context."""
        scaling = self.rope_scaling
        return scaling.original_max_position_embeddings if isinstance(scaling, LongRope) else None

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """As transformers 5 has them."""
        return super().rope_parameters | {"partial_rotary_factor": self.partial_rotary_factor}

    def to_hf(self) -> dict[str, Any]:
        """As `DecoderConfig.to_hf`, with the original context."""
        original = self.short_context
        return super().to_hf() | ({} if original is None else {"original_max_position_embeddings": original})

    @classmethod
    def _in_plain_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        for name in ("rope_scaling", "rope_parameters"):
            given = fields.get(name)
            if isinstance(given, Mapping) and "partial_rotary_factor" in given:
                kept = {key: value for key, value in given.items() if key != "partial_rotary_factor"}
                fields = {"partial_rotary_factor": given["partial_rotary_factor"]} | fields | {name: kept}
        return fields


def _with_rotary(fields: dict[str, Any]) -> dict[str, Any]:
    """`Gguf.derived`: the rotated share of heads, LongRoPE's factors, and a window of 0 for none."""
    fields = dict(fields)
    rotated, original, amplitude = (fields.pop(name, None) for name in ("rotary_size", "original", "amplitude"))
    factors = {name: fields.pop(name) for name in ("short_factor", "long_factor") if name in fields}
    if factors:
        if original is None:
            raise UnsupportedError("rope_factors are not supported without phi3.rope.scaling.original_context_length")
        said = {"original_max_position_embeddings": original, "attention_factor": amplitude}
        fields["rope_scaling"] = {"rope_type": "longrope", **factors, **said}
    elif amplitude is not None:
        raise UnsupportedError(f"phi3.rope.scaling.attn_factor={amplitude!r:.80} is not supported without rope_factors")
    if fields.get("sliding_window") == 0:
        fields["sliding_window"] = None
    size, width, heads = fields["head_dim"], fields["hidden_size"], fields["num_attention_heads"]
    if size is None and POSITIVE_INT[0](width) and POSITIVE_INT[0](heads):
        size = width // heads
    if not (POSITIVE_INT[0](rotated) and POSITIVE_INT[0](size) and rotated <= size):
        raise JaxgenError(f"phi3.rope.dimension_count={rotated!r:.80} must be at most the size of heads, {size!r:.80}")
    share = rotated / size  # of which the config takes the product with the size, rounded down
    fields["partial_rotary_factor"] = share if int(size * share) == rotated else math.nextafter(share, math.inf)
    return fields


class Phi3ForCausalLM(DecoderForCausalLM):
    """A Phi-3 language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = Phi3Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                     num_attention_heads=2)
    >>> Phi3ForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 50)
    """

    config_class = Phi3Config
    gguf = Gguf(
        "phi3",
        rotates_neighbours=False,
        fields={"rope.dimension_count": "rotary_size"},
        optional={"rope.scaling.original_context_length": "original", "rope.scaling.attn_factor": "amplitude"},
        defaults={"rope.freq_base": 10000.0},
        derived=_with_rotary,
    )
