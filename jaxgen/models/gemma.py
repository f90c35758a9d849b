"""What Gemma 2 and 3 have in common: their block."""

from collections.abc import Callable
from typing import Any

from jaxgen.models.fields import POSITIVE_INT, POSITIVE_NUMBER


class GemmaBlock:
    """Beside a `DecoderConfig`: what it switches on in the shared block."""

    norms = "around"
    norm_offset = 1.0
    norms_in_float32 = True
    activation = "gelu_pytorch_tanh"
    activation_field = "hidden_activation"
    rounds_embedding_multiplier = True
    overflows_float16 = True
    fixed_fields = {  # noqa: RUF012
        "hidden_activation": ("gelu_pytorch_tanh",),
        "hidden_act": ("gelu_pytorch_tanh",),
        "use_bidirectional_attention": (False,),
    }
    field_checks = {  # noqa: RUF012
        "query_pre_attn_scalar": POSITIVE_INT,
        **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping"), POSITIVE_NUMBER),
    }
    ignored_fields = frozenset({"cache_implementation", "_sliding_window_pattern", "sliding_window_size"})
    nullable_fields = ("final_logit_softcapping", "attn_logit_softcapping")

    hidden_size: int
    attention_bias: bool
    query_pre_attn_scalar: Any

    @property
    def embedding_multiplier(self) -> float:
        """Of embeddings, but not of the head that shares their weights."""
        return self.hidden_size**0.5

    @property
    def attention_multiplier(self) -> float:
        """Of scores."""
        return self.query_pre_attn_scalar**-0.5

    @property
    def qkv_bias(self) -> bool:
        """Whether queries, keys and values have biases."""
        return self.attention_bias

    o_bias = qkv_bias


def scaled_by(largest: int) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """`Gguf.derived` of a release whose largest model has so many layers: what its scores are multiplied by.

    As llama.cpp has it in its code: the 27B models have the size that heads would have by the width, the others that
    which they have.
    """

    def derived(fields: dict[str, Any]) -> dict[str, Any]:
        width, heads = fields["hidden_size"], fields["num_attention_heads"]
        if not (POSITIVE_INT[0](width) and POSITIVE_INT[0](heads)):
            return fields  # of which the config says what is wrong
        by_width = fields["num_hidden_layers"] == largest or fields["head_dim"] is None
        return fields | {"query_pre_attn_scalar": width // heads if by_width else fields["head_dim"]}

    return derived
