"""MistralConfig: a Hugging Face config.json as a dataclass that refuses what it does not understand."""

import dataclasses
import os
from collections.abc import Mapping
from typing import Any, no_type_check

from jaxgen.errors import NO_REMOTE_CODE, JaxgenError, UnsupportedError, listed
from jaxgen.files import read_json
from jaxgen.paths import as_path

# Fields with one value that jaxgen implements; any other value would change the mathematics.
_FIXED = {
    "model_type": ("mistral",),
    "hidden_act": ("silu", "swish"),
    "attention_bias": (False,),
    "mlp_bias": (False,),
    "is_encoder_decoder": (False,),
    "add_cross_attention": (False,),
    "is_decoder": (False, True),
    "pretraining_tp": (1,),
    "layer_types": (None,),
    "auto_map": (None,),
    "quantization_config": (None,),
    "adapters": (None,),
    "chunk_size_feed_forward": (0,),
}

# Fields that say nothing about the mathematics of inference. The generation settings that transformers 4 kept
# in config.json are here too: transformers 5 ignores them in favour of generation_config.json. It ignores
# use_sliding_window as well, which belongs to Qwen2: what counts is sliding_window.
_IGNORED = frozenset(
    """
    _name_or_path architectures attention_dropout cross_attention_hidden_size decoder_start_token_id dtype
    finetuning_task id2label initializer_range label2id max_sequence_length name_or_path output_attentions
    output_hidden_states prefix problem_type pruned_heads return_dict sep_token_id suppress_tokens
    task_specific_params tf_legacy_loss tie_encoder_decoder tokenizer_class torch_dtype torchscript
    transformers_version unk_token_id use_bfloat16 use_cache _attn_implementation_autoset attn_implementation
    _attn_implementation _flash_attn_2_enabled use_flash_attention_2 gradient_checkpointing model_max_length
    use_sliding_window
    bad_words_ids begin_suppress_tokens diversity_penalty do_sample early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty forced_bos_token_id forced_eos_token_id length_penalty max_length min_length
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences output_scores remove_invalid_values
    repetition_penalty return_dict_in_generate temperature top_k top_p typical_p
    """.split()
)

_SLIDING_WINDOW_WHEN_MISSING = 4096  # transformers' MistralConfig; an explicit null means full attention


@no_type_check  # fields come from files; __post_init__ checks them, and says what is wrong
@dataclasses.dataclass(kw_only=True)
class MistralConfig:
    """The shape of a `MistralForCausalLM`, with HF's field names and transformers 5's defaults.

    `head_dim=None` becomes `hidden_size // num_attention_heads`; `sliding_window=None` means full attention.
    Raises `JaxgenError` for sizes that do not fit together. Source: transformers `MistralConfig`.

    The token ids can be set later, for whoever saves or reads the config: as in transformers 5, generation asks
    `model.generation_config` and not this one. So can `use_cache`, which changes nothing. A size cannot.

    >>> MistralConfig(hidden_size=64, num_attention_heads=4, num_key_value_heads=2).head_dim
    16
    """

    vocab_size: int = 32000
    hidden_size: int = 4096
    intermediate_size: int = 14336
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    head_dim: int | None = None
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-6
    rope_theta: float = 10000.0
    sliding_window: int | None = _SLIDING_WINDOW_WHEN_MISSING
    tie_word_embeddings: bool = False
    bos_token_id: int | None = 1
    eos_token_id: int | tuple[int, ...] | None = 2
    pad_token_id: int | None = None

    model_type = "mistral"
    is_encoder_decoder = False
    use_cache = True  # scripts that train set it; jaxgen generates with a cache, and trains without

    def __post_init__(self):
        problems = [
            f"{name}={getattr(self, name)!r:.80} must be {wanted}"
            for name, (is_right, wanted) in _CHECKS.items()
            if not is_right(getattr(self, name)) and not (getattr(self, name) is None and name in _NULLABLE)
        ]
        if not problems and self.num_attention_heads % self.num_key_value_heads:
            problems.append(
                f"num_attention_heads={self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads={self.num_key_value_heads}"
            )
        if not problems and self.head_size % 2:
            problems.append(f"head_dim={self.head_dim} must be even for rotary embeddings")
        if problems:
            raise JaxgenError("MistralConfig: " + "; ".join(problems))
        object.__setattr__(self, "head_dim", self.head_size)
        for name in ("rms_norm_eps", "rope_theta"):  # an int of the file may be beyond int32
            object.__setattr__(self, name, float(getattr(self, name)))

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _CHECKS and name not in vars(self):  # while it is made; __post_init__ checks
            object.__setattr__(self, name, value)
        elif name in _SETTABLE:
            object.__setattr__(self, name, _checked(name, tuple(value) if isinstance(value, list) else value))
        elif name in _CHECKS:
            raise JaxgenError(
                f"config.{name}={value!r:.60}: a config keeps its sizes, with which models are built "
                f"({name}={getattr(self, name)!r}); dataclasses.replace(config, {name}=...) makes another one"
            )
        elif name not in _FIXED:
            raise JaxgenError(f"config.{name}: MistralConfig has no such field")
        elif refusal := _refusal(name, value):
            raise UnsupportedError(f"config: {refusal}")

    def __hash__(self) -> int:  # of what cannot change: jit compares static arguments by it
        return hash(tuple(getattr(self, field.name) for field in dataclasses.fields(self) if field.name in _SIZES))

    @property
    def head_size(self) -> int:
        """`head_dim` as the int that it always is after construction."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @property
    def query_groups(self) -> int:
        """Query heads per key-value head."""
        return self.num_attention_heads // self.num_key_value_heads

    def cache_slots(self, total_length: int, ahead: int = 0) -> int:
        """Key-value slots that a row of at most `total_length` tokens needs in each layer.

        `ahead`: how many tokens it reads at a time, if more than one (`jaxgen.cache`).
        """
        return total_length if self.sliding_window is None else min(self.sliding_window + ahead, total_length)

    @classmethod
    def from_hf(cls, source: "str | os.PathLike[str] | Mapping[str, Any]") -> "MistralConfig":
        """Read a Hugging Face config: a dict, a config.json, or the directory that holds one.

        Reads both `rope_theta`/`rope_scaling` (transformers 4) and `rope_parameters` (transformers 5).
        Raises one `UnsupportedError`, naming each field and value that would change the mathematics and that
        jaxgen does not implement, and each field that it does not know; `JaxgenError` for other wrong values.

        >>> MistralConfig.from_hf({"model_type": "mistral", "sliding_window": None}).sliding_window is None
        True
        """
        fields = _read_json(source)
        if fields.get("model_type") is None:
            raise UnsupportedError("config: model_type is missing; jaxgen reads model_type='mistral'")
        if refusal := _refusal("model_type", fields["model_type"]):  # whose other fields say nothing to us
            raise UnsupportedError(f"config: {refusal}")
        refused = [refusal for name, value in fields.items() if (refusal := _refusal(name, value))]
        rope_theta, problems = _rope_theta(fields, refused)
        kept: dict[str, Any] = {
            name: tuple(v) if isinstance(v, list) else v for name, v in fields.items() if name in _FIELDS
        }
        try:
            config = cls(**{**kept, "rope_theta": rope_theta})
        except JaxgenError as error:
            config, problems = None, [*problems, str(error)]
        if config is None or refused or problems:
            raise (UnsupportedError if refused else JaxgenError)(f"config: {listed([*refused, *problems])}")
        return config

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: "str | os.PathLike[str]",
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: "str | os.PathLike[str] | None" = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        **fields: Any,
    ) -> "MistralConfig":
        """Read the config.json of a directory or hub id; `fields` replace what it says.

        How the weights are quantised, if they are, is not part of it. Raises as `from_hf`.

        >>> from jaxgen import demo
        >>> MistralConfig.from_pretrained(demo.path(), num_hidden_layers=2).num_hidden_layers
        2
        """
        from jaxgen.convert.hub import locate

        if trust_remote_code:
            raise UnsupportedError(NO_REMOTE_CODE)
        for name in fields.keys() - _CHECKS.keys():
            raise JaxgenError(f"from_pretrained: MistralConfig has no field {name!r}")
        placed: dict[str, Any] = {"local_files_only": local_files_only, "cache_dir": cache_dir, "token": token}
        read = _read_json(locate(pretrained_model_name_or_path, revision=revision, files=("config.json",), **placed))
        return cls.from_hf({k: v for k, v in read.items() if k != "quantization_config"} | fields)

    def to_dict(self) -> dict[str, Any]:
        """`to_hf`, under HF's name."""
        return self.to_hf()

    def to_hf(self) -> dict[str, Any]:
        """The config.json that transformers 4 and 5 read back as this model (without the weights' dtype)."""
        fields = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self).items()}
        return {
            "architectures": ["MistralForCausalLM"],
            "model_type": "mistral",
            "hidden_act": "silu",
            **fields,
            "rope_parameters": {"rope_type": "default", "rope_theta": self.rope_theta},
        }


class AutoConfig:
    """Reads configs, under the name that Hugging Face users know; never instantiated."""

    def __init__(self):
        raise JaxgenError("AutoConfig is not instantiated: call AutoConfig.from_pretrained(...)")

    from_pretrained = MistralConfig.from_pretrained


_FIELDS = frozenset(field.name for field in dataclasses.fields(MistralConfig))
_NULLABLE = ("sliding_window", "head_dim", "bos_token_id", "eos_token_id", "pad_token_id")
_ROPE_FIELDS = ("rope_theta", "rope_scaling", "rope_parameters")


def _checked(name: str, value: Any) -> Any:
    is_right, wanted = _CHECKS.get(name, (lambda value: isinstance(value, bool), "true or false"))
    if not is_right(value) and not (value is None and name in _NULLABLE):
        raise JaxgenError(f"MistralConfig: {name}={value!r:.60} must be {wanted}")
    return value


def _refusal(name: str, value: Any) -> str | None:
    """Why a field of config.json is refused, whatever the others say."""
    if name in _FIXED:
        # Compare types too: JSON's 0 and false are equal in Python, and neither should pass for the other.
        if any(value == fixed and type(value) is type(fixed) for fixed in (*_FIXED[name], None)):
            return None
        supported = " or ".join(repr(fixed) for fixed in _FIXED[name])
        return f"{name}={value!r:.80} is not supported; jaxgen implements {supported}"
    if name in _FIELDS or name in _IGNORED or name in _ROPE_FIELDS or name.startswith("unsloth_"):
        return None
    return (
        f"{name:.80}={value!r:.80} is not a field of MistralConfig that jaxgen knows; "
        "it may change the mathematics. Remove it from config.json if it does not"
    )


def _rope_theta(fields: Mapping[str, Any], refused: list[str]) -> tuple[Any, list[str]]:
    """The base of the rotary positions, and what is wrong with them; what is `refused` is added to that."""
    found = {"rope_theta": fields["rope_theta"]} if fields.get("rope_theta") is not None else {}
    problems = []
    for name in ("rope_scaling", "rope_parameters"):
        rope = fields.get(name)
        if rope is None:
            continue
        if not isinstance(rope, Mapping):
            problems.append(f"{name}={rope!r:.80} must be an object or null")
            continue
        for key, value in rope.items():
            if key == "rope_theta":
                found[f"{name}.rope_theta"] = value
            elif not (key in ("rope_type", "type") and value in ("default", None)):
                refused.append(
                    f"{name}.{key:.80}={value!r:.80} is not supported; jaxgen implements rope_type='default'"
                )
    theta = next(iter(found.values()), 10000.0)
    if any(value != theta for value in found.values()):
        problems.append(f"contradicting RoPE bases: {found!r:.200}")
    return theta, problems


def _read_json(source: "str | os.PathLike[str] | Mapping[str, Any]") -> dict[str, Any]:
    if isinstance(source, Mapping):
        return dict(source)
    path = as_path(source, "config", "a mapping, a config.json, or the directory that holds one")
    path = path / "config.json" if os.path.isdir(path) else path
    return read_json(path)


def _is_int(value: object, minimum: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= _MOST


def _is_positive_int(value: object) -> bool:
    return _is_int(value, 1)


def _is_positive_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and _LEAST_FLOAT <= value <= _MOST_FLOAT


def _is_token_id(value: object) -> bool:
    return _is_int(value, -1)  # old configs write -1 for "none"


# What int32 and float32 hold, in which the model is computed; the least is the least that is not rounded to nothing.
_MOST, _LEAST_FLOAT, _MOST_FLOAT = 2**31 - 1, 1.1754944e-38, 3.4028235e38
_CHECKS = {
    **dict.fromkeys(
        (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "sliding_window",
        ),
        (_is_positive_int, "a positive int below 2**31"),
    ),
    **dict.fromkeys(("rms_norm_eps", "rope_theta"), (_is_positive_number, "a positive number that float32 holds")),
    **dict.fromkeys(("bos_token_id", "pad_token_id"), (_is_token_id, "a token id, below 2**31")),
    "eos_token_id": (
        lambda value: all(map(_is_token_id, value if isinstance(value, tuple) else (value,))),
        "a token id below 2**31, or several",
    ),
    "tie_word_embeddings": (lambda value: isinstance(value, bool), "true or false"),
}  # fmt: skip
_SETTABLE = ("bos_token_id", "eos_token_id", "pad_token_id", "use_cache")
_SIZES = frozenset(_CHECKS) - frozenset(_SETTABLE)
