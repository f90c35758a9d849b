"""Gemma 3, its text part: windows in five of six layers, which rotate by a base of their own.

Norms stand before and after attention and feed-forward, and are scaled by 1 + w, in float32.
"""

import dataclasses
from typing import Any, no_type_check

from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.fields import POSITIVE_INT
from jaxgen.models.gemma import GemmaBlock, scaled_by
from jaxgen.models.gguf import Gguf
from jaxgen.models.two_ropes import TwoRopesConfig, pattern


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class Gemma3TextConfig(GemmaBlock, TwoRopesConfig):
    """The shape of a `Gemma3ForCausalLM`, with transformers 5's defaults.

    `layer_types=None`: every sixth layer has full attention, the others a sliding window. `rope_scaling` and
    `rope_theta` are those of layers with full attention, `rope_local_base_freq` is the base of the others. Raises
    `JaxgenError` for sizes that do not fit together. Source: transformers `Gemma3TextConfig`.

    >>> Gemma3TextConfig(num_hidden_layers=6).layer_types[4:]
    ('sliding_attention', 'full_attention')
    """

    vocab_size: int = 262208
    hidden_size: int = 2304
    intermediate_size: int = 9216
    num_hidden_layers: int = 26
    num_attention_heads: int = 8
    num_key_value_heads: int = 4
    head_dim: int | None = 256
    max_position_embeddings: int = 131072
    rope_theta: float = 1000000.0
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 2
    eos_token_id: int | tuple[int, ...] | None = 1
    pad_token_id: int | None = 0
    attention_bias: bool = False
    query_pre_attn_scalar: int = 256
    sliding_window: int | None = 4096
    final_logit_softcapping: float | None = None

    model_type = "gemma3_text"
    architecture = "Gemma3ForCausalLM"
    fixed_fields = GemmaBlock.fixed_fields | {"attn_logit_softcapping": (None,)}
    field_checks = {**TwoRopesConfig.field_checks, **GemmaBlock.field_checks}  # noqa: RUF012
    qk_norm = "head"

    @classmethod
    def _in_plain_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        fields = super()._in_plain_fields(dict(fields))
        every, layers = fields.pop("sliding_window_pattern", None), fields.get("num_hidden_layers", 26)
        if fields.get("layer_types") is None and POSITIVE_INT[0](every) and POSITIVE_INT[0](layers):
            fields["layer_types"] = pattern(every, layers)
        return fields


class Gemma3ForCausalLM(DecoderForCausalLM):
    """A Gemma 3 language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = Gemma3TextConfig(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                           num_attention_heads=2, num_key_value_heads=1, head_dim=8)
    >>> Gemma3ForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 50)
    """

    config_class = Gemma3TextConfig
    gguf = Gguf(
        "gemma3",
        rotates_neighbours=False,
        fields={"attention.sliding_window": "sliding_window"},
        optional={
            "rope.freq_base_swa": "rope_local_base_freq",
            "final_logit_softcapping": "final_logit_softcapping",
        },
        windows_by_layer=True,
        derived=scaled_by(largest=62),
    )
