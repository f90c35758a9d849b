"""How rotary positions are stretched beyond the context that a model was first trained for: HF's `rope_type`s.

Each scheme is a dataclass of the fields that HF's `rope_parameters` has for it, and changes the frequencies that a
head is rotated by. All is computed in float32 and in transformers' order of operations: an ulp matters.
"""

import dataclasses
import logging
import math
from collections.abc import Mapping
from typing import Any, Protocol, runtime_checkable

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

logger = logging.getLogger("jaxgen")

Frequencies = Float[np.ndarray, " half"]
_F32 = np.float32


@runtime_checkable
class Scaling(Protocol):
    """One scheme; hashable, as part of a config."""

    def frequencies(self, plain: Frequencies, theta: float) -> Frequencies:
        """The frequencies in the place of the `plain` ones, of base `theta`."""
        ...

    @property
    def amplitude(self) -> float:
        """What cosines and sines are multiplied by."""
        ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Linear:
    """Positions divided by `factor`. Source: transformers `_compute_linear_scaling_rope_parameters`."""

    factor: float
    amplitude = 1.0

    def frequencies(self, plain: Frequencies, theta: float) -> Frequencies:
        """As `Scaling.frequencies`."""
        return plain / _F32(self.factor)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Llama3:
    """Slow rotations divided by `factor`, fast ones kept. Source: transformers `_compute_llama3_parameters`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int
    amplitude = 1.0

    def frequencies(self, plain: Frequencies, theta: float) -> Frequencies:
        """As `Scaling.frequencies`."""
        factor, low = _F32(self.factor), _F32(self.low_freq_factor)
        context = self.original_max_position_embeddings
        longest, shortest = (_F32(context / x) for x in (self.low_freq_factor, self.high_freq_factor))
        wavelength = _F32(2 * math.pi) / plain
        smooth = (_F32(context) / wavelength - low) / _F32(self.high_freq_factor - self.low_freq_factor)
        between = (_F32(1) - smooth) * plain / factor + smooth * plain
        return np.where(wavelength > longest, plain / factor, np.where(wavelength < shortest, plain, between))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Yarn:
    """YaRN (arXiv 2309.00071). Source: transformers `_compute_yarn_parameters`."""

    factor: float
    original_max_position_embeddings: int
    attention_factor: float | None = None
    beta_fast: float | None = None
    beta_slow: float | None = None
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True
    llama_4_scaling_beta: float | None = None  # of Ministral 3: how much queries grow with each original context

    @property
    def amplitude(self) -> float:
        """As `Scaling.amplitude`: scores grow a little with the length."""
        if self.attention_factor is not None:
            return self.attention_factor

        def scale(mscale: float = 1) -> float:
            return 1.0 if self.factor <= 1 else 0.1 * mscale * math.log(self.factor) + 1.0

        if self.mscale and self.mscale_all_dim:
            return scale(self.mscale) / scale(self.mscale_all_dim)
        return scale()

    def frequencies(self, plain: Frequencies, theta: float) -> Frequencies:
        """As `Scaling.frequencies`."""
        half = len(plain)
        low, high = (self._turns_at(turns, 2 * half, theta) for turns in (self.beta_fast or 32, self.beta_slow or 1))
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, 2 * half - 1)
        width = 0.001 if low == high else high - low
        ramp = np.clip((np.arange(half, dtype=_F32) - _F32(low)) / _F32(width), 0, 1)
        kept = _F32(1) - ramp
        stretched = _F32(1) / (_F32(self.factor) * (_F32(1) / plain))
        return stretched * (_F32(1) - kept) + plain * kept

    def query_scale(self, positions: Int[Array, "B T"]) -> Float[Array, "B T"] | None:
        """What rotated queries are multiplied by, in float32, if they are.

        Source: transformers `get_llama_4_attn_scale`.
        """
        if self.llama_4_scaling_beta is None:
            return None
        contexts = (positions // self.original_max_position_embeddings).astype(jnp.float32)
        return 1 + jnp.float32(self.llama_4_scaling_beta) * jnp.log(1 + contexts)

    def _turns_at(self, turns: float, size: int, theta: float) -> float:
        """The dimension that rotates so many times within the original context."""
        context = self.original_max_position_embeddings
        return size * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(theta))


@dataclasses.dataclass(frozen=True, kw_only=True)
class LongRope:
    """LongRoPE (arXiv 2402.13753): each frequency is divided by its own factor, another one in longer rows.

    Source: transformers `_compute_longrope_parameters`.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]  # of rows beyond the original context, from their first token on
    original_max_position_embeddings: int
    max_position_embeddings: int
    factor: float | None = None
    attention_factor: float | None = None

    @property
    def amplitude(self) -> float:
        """As `Scaling.amplitude`."""
        if self.attention_factor is not None:
            return self.attention_factor
        original = self.original_max_position_embeddings
        factor = self.max_position_embeddings / original if self.factor is None else self.factor
        return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))

    def frequencies(self, plain: Frequencies, theta: float) -> Frequencies:
        """As `Scaling.frequencies`, of rows within the original context."""
        return self._divided(self.short_factor, theta)

    def of_rows(self, plain: Frequencies, theta: float, ends: Int[Array, " B"]) -> Float[Array, "B 1 half"]:
        """Those of each row, by the position of its last token."""
        is_long = ends >= self.original_max_position_embeddings
        long = self._divided(self.long_factor, theta)
        return jnp.where(is_long[:, None, None], long, self.frequencies(plain, theta))

    def _divided(self, factors: tuple[float, ...], theta: float) -> Frequencies:
        exponents = np.arange(0, 2 * len(factors), 2, dtype=_F32) / _F32(2 * len(factors))
        return _F32(1) / (np.array(factors, _F32) * _F32(theta) ** exponents)


SCALINGS: dict[str, type[Any]] = {"linear": Linear, "llama3": Llama3, "yarn": Yarn, "longrope": LongRope}
FIELDS = ("rope_theta", "rope_scaling", "rope_parameters", "original_max_position_embeddings")


def plain_frequencies(size: int, theta: float) -> Frequencies:
    """The frequency of each pair of a head's dimensions. Source: Su et al. 2021 (arXiv 2104.09864)."""
    exponents = np.arange(0, size, 2, dtype=_F32) / _F32(size)
    return _F32(1) / _F32(theta) ** exponents


def name_of(scaling: Any) -> str:
    """HF's `rope_type`."""
    return next((name for name, kind in SCALINGS.items() if isinstance(scaling, kind)), "default")


def to_hf(scaling: Any) -> dict[str, Any]:
    """The fields of HF's `rope_parameters`, without the base."""
    given = {} if scaling is None else dataclasses.asdict(scaling)
    kept = {name: list(value) if isinstance(value, tuple) else value for name, value in given.items()}
    said = {name: value for name, value in kept.items() if value is not None and (name, value) != ("truncate", True)}
    said.pop("max_position_embeddings", None)  # a field of the config
    return {"rope_type": name_of(scaling), **said}


def parse(
    fields: Mapping[str, Any], types: tuple[str, ...], context: Any, base: float
) -> tuple[Any, Any, list[str], list[str]]:
    """Base, scaling, what is refused and what is wrong, of a config.json in transformers' old or new spelling.

    `types`: the schemes that the family has; `context`: `max_position_embeddings`, which YaRN's fields are
    completed by; `base`: what it is where nothing says it.
    """
    bases = {"rope_theta": fields["rope_theta"]} if fields.get("rope_theta") is not None else {}
    scalings: dict[str, Any] = {}
    refused, problems = [], []
    for name in ("rope_scaling", "rope_parameters"):
        given = fields.get(name)
        if given is None or given == {}:
            continue
        if not isinstance(given, Mapping):
            problems.append(f"{name}={given!r:.80} must be an object or null")
            continue
        given = dict(given)
        if "rope_theta" in given:
            bases[f"{name}.rope_theta"] = given.pop("rope_theta")
        kind = given.get("rope_type", given.get("type"))
        if isinstance(kind, str) and kind in types and kind in SCALINGS:
            given = {key: value for key, value in given.items() if key not in ("rope_type", "type")}
            scalings[name] = _scaling(kind, given, fields, context, name, refused, problems)
            continue
        scalings[name] = None
        for key, value in given.items():
            if not (key in ("rope_type", "type") and value in ("default", None)):
                known = " or ".join(f"rope_type={kind!r}" for kind in types)
                refused.append(f"{name}.{key:.80}={value!r:.80} is not supported; jaxgen implements {known}")
    if len(scalings) == 2 and "rope_theta" not in bases:  # transformers takes rope_scaling then, and its default
        bases.setdefault("rope_scaling.rope_theta", base)
    theta = next(iter(bases.values()), base)
    if any(value != theta for value in bases.values()):
        problems.append(f"contradicting RoPE bases: {bases!r:.200}")
    scaling = next(iter(scalings.values()), None)
    if not refused and not problems and any(other != scaling for other in scalings.values()):
        problems.append(f"contradicting RoPE scalings: {scalings!r:.200}")
    return theta, scaling, refused, problems


def _scaling(
    kind: str,
    given: dict[str, Any],
    fields: Mapping[str, Any],
    context: Any,
    name: str,
    refused: list[str],
    problems: list[str],
) -> Any:
    known = {field.name: field for field in dataclasses.fields(SCALINGS[kind])}
    # To transformers a null is an absent field, but for this one: there it is false.
    given = {key: value for key, value in given.items() if value is not None or key == "truncate"}
    if kind == "yarn" and (value := given.pop("attn_factor", None)) is not None:
        logger.warning(
            "config: %s.attn_factor=%.60r has no effect, as in transformers, which reads attention_factor", name, value
        )
    if "llama_4_scaling_beta" in given:
        given.pop("max_position_embeddings", None)  # which Ministral 3's repeat
    if given.get("partial_rotary_factor") == 1.0:
        del given["partial_rotary_factor"]
    if "original_max_position_embeddings" in known:
        original = fields.get("original_max_position_embeddings") or given.get("original_max_position_embeddings")
        given["original_max_position_embeddings"] = context if original is None else original
    if kind == "yarn" and "factor" not in given and _is_number(context):
        original = given["original_max_position_embeddings"]
        given["factor"] = context / original if _is_number(original) else original
    if "max_position_embeddings" in known:
        given["max_position_embeddings"] = context
    for key in given.keys() - known.keys():
        refused.append(f"{name}.{key:.80}={given[key]!r:.80} is not supported with rope_type={kind!r}")
    given = {key: tuple(value) if isinstance(value, list) else value for key, value in given.items()}
    wrong = [
        f"{name}.{key}={value!r:.80} must be {wanted}"
        for key, value in given.items()
        if key in known and not (check := _FIELD_CHECKS.get(key, _NUMBER))[0](value)
        for wanted in check[1:]
    ]
    missing = [key for key, field in known.items() if field.default is dataclasses.MISSING and key not in given]
    wrong += [f"{name}.{key} is missing, which rope_type={kind!r} needs" for key in missing]
    if not wrong and kind == "llama3" and given["high_freq_factor"] <= given["low_freq_factor"]:
        wrong.append(f"{name}.high_freq_factor={given['high_freq_factor']} must be above low_freq_factor")
    problems += wrong
    return None if wrong else SCALINGS[kind](**{key: value for key, value in given.items() if key in known})


def _is_numbers(value: object) -> bool:
    return isinstance(value, tuple) and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 1e-30 < value < 1e30


_NUMBER: tuple[Any, str] = _is_number, "a positive number"
_FIELD_CHECKS: dict[str, tuple[Any, str]] = {
    "truncate": (lambda value: isinstance(value, bool), "true or false"),
    **dict.fromkeys(("short_factor", "long_factor"), (_is_numbers, "a list of positive numbers")),
    "max_position_embeddings": (lambda value: isinstance(value, int) and _is_number(value), "a positive int"),
}
