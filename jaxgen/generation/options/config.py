"""GenerationConfig: HF's fields, HF's defaults and HF's order of precedence, checked whenever one is set."""

import copy
import dataclasses
import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.files import read_json
from jaxgen.generation.options.checks import plain
from jaxgen.generation.options.refused import METADATA, REFUSED
from jaxgen.generation.options.table import OPTIONS, Options, checked, out_of_range
from jaxgen.generation.options.unused import say_unused, usable
from jaxgen.models.config import DecoderConfig
from jaxgen.paths import as_path


@dataclasses.dataclass(init=False)
class GenerationConfig(Options):
    """How to generate: HF's field names; `None` means that a less specific source decides.

    Values are checked here: counts are positive, `top_p` in (0, 1], and so on, when it is made and when a field is
    set; the range of what only sampling uses is checked where something samples. Raises `JaxgenError` for a bad value
    or a misspelt name, and `UnsupportedError` for a field of transformers that jaxgen refuses. The fields are the rows
    of `jaxgen.generation.options.table`. Source: transformers `GenerationConfig`.

    A config that has been hashed (as a static argument of `jax.jit`, for instance) does not change any more: what was
    compiled for it would not know. `copy.copy(config)` does.

    >>> config = GenerationConfig(max_new_tokens=5, do_sample=True)
    >>> config.top_p = 0.9
    >>> config.top_p
    0.9
    """

    __slots__ = ("__dict__", "__weakref__", "_hash")

    def __init__(self, **options: Any):
        """Take options by HF's names; written by hand so that a wrong name says what it should have been."""
        check_names(options)
        sampled = options.get("do_sample") is True
        for name in OPTIONS:
            object.__setattr__(self, name, checked(name, options.get(name), sampled))

    def __setattr__(self, name: str, value: Any) -> None:
        if hasattr(self, "_hash"):
            raise JaxgenError(
                f"{name}={value!r:.60}: this GenerationConfig was hashed, as a static argument of jit is, and cannot "
                "change any more; change copy.copy(config)"
            )
        check_names({name: value})
        if name in OPTIONS:  # anything else that passes does nothing here, as in the constructor
            object.__setattr__(self, name, checked(name, value, self.do_sample is True))

    def __delattr__(self, name: str) -> None:
        raise JaxgenError(f"config.{name} cannot be deleted; set it to None")

    def __hash__(self) -> int:
        if not hasattr(self, "_hash"):
            object.__setattr__(self, "_hash", hash(tuple(vars(self).values())))
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:  # a copy may be changed
        return _from_fields, (dict(vars(self)),)

    @property
    def eos_token_ids(self) -> tuple[int, ...]:
        """Every id that ends a row."""
        eos = self.eos_token_id
        return () if eos is None else eos if isinstance(eos, tuple) else (eos,)

    @property
    def filler_id(self) -> int:
        """What follows the end of a row: pad, or else the first end-of-sequence id, as in HF."""
        return self.pad_token_id if self.pad_token_id is not None else next(iter(self.eos_token_ids), 0)

    @property
    def beams(self) -> int:
        """How many beams search each prompt; with 1 there is no beam search."""
        return self.num_beams or 1

    @property
    def sequences_per_prompt(self) -> int:
        """How many sequences are returned for each prompt."""
        return self.num_return_sequences or 1

    @property
    def is_guided(self) -> bool:
        """Whether there is classifier-free guidance, and so a negative prompt for every prompt."""
        return OPTIONS["guidance_scale"].is_on(self.guidance_scale)

    @classmethod
    def from_hf(cls, source: "str | os.PathLike[str] | Mapping[str, Any] | object") -> "GenerationConfig":
        """Read transformers' form: a generation_config.json, its directory, a dict, or a GenerationConfig object."""
        if isinstance(source, str | os.PathLike):
            return cls.from_stored(*_read_file(as_path(source, "generation config")))
        elif isinstance(source, Mapping):
            fields = dict(source)
        elif callable(to_dict := getattr(source, "to_dict", None)):
            fields: Any = to_dict()
        else:
            raise JaxgenError(f"generation_config: cannot read {type(source).__name__}; pass a GenerationConfig")
        check_names(fields)
        return cls(**{name: value for name, value in fields.items() if name in OPTIONS})

    @classmethod
    def from_stored(cls, fields: Mapping[str, Any], path: Path) -> "GenerationConfig":
        """Read the contents of a file: what changes no token is noted and passed over, and errors name the file."""
        try:
            return cls.from_hf(usable(fields, str(path)))
        except JaxgenError as error:
            raise type(error)(f"{path}: {error}") from error

    @classmethod
    def from_model_config(cls, config: DecoderConfig) -> "GenerationConfig":
        """What a model without a generation_config.json starts from, as in transformers: its special tokens."""
        ids = {name: getattr(config, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
        return cls(**{name: value for name, value in ids.items() if value != -1})  # old configs' "none"

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name: "str | os.PathLike[str]",
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: "str | os.PathLike[str] | None" = None,
        token: str | bool | None = None,
        **options: Any,
    ) -> "GenerationConfig":
        """Read the generation_config.json of a directory or hub id; `options` are fields that replace what it says.

        Raises `JaxgenError` if there is none. Source: transformers `GenerationConfig.from_pretrained`.

        >>> from jaxgen import demo
        >>> GenerationConfig.from_pretrained(demo.path(), max_new_tokens=5).max_new_tokens
        5
        """
        from jaxgen.convert.hub import locate

        placed: dict[str, Any] = {"local_files_only": local_files_only, "cache_dir": cache_dir, "token": token}
        directory = locate(pretrained_model_name, revision=revision, files=("generation_config.json",), **placed)
        config = cls.from_hf(directory / "generation_config.json")
        config.update(**options)
        return config

    def update(self, **options: Any) -> None:
        """Set several fields; checked as each alone."""
        for name, value in options.items():
            setattr(self, name, value)

    def to_hf(self) -> dict[str, Any]:
        """The generation_config.json that transformers reads back: the fields that are set.

        With those of ours that decide tokens: transformers keeps what it does not know.
        """
        mine = {name for name, option in OPTIONS.items() if option.ours and option.processor is None}
        return {k: _listed(v) for k, v in vars(self).items() if v is not None and k not in mine}

    def to_dict(self) -> dict[str, Any]:
        """`to_hf`, under HF's name."""
        return self.to_hf()


class ModelDefaults(GenerationConfig):
    """A model's own configuration: it says what the model has now, and setting a field gives the model a changed copy.

    A copy, so that nothing that was compiled for the model as it was, and no other model, changes with it.
    """

    __slots__ = ("_assigned", "_model", "_seen")
    __class__ = property(lambda self: GenerationConfig)  # equal to, printed and replaced as what it stands for

    def __init__(self, model: Any):
        for name, value in (
            ("_model", model),
            ("_assigned", model.generation_assigned),
            ("_seen", model.stored_generation_config),
        ):
            object.__setattr__(self, name, value)

    def _now(self) -> GenerationConfig:
        """What the model has; where another configuration was assigned to it meanwhile, what it had before."""
        if self._is_the_models():
            object.__setattr__(self, "_seen", self._model.stored_generation_config)
        return self._seen

    def _is_the_models(self) -> bool:
        return self._model.generation_assigned is self._assigned

    def __getattribute__(self, name: str) -> Any:
        if name in OPTIONS or name == "__dict__":
            return getattr(object.__getattribute__(self, "_now")(), name)
        return object.__getattribute__(self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        changed = copy.copy(self)
        setattr(changed, name, value)
        object.__setattr__(self, "_seen", changed)
        if self._is_the_models():
            self._model.set_stored_generation_config(changed)

    def __hash__(self) -> int:
        raise JaxgenError("model.generation_config follows the model, so jit cannot take it as static; copy.copy(it)")


def resolve(
    options: Mapping[str, Any],
    generation_config: "GenerationConfig | object | None",
    checkpoint: GenerationConfig,
) -> GenerationConfig:
    """The effective configuration: option > generation_config > the checkpoint's own > HF's defaults.

    An option given as None switches the field off; None inside a configuration lets the next source decide.
    Source: transformers `GenerationMixin._prepare_generation_config`.
    """
    check_names(options)
    if generation_config is not None and not isinstance(generation_config, GenerationConfig):
        generation_config = GenerationConfig.from_hf(generation_config)
    fields, given = {name: option.default for name, option in OPTIONS.items()}, {}
    for source in (checkpoint, generation_config):
        if source is not None:
            fields |= {k: v for k, v in vars(source).items() if v is not None}
    fields |= {k: v for k, v in options.items() if k in OPTIONS}
    if generation_config is not None:
        given = {k: v for k, v in vars(generation_config).items() if v != getattr(checkpoint, k)}
    given |= {k: plain(v) for k, v in options.items() if k in OPTIONS}
    samples = fields.get("do_sample") is True
    for name in OPTIONS:
        if reason := out_of_range(name, fields[name]):
            if samples:
                raise JaxgenError(reason if name in given else f"{reason}; the model's generation_config says so")
            fields[name] = None
    config = GenerationConfig(**fields)
    say_unused(given, samples, config.beams > 1)
    _check_together(config)
    return config


def _check_together(config: GenerationConfig) -> None:
    """Raise for options that contradict each other."""
    samples, beams = config.sequences_per_prompt, config.beams
    if beams > 1 and samples > beams:
        raise JaxgenError(f"num_return_sequences={samples} is more than num_beams={beams}: beams are what is returned")
    if beams == 1 and samples > 1 and not config.do_sample:
        raise JaxgenError(
            f"num_return_sequences={samples} needs do_sample=True: "
            "greedy search would return the same sequence every time"
        )
    for name, option in OPTIONS.items():
        if getattr(config, name) and option.needs and not getattr(config, option.needs):
            raise JaxgenError(f"{name}={getattr(config, name)} needs {option.needs}=True")


def check_names(fields: Mapping[str, Any]) -> None:
    """Raise for a name that HF does not have (with the nearest one) or that jaxgen refuses."""
    for name, value in fields.items():
        if name in OPTIONS or name in METADATA:
            continue
        if name not in REFUSED:
            nearest = difflib.get_close_matches(name, [*OPTIONS, *REFUSED], n=1, cutoff=0.6)
            hint = f"; did you mean {nearest[0]!r}?" if nearest else ""
            raise JaxgenError(f"{name!r} is not a generation option{hint}")
        if not REFUSED[name].takes(value):
            raise UnsupportedError(f"{name}={value!r} is not supported by jaxgen: {REFUSED[name].reason}")


def _from_fields(fields: dict[str, Any]) -> GenerationConfig:
    config = object.__new__(GenerationConfig)
    for name, value in fields.items():
        object.__setattr__(config, name, value)
    return config


def _listed(value: Any) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return dataclasses.asdict(value)
    return [_listed(item) for item in value] if isinstance(value, tuple) else value


def _read_file(path: Path) -> tuple[dict[str, Any], Path]:
    path = path / "generation_config.json" if os.path.isdir(path) else path
    return read_json(path), path
