"""Configs whose layers with a sliding window have rotary positions of their own: Gemma 3 and OLMo 3."""

import dataclasses
from collections.abc import Mapping
from typing import Any, no_type_check

from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.models.config import DecoderConfig
from jaxgen.models.fields import MOST_LAYERS, POSITIVE_NUMBER

SLIDING, FULL = "sliding_attention", "full_attention"


@no_type_check  # as DecoderConfig
@dataclasses.dataclass(kw_only=True)
class TwoRopesConfig(DecoderConfig):
    """`rope_theta` and `rope_scaling` are those of layers with full attention.

    Layers with a sliding window have the base `rope_local_base_freq`, and no scaling. Raises as `DecoderConfig`.
    """

    rope_scaling: Any = None
    rope_local_base_freq: float = 10000.0
    layer_types: tuple[str, ...] | None = None  # None: as `sliding_pattern` says

    rope_types = ("default", "linear", "llama3", "yarn")
    field_checks = {"rope_local_base_freq": POSITIVE_NUMBER}  # noqa: RUF012
    sliding_pattern = 6  # one of so many layers has full attention: the last

    def __post_init__(self):
        if self.layer_types is None and isinstance(self.num_hidden_layers, int):
            object.__setattr__(self, "layer_types", pattern(self.sliding_pattern, self.num_hidden_layers))
        super().__post_init__()

    @property
    def ropes(self) -> list[tuple[float, Any] | None]:
        """As `DecoderConfig.ropes`."""
        local, full = (self.rope_local_base_freq, None), (self.rope_theta, self.rope_scaling)
        return [local if kind == SLIDING else full for kind in self.layer_types or ()]

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """As transformers 5 has them, for each kind of layer."""
        local = {"rope_type": "default", "rope_theta": self.rope_local_base_freq}
        return {FULL: super().rope_parameters, SLIDING: local}

    @classmethod
    def _in_plain_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        given = fields.get("rope_parameters")
        if not isinstance(given, Mapping) or not given.keys() & {SLIDING, FULL}:
            return fields
        if other := given.keys() - {SLIDING, FULL}:
            raise UnsupportedError(f"config: rope_parameters of {sorted(other)!r:.80}, beside those of kinds of layers")
        local = given.get(SLIDING) or {}
        if not isinstance(local, Mapping):
            raise JaxgenError(f"config: rope_parameters.{SLIDING}={local!r:.80} must be an object")
        for name, value in local.items():
            if name != "rope_theta" and (name, value) != ("rope_type", "default"):
                raise UnsupportedError(
                    f"config: rope_parameters.{SLIDING}.{name:.80}={value!r:.80} is not supported; jaxgen implements "
                    "rope_type='default' there"
                )
        fields = fields | {"rope_parameters": given.get(FULL)}
        if "rope_theta" in local:
            base, old = local["rope_theta"], fields.get("rope_local_base_freq")
            if old not in (None, base):
                raise JaxgenError(f"config: contradicting bases of {SLIDING}: {base!r:.60} and {old!r:.60}")
            fields["rope_local_base_freq"] = base
        return fields


def pattern(every: int, layers: int) -> tuple[str, ...]:
    """One layer in `every` with full attention, and the others with a sliding window."""
    if layers > MOST_LAYERS:
        raise JaxgenError(f"num_hidden_layers={layers} is more than {MOST_LAYERS}")
    return tuple(SLIDING if (layer + 1) % every else FULL for layer in range(layers))
