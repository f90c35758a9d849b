"""What all configs share: Hugging Face's config.json as a dataclass that refuses what it does not understand."""

import dataclasses
import os
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar, Literal, Self, no_type_check

from jaxgen.cache import Slots
from jaxgen.errors import NO_REMOTE_CODE, JaxgenError, UnsupportedError, listed
from jaxgen.files import read_json
from jaxgen.models import rope
from jaxgen.models.fields import CHECKS, FIXED, IGNORED, NULLABLE, SETTABLE, all_full, is_positive_number
from jaxgen.paths import as_path

# Where a layer has norms, and HF's names of them: before and after attention, before and after the feed-forward.
NORMS: dict[str, tuple[str | None, str | None, str | None, str | None]] = {
    "before": ("input_layernorm", None, "post_attention_layernorm", None),
    "after": (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    "around": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
}


@no_type_check  # fields come from files; __post_init__ checks them, and says what is wrong
@dataclasses.dataclass(kw_only=True)
class DecoderConfig:
    """The shape of a `DecoderForCausalLM`, with HF's field names; a family adds its own, and HF's defaults.

    `head_dim=None` becomes `hidden_size // num_attention_heads`. Raises `JaxgenError` for sizes that do not fit
    together.

    The token ids can be set later, for whoever saves or reads the config: as in transformers 5, generation asks
    `model.generation_config` and not this one. So can `use_cache`, which changes nothing. A size cannot.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int | None = None
    max_position_embeddings: int
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    tie_word_embeddings: bool = False
    bos_token_id: int | None = None
    eos_token_id: int | tuple[int, ...] | None = None
    pad_token_id: int | None = None

    # What a family says of itself.
    model_type: ClassVar[str]
    architecture: ClassVar[str]
    rope_types: ClassVar[tuple[str, ...]] = ("default",)
    scales_queries: ClassVar[bool] = False  # by their positions, where the rope's parameters say so
    field_checks: ClassVar[Mapping[str, tuple[Any, str]]] = {}  # of its own fields: a function, and what it wants
    nullable_fields: ClassVar[tuple[str, ...]] = ()
    layered_fields: ClassVar[tuple[str, ...]] = ("layer_types",)  # those with a value for each layer, or None
    activation_field: ClassVar[str] = "hidden_act"  # HF's name of `activation`
    fixed_fields: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    ignored_fields: ClassVar[frozenset[str]] = frozenset()

    # What the block asks; a family makes a field or a property of what it has.
    sliding_window: ClassVar[int | None] = None
    layer_types: ClassVar[tuple[str, ...] | None] = None  # None: all layers alike
    rope_scaling: ClassVar[Any] = None
    qkv_bias: ClassVar[Any] = False
    o_bias: ClassVar[Any] = False
    mlp_bias: ClassVar[Any] = False
    # Norms of each head's queries and keys, or of all heads' together.
    qk_norm: ClassVar[Literal["head", "whole", False]] = False
    norms: ClassVar[Any] = "before"  # a key of NORMS
    norm_offset: ClassVar[Any] = 0.0  # what is added to the weights of norms
    norms_in_float32: ClassVar[Any] = False  # whether norms are scaled before they are rounded to the compute dtype
    stacks_projections: ClassVar[Any] = False  # whether queries, keys and values, gate and up are one tensor each in HF
    rotates_in_float32: ClassVar[Any] = False
    activation: ClassVar[Any] = "silu"  # or "gelu_pytorch_tanh"
    embedding_multiplier: ClassVar[Any] = 1.0
    residual_multiplier: ClassVar[Any] = 1.0  # of what attention and feed-forward add to the residual stream
    attention_multiplier: ClassVar[Any] = None  # of scores; None for 1 / sqrt(head_dim)
    rounds_embedding_multiplier: ClassVar[Any] = False  # to the compute dtype, before it is used
    attn_logit_softcapping: ClassVar[Any] = None  # the limit of scores
    final_logit_softcapping: ClassVar[Any] = None  # the limit of logits
    logits_scaling: ClassVar[Any] = 1.0  # what logits are divided by
    overflows_float16: ClassVar[bool] = False  # whether released models' activations do
    experts_field: ClassVar[str | None] = None  # the field that says how many experts there are

    is_encoder_decoder = False
    _commit_hash = None  # which transformers' pipelines ask for before they say what they cannot run
    use_cache = True  # scripts that train set it; jaxgen generates with a cache, and trains without

    def __post_init__(self):
        if self.num_key_value_heads is None:
            object.__setattr__(self, "num_key_value_heads", self.num_attention_heads)
        if isinstance(self.layer_types, list):
            object.__setattr__(self, "layer_types", tuple(self.layer_types))
        if isinstance(self.rope_scaling, Mapping):  # as HF's configs are made
            object.__setattr__(self, "rope_scaling", self._scaling(self.rope_scaling))
        problems = [
            f"{name}={getattr(self, name)!r:.80} must be {wanted}"
            for name, (is_right, wanted) in self._checks().items()
            if not is_right(getattr(self, name)) and not (getattr(self, name) is None and self._may_be_null(name))
        ]
        if not problems and self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if not problems and not self.head_size:
            problems.append(
                f"num_attention_heads={self.num_attention_heads} is more than hidden_size={self.hidden_size}, and "
                "there is no head_dim"
            )
        problems += [] if problems else self._wrong_layers()
        problems += [] if problems else self._wrong_rope()
        beta = getattr(self.rope_scaling, "llama_4_scaling_beta", None)
        if not problems and beta is not None and not self.scales_queries:
            problems.append(f"rope_scaling.llama_4_scaling_beta={beta!r} is of Ministral 3, and not of this family")
        problems += self._misfits() if not problems else []
        if problems:
            raise JaxgenError(f"{type(self).__name__}: " + "; ".join(problems))
        object.__setattr__(self, "head_dim", self.head_size)
        for name, (is_right, _) in self._checks().items():  # an int of the file may be beyond int32
            if is_right is is_positive_number and getattr(self, name) is not None:
                object.__setattr__(self, name, float(getattr(self, name)))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self._checks() and name not in vars(self):  # while it is made; __post_init__ checks
            object.__setattr__(self, name, value)
        elif name in SETTABLE:
            object.__setattr__(self, name, self._checked(name, tuple(value) if isinstance(value, list) else value))
        elif name in self._checks():
            raise JaxgenError(
                f"config.{name}={value!r:.60}: a config keeps its sizes, with which models are built "
                f"({name}={getattr(self, name)!r}); dataclasses.replace(config, {name}=...) makes another one"
            )
        elif name not in self._fixed():
            raise JaxgenError(f"config.{name}: {type(self).__name__} has no such field")
        elif refusal := self._refusal(name, value):
            raise UnsupportedError(f"config: {refusal}")

    def __init_subclass__(cls) -> None:
        cls.__hash__ = DecoderConfig.__hash__  # which a dataclass of its own would not inherit

    def __hash__(self) -> int:  # of what cannot change: jit compares static arguments by it
        return hash(tuple(getattr(self, name) for name in self._checks() if name not in SETTABLE))

    def _misfits(self) -> list[str]:
        """What is wrong with a family's own fields, each of which is right by itself."""
        experts, chosen = self.experts_field and getattr(self, self.experts_field), "num_experts_per_tok"
        if experts and getattr(self, chosen) > experts:
            return [f"{chosen}={getattr(self, chosen)} is more than {self.experts_field}={experts}"]
        return []

    def routing(self, layer: int) -> Any:
        """How a layer's experts are chosen (`jaxgen.models.experts.Routing`); None where it has one feed-forward."""
        return None

    @property
    def head_size(self) -> int:
        """`head_dim` as the int that it always is after construction."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def rotary_size(self) -> int:
        """How many of a head's dimensions are rotated: the first ones."""
        return self.head_size

    @property
    def ropes(self) -> list[tuple[float, Any] | None]:
        """Base and scaling of each layer's rotary positions; None for a layer that has none."""
        return [(self.rope_theta, self.rope_scaling)] * self.num_hidden_layers

    @property
    def query_groups(self) -> int:
        """Query heads per key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def with_layers(self, layers: Iterable[int]) -> Self:
        """The config of a model of these layers; of one, it is equal for all that differ in their weights only."""
        layers = tuple(layers)
        own = {name: values for name in self.layered_fields if (values := getattr(self, name)) is not None}
        kept = {name: tuple(values[layer] for layer in layers) for name, values in own.items()}
        alike = type(self).layer_windows is DecoderConfig.layer_windows  # a damaged count is not spelt out
        if self.layer_types is None and not alike and len(set(windows := self.layer_windows)) > 1:
            kinds = ["full_attention" if window is None else "sliding_attention" for window in windows]
            kept["layer_types"] = tuple(kinds[layer] for layer in layers)
        return dataclasses.replace(self, num_hidden_layers=len(layers), **kept)

    @property
    def layer_windows(self) -> tuple[int | None, ...]:
        """How far back each layer looks, a token itself included; None for all the way."""
        if self.layer_types is None:
            return (self.sliding_window,) * self.num_hidden_layers
        return tuple(self.sliding_window if kind == "sliding_attention" else None for kind in self.layer_types)

    def cache_slots(self, total_length: int, ahead: int = 0) -> Slots:
        """Key-value slots that a row of at most `total_length` tokens needs: in every layer, or in each.

        `ahead`: how many tokens it reads at a time, if more than one (`jaxgen.cache`).
        """
        windows = self.layer_windows
        slots = tuple(total_length if window is None else min(window + ahead, total_length) for window in windows)
        return slots if len(set(slots)) > 1 else slots[0]

    @classmethod
    def from_hf(cls, source: "str | os.PathLike[str] | Mapping[str, Any]") -> Self:
        """Read a Hugging Face config: a dict, a config.json, or the directory that holds one.

        Reads both `rope_theta`/`rope_scaling` (transformers 4) and `rope_parameters` (transformers 5).
        Raises one `UnsupportedError`, naming each field and value that would change the mathematics and that
        jaxgen does not implement, and each field that it does not know; `JaxgenError` for other wrong values.

        >>> from jaxgen import MistralConfig
        >>> MistralConfig.from_hf({"model_type": "mistral", "sliding_window": None}).sliding_window is None
        True
        """
        fields = cls._in_plain_fields(read_config(source))
        if fields.get("model_type") is None:
            raise UnsupportedError(f"config: model_type is missing; jaxgen reads model_type={cls.model_type!r}")
        if refusal := cls._refusal("model_type", fields["model_type"]):  # whose other fields say nothing to us
            raise UnsupportedError(f"config: {refusal}")
        known = cls._checks()
        if "layer_types" not in known and all_full(fields.get("layer_types")):
            window = (
                fields.get("sliding_window", known_default(cls, "sliding_window"))
                if "sliding_window" in known
                else None
            )
            if window is None:
                del fields["layer_types"]  # transformers 5 writes it also where all layers are alike
        refused = [refusal for name, value in fields.items() if (refusal := cls._refusal(name, value))]
        kept: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in fields.items() if name in known
        }
        context, base = (known_default(cls, name) for name in ("max_position_embeddings", "rope_theta"))
        context = fields.get("max_position_embeddings", context)
        kept["rope_theta"], scaling, *(unfit, problems) = rope.parse(fields, cls.rope_types, context, base)
        refused += unfit
        if "rope_scaling" in known:
            kept["rope_scaling"] = scaling
        try:
            config = cls(**kept)
        except JaxgenError as error:
            config, problems = None, [*problems, str(error)]
        if config is None or refused or problems:
            raise (UnsupportedError if refused else JaxgenError)(f"config: {listed([*refused, *problems])}")
        return config

    @classmethod
    def _in_plain_fields(cls, fields: dict[str, Any]) -> dict[str, Any]:
        """A config.json with a family's own spellings put into this class's fields."""
        return fields

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: "str | os.PathLike[str]", **options: Any) -> Self:
        """Read the config.json of a directory or hub id.

        `options` are `revision`, `local_files_only`, `cache_dir` and `token`, as in
        `huggingface_hub.snapshot_download`; and fields, which replace what the file says. How the weights are
        quantised, if they are, is not part of it. Raises as `from_hf`.

        >>> from jaxgen import MistralConfig, demo
        >>> MistralConfig.from_pretrained(demo.path(), num_hidden_layers=2).num_hidden_layers
        2
        """
        return cls.from_hf(cls.replaced(*config_of(pretrained_model_name_or_path, **options)))

    @classmethod
    def replaced(cls, read: dict[str, Any], fields: dict[str, Any]) -> dict[str, Any]:
        """What a config.json says, with `fields` of this class in the place of its own."""
        for name in fields.keys() - cls._checks().keys():
            raise JaxgenError(f"from_pretrained: {cls.__name__} has no field {name!r}")
        return {name: value for name, value in read.items() if name != "quantization_config"} | fields

    def to_dict(self) -> dict[str, Any]:
        """`to_hf`, under HF's name."""
        return self.to_hf()

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers 4 and 5 read back as this model (without the weights' dtype)."""
        given = {name: getattr(self, name) for name in self._checks() if name != "rope_scaling"}
        scaling = rope.to_hf(self.rope_scaling)
        return {
            "architectures": [self.architecture],
            "model_type": self.model_type,
            self.activation_field: self.activation,
            **{name: list(value) if isinstance(value, tuple) else value for name, value in given.items()},
            **({} if self.rope_scaling is None else {"rope_scaling": scaling}),  # for transformers 4
            "rope_parameters": self.rope_parameters,
        }

    @property
    def rope_parameters(self) -> dict[str, Any]:
        """As transformers 5 has them."""
        return rope.to_hf(self.rope_scaling) | {"rope_theta": self.rope_theta}

    def _wrong_rope(self) -> list[str]:
        """What is wrong with rotary positions."""
        pairs, scaling = self.rotary_size // 2, self.rope_scaling
        if self.rotary_size % 2 or not pairs:
            return [f"head_dim={self.head_dim} must be even for rotary embeddings, of which {self.rotary_size} rotate"]
        if isinstance(scaling, rope.Yarn) and self.rope_theta == 1:
            return [f"rope_theta={self.rope_theta} must not be 1 with rope_type='yarn', which divides by its log"]
        if isinstance(scaling, rope.LongRope):
            factors = {"short_factor": scaling.short_factor, "long_factor": scaling.long_factor}
            return [
                f"rope_scaling.{name} has {len(given)} numbers, and {pairs} pairs of a head rotate"
                for name, given in factors.items()
                if len(given) != pairs
            ]
        return []

    def _wrong_layers(self) -> list[str]:
        """What is wrong with `layer_types`."""
        kinds = self.layer_types or ()
        if kinds and len(kinds) != self.num_hidden_layers:
            return [f"layer_types names {len(kinds)} layers, num_hidden_layers={self.num_hidden_layers}"]
        if "sliding_attention" in kinds and self.sliding_window is None:
            return ["layer_types has layers with a sliding window, and there is no sliding_window"]
        return []

    def _scaling(self, given: Mapping[str, Any]) -> Any:
        fields, context = {"rope_scaling": given, "rope_theta": self.rope_theta}, self.max_position_embeddings
        _, scaling, refused, problems = rope.parse(fields, self.rope_types, context, self.rope_theta)
        if refused or problems:
            raise JaxgenError(f"{type(self).__name__}: {listed([*refused, *problems])}")
        return scaling

    @classmethod
    def _checks(cls) -> dict[str, tuple[Any, str]]:
        """Check and expectation of each field."""
        known = {**CHECKS, **cls.field_checks}
        return {field.name: known[field.name] for field in dataclasses.fields(cls)}

    @classmethod
    def _fixed(cls) -> dict[str, tuple[Any, ...]]:
        return {**FIXED, **cls.fixed_fields, "model_type": (cls.model_type,)}

    @classmethod
    def _may_be_null(cls, name: str) -> bool:
        return name in NULLABLE or name in cls.nullable_fields

    @classmethod
    def _checked(cls, name: str, value: Any) -> Any:
        is_right, wanted = CHECKS[name]
        if not is_right(value) and not (value is None and cls._may_be_null(name)):
            raise JaxgenError(f"{cls.__name__}: {name}={value!r:.60} must be {wanted}")
        return value

    @classmethod
    def _refusal(cls, name: str, value: Any) -> str | None:
        """Why a field of config.json is refused, whatever the others say."""
        if name in cls._checks() or name in IGNORED or name in cls.ignored_fields:
            return None
        if name in rope.FIELDS or name.startswith("unsloth_"):
            return None
        if name not in (fixed := cls._fixed()):
            return (
                f"{name:.80}={value!r:.80} is not a field of {cls.__name__} that jaxgen knows; "
                "it may change the mathematics. Remove it from config.json if it does not"
            )
        # Compare types too: JSON's 0 and false are equal in Python, and neither should pass for the other.
        if any(value == allowed and type(value) is type(allowed) for allowed in (*fixed[name], None)):
            return None
        supported = " or ".join(repr(allowed) for allowed in fixed[name])
        return f"{name}={value!r:.80} is not supported; jaxgen implements {supported}"


def config_of(
    name_or_path: Any,
    *,
    revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: "str | os.PathLike[str] | None" = None,
    token: str | bool | None = None,
    trust_remote_code: bool = False,
    **fields: Any,
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the config.json of a directory or hub id says, and the options that are not about where it is."""
    from jaxgen.convert.hub import locate

    if trust_remote_code:
        raise UnsupportedError(NO_REMOTE_CODE)
    placed: dict[str, Any] = {"local_files_only": local_files_only, "cache_dir": cache_dir, "token": token}
    return read_config(locate(name_or_path, files=("config.json",), revision=revision, **placed)), fields


def known_default(kind: type, name: str) -> Any:
    """The default of a dataclass's field."""
    return next(field.default for field in dataclasses.fields(kind) if field.name == name)


def read_config(source: "str | os.PathLike[str] | Mapping[str, Any]") -> dict[str, Any]:
    """The fields of a config: a mapping, a config.json, or the directory that holds one."""
    if isinstance(source, Mapping):
        return dict(source)
    path = as_path(source, "config", "a mapping, a config.json, or the directory that holds one")
    path = path / "config.json" if os.path.isdir(path) else path
    return read_json(path)
