"""What adapter_config.json says a PEFT LoRA adapter computes: the layers it targets, their ranks and scales."""

import dataclasses
import math
import re
from collections.abc import Collection
from pathlib import Path
from typing import Any, no_type_check

from jaxgen.errors import CheckpointError, UnsupportedError
from jaxgen.files import read_json

from .files import require
from .patterns import Patterns

CONFIG = "adapter_config.json"
MERGE = (
    "merge the adapter into its base with peft (PeftModel.from_pretrained(...).merge_and_unload(), then "
    "save_pretrained) and load that without adapter="
)

# How the adapter was trained, which base it is for, and settings of initialisations: nothing of this computes.
_IGNORED = frozenset((
    "auto_mapping", "base_model_name_or_path", "corda_config", "ensure_weight_tying",
    "eva_config", "fan_in_fan_out", "inference_mode", "loftq_config", "lora_dropout", "lora_ga_config",
    "megatron_config", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "revision",
    "runtime_config", "task_type",
))  # fmt: skip
# Other values of init_lora_weights also change the base's weights, and peft repeats that whenever it loads them.
_INITIALISATIONS = (True, False, None, "gaussian", "eva", "orthogonal", "mica")
_OFF = (None, False, "", "none", [], {})  # what a field that adds something says when it does not

_REGULAR = ("rank_pattern", "alpha_pattern", "target_modules", "exclude_modules")  # may hold regular expressions
_LAYER = re.compile(r"model\.layers\.(\d+)\.")


@no_type_check  # _problems says what is wrong
@dataclasses.dataclass(frozen=True, kw_only=True)
class LoraConfig:
    """The fields of adapter_config.json that decide what an adapter computes; defaults are peft's.

    Modules have HF's names without `.weight`. Source: peft `LoraConfig`.
    """

    r: int = 8
    lora_alpha: float = 8
    use_rslora: bool = False
    rank_pattern: dict[str, int] | None = None
    alpha_pattern: dict[str, float] | None = None
    target_modules: str | list[str] | None = None
    exclude_modules: str | list[str] | None = None
    layers_to_transform: int | list[int] | None = None
    layers_pattern: str | list[str] | None = None
    patterns: Patterns = dataclasses.field(init=False, compare=False, default_factory=lambda: Patterns(CONFIG))

    @classmethod
    def read(cls, directory: Path) -> "LoraConfig":
        """The config in an adapter's directory.

        Raises `UnsupportedError`, naming every field and value, for other adapters than plain LoRA and for fields
        that may change what it computes; `CheckpointError` for values that are none.
        """
        fields = read_json(require(directory / CONFIG, "an adapter"))
        if fields.get("peft_type") != "LORA":
            raise UnsupportedError(
                f"{directory / CONFIG}: peft_type={fields.get('peft_type')!r} is not supported; jaxgen reads 'LORA'. "
                f"If the adapter changes weights (prompts do not), {MERGE}"
            )
        known = {field.name for field in dataclasses.fields(cls) if field.init}
        if refused := [f"{name}={value!r:.80}" for name, value in fields.items() if _changes(name, value, known)]:
            raise UnsupportedError(
                f"{directory / CONFIG}: {', '.join(refused)}: not supported; jaxgen reads plain LoRA of linear "
                f"layers. With a peft that knows it, {MERGE}"
            )
        config = cls(**{name: value for name, value in fields.items() if name in known})
        if problems := _problems(config):
            raise CheckpointError(str(directory / CONFIG), problems)
        return config

    def targets(self, module: str) -> bool:
        """Whether the linear layer `module` is adapted. Source: peft `check_target_module_exists`."""
        wanted = self.target_modules or []
        if self.exclude_modules and self._names(self.exclude_modules, module):
            return False
        if isinstance(wanted, str) and wanted.lower() == "all-linear":
            return module != "lm_head"
        # A whole name, and an expression for whole names, hold in every layer.
        if isinstance(wanted, str) or module in wanted or self.layers_to_transform in (None, []):
            return self._names(wanted, module)
        layers = self.layers_to_transform if isinstance(self.layers_to_transform, list) else [self.layers_to_transform]
        layer = _LAYER.match(module)
        return layer is not None and int(layer[1]) in layers and self._names(wanted, module)

    def rank(self, module: str) -> int:
        """r of `module`."""
        return self._by_pattern(self.rank_pattern, module, self.r)

    def scale(self, module: str) -> float:
        """What `B @ A` of `module` is multiplied by. Source: LoRA; with `use_rslora`, arXiv 2312.03732."""
        rank = self.rank(module)
        alpha = self._by_pattern(self.alpha_pattern, module, self.lora_alpha)
        return alpha / (math.sqrt(rank) if self.use_rslora else rank)

    def idle_patterns(self, modules: Collection[str]) -> dict[str, list[str]]:
        """The keys of `rank_pattern` and `alpha_pattern` that fit none of the modules, by field."""
        fields = {"rank_pattern": self.rank_pattern or {}, "alpha_pattern": self.alpha_pattern or {}}
        idle = {name: [key for key in keys if not self._fits_any(key, modules)] for name, keys in fields.items()}
        return {name: keys for name, keys in idle.items() if keys}

    def _fits_any(self, key: str, modules: Collection[str]) -> bool:
        return any(self._fits(key, module) for module in modules)

    def _fits(self, key: str, module: str) -> bool:
        return self.patterns.match(rf"(.*\.)?({key})$", module)

    def _names(self, wanted: str | list[str], module: str) -> bool:
        """Whether a regular expression, or a list of ends of names, means the module."""
        if isinstance(wanted, str):
            return self.patterns.fullmatch(wanted, module)
        return any(module == name or module.endswith(f".{name}") for name in wanted)

    def _by_pattern(self, patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
        """The value of the first pattern that fits. Source: peft `get_pattern_key`."""
        return next((value for key, value in (patterns or {}).items() if self._fits(key, module)), default)


def _changes(name: str, value: Any, known: set[str]) -> bool:
    """Whether a field may change what the adapter computes, in a way that jaxgen does not know."""
    if name == "init_lora_weights":
        return not any(value == harmless and type(value) is type(harmless) for harmless in _INITIALISATIONS)
    # Compare types too: JSON's 0 and false are equal in Python.
    off = any(value == nothing and type(value) is type(nothing) for nothing in _OFF)
    return name not in known and name not in _IGNORED and not off


def _problems(config: LoraConfig) -> list[str]:
    problems = []
    for name, (is_right, wanted) in _CHECKS.items():
        value = getattr(config, name)
        if not is_right(value):
            problems.append(f"{name}={value!r:.80} must be {wanted}")
        elif name in _REGULAR and not isinstance(value, list):
            for pattern in [value] if isinstance(value, str) else value or ():
                try:
                    config.patterns.check(pattern)
                except CheckpointError as error:
                    problems.append(f"{name}={value!r:.80}: {error.problems[0]}")
    return problems + _contradictions(config)


def _contradictions(config: LoraConfig) -> list[str]:
    """Fields that exclude each other, or need each other, in peft too. Source: peft `LoraConfig.__post_init__`."""
    given = [name for name in ("layers_to_transform", "layers_pattern") if getattr(config, name) is not None]
    if isinstance(config.target_modules, str):
        return [f"{name}={getattr(config, name)!r:.80} needs a list of target_modules, not a text" for name in given]
    if config.layers_pattern and config.layers_to_transform is None:
        return [f"layers_pattern={config.layers_pattern!r:.80} needs layers_to_transform"]
    return []


def _is_int(value: Any, least: int = 0) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _is_rank(value: Any) -> bool:
    return _is_int(value, least=1)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e30


def _is_choice(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(name, str) for name in value))


def _is_pattern(value: Any, holds: Any) -> bool:
    return value is None or (isinstance(value, dict) and all(map(holds, value.values())))


_CHECKS = {
    "r": (_is_rank, "a positive int"),
    "lora_alpha": (_is_number, "a finite number"),
    "use_rslora": (lambda value: isinstance(value, bool), "true or false"),
    "rank_pattern": (lambda value: _is_pattern(value, _is_rank), "an object from regular expressions to ranks"),
    "alpha_pattern": (lambda value: _is_pattern(value, _is_number), "an object from regular expressions to numbers"),
    "target_modules": (_is_choice, "a list of names, a regular expression, or 'all-linear'"),
    "exclude_modules": (lambda value: value is None or _is_choice(value), "a list of names, or a regular expression"),
    "layers_to_transform": (
        lambda value: value is None or all(map(_is_int, value if isinstance(value, list) else [value])),
        "a layer's number, or a list of them",
    ),
    "layers_pattern": (
        lambda value: value in (None, "", [], "layers", ["layers"]),
        "'layers', the only list of layers that the model has",
    ),
}
