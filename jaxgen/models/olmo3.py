"""OLMo 3: OLMo 2's block, with windows in three of four layers; rotary positions are scaled in the fourth only."""

import dataclasses
from typing import Any, no_type_check

from jaxgen.models.causal_lm import DecoderForCausalLM
from jaxgen.models.gguf import Gguf
from jaxgen.models.olmo2 import OlmoBlock
from jaxgen.models.two_ropes import TwoRopesConfig


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class Olmo3Config(OlmoBlock, TwoRopesConfig):
    """The shape of an `Olmo3ForCausalLM`, with transformers 5's defaults.

    `layer_types=None`: every fourth layer has full attention, the others a sliding window. `rope_scaling` and
    `rope_theta` are those of layers with full attention, `rope_local_base_freq` is the base of the others. Raises
    `JaxgenError` for sizes that do not fit together. Source: transformers `Olmo3Config`.

    >>> Olmo3Config(num_hidden_layers=4).layer_types[2:]
    ('sliding_attention', 'full_attention')
    """

    vocab_size: int = 50304
    hidden_size: int = 4096
    intermediate_size: int = 11008
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int | None = None
    max_position_embeddings: int = 2048
    rms_norm_eps: float = 1e-5
    rope_theta: float = 500000.0
    rope_local_base_freq: float = 500000.0
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = 50279
    pad_token_id: int | None = 1
    attention_bias: bool = False
    sliding_window: int | None = 4096

    model_type = "olmo3"
    architecture = "Olmo3ForCausalLM"
    sliding_pattern = 4

    @classmethod
    def _in_plain_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        # One base in transformers 4's spelling: that of all layers.
        base = fields.get("rope_theta")
        fields = super()._in_plain_fields(fields)
        return fields if base is None else {"rope_local_base_freq": base} | fields

    def to_hf(self) -> dict[str, Any]:
        """As `DecoderConfig.to_hf`."""
        return {name: value for name, value in super().to_hf().items() if name != "rope_local_base_freq"}


class Olmo3ForCausalLM(DecoderForCausalLM):
    """An OLMo 3 language model with random weights; `AutoModelForCausalLM.from_pretrained` loads real ones.

    >>> import jax.numpy as jnp
    >>> from flax import nnx
    >>> config = Olmo3Config(vocab_size=50, hidden_size=16, intermediate_size=32, num_hidden_layers=1,
    ...                      num_attention_heads=2)
    >>> Olmo3ForCausalLM(config, rngs=nnx.Rngs(0))(jnp.array([[1, 2, 3]])).logits.shape
    (1, 3, 50)
    """

    config_class = Olmo3Config
    gguf = Gguf(
        "olmo2",
        rotates_neighbours=False,
        told_by="attention.sliding_window",
        optional={"rope.freq_base_swa": "rope_local_base_freq"},
        windows_by_layer=True,
        derived=lambda fields: {"rope_local_base_freq": fields["rope_theta"]} | fields,
    )
