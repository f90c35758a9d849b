"""Strict: every batch runs in one shape, so that a row's numbers are the same to the last bit in any of them.

What a row's tokens depend on never includes its neighbours, but the last bits of its logits do depend on the shape
that it is computed in: on how many rows are multiplied and how many prompt tokens prefilled at a time, and how many
slots attention sums over. XLA chooses its kernels, and so the order of its sums, by those. Here they are fixed.
"""

import dataclasses

from jaxgen.errors import JaxgenError
from jaxgen.generation.options.checks import integer
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.prompts.layout import bucket

# For executables on a GPU: no atomic sums, no kernels chosen by a race, no sums split into a rounded few.
DETERMINISTIC_OPTIONS = {
    "xla_gpu_deterministic_ops": True,
    "xla_gpu_autotune_level": 0,
}


@dataclasses.dataclass(frozen=True)
class Strict:
    """The one shape of `generate(..., strict=)`: `rows` rows of at most `tokens` tokens, prompts prefilled in `chunk`s.

    `rows` counts what is generated (prompts times `num_return_sequences`, or beams); fewer are filled up with idle
    ones, which cost what real ones do. Sizes are rounded up to 2**k or 3 * 2**k. Tokens and log-probabilities are
    equal to the last bit between calls with the same options, sizes, device and versions. Raises `JaxgenError`
    for sizes below 1. Source: the idea of batch invariance, He et al. 2025.

    >>> model, tokenizer = getfixture("demo")
    >>> inputs = tokenizer(["A list of colors: red, blue", "Portugal is"], padding=True, return_tensors="np")
    >>> options = dict(return_dict_in_generate=True, strict=Strict(rows=4, tokens=64))
    >>> both = model.generate(**inputs, **options)
    >>> alone = model.generate(inputs["input_ids"][:1], inputs["attention_mask"][:1], **options)
    >>> bool((both.logprobs[0] == alone.logprobs[0]).all())
    True
    """

    rows: int = 8
    tokens: int = 512
    chunk: int = 64

    def __post_init__(self):
        for name in ("rows", "tokens", "chunk"):
            object.__setattr__(self, name, bucket(integer(1)(f"strict: {name}", getattr(self, name))))

    @classmethod
    def of(cls, value: object) -> "Strict | None":
        """What the user gave: True, None, False or a `Strict`."""
        if value is None or value is False:
            return None
        if value is True:
            return cls()
        if not isinstance(value, cls):
            raise JaxgenError(f"strict={value!r} must be True, or a jaxgen.Strict(rows=, tokens=)")
        return value

    def check(self, config: GenerationConfig, past: object) -> None:
        """Raise for options that would choose another shape."""
        for name, given in {"past_key_values": past, "max_cache_len": config.max_cache_len}.items():
            if given is not None:
                raise JaxgenError(f"{name} and strict exclude each other: the shape would not be the one of strict")

    def prompts(self, given: int, samples: int) -> int:
        """How many prompts the batch has room for; raises `JaxgenError` if that is less than were given."""
        room = self.rows // samples
        if given > room:
            raise JaxgenError(
                f"strict: {given} prompts times {samples} are more than its {self.rows} rows; "
                f"pass {max(room, 1)} at a time, or strict=jaxgen.Strict(rows={bucket(given * samples)})"
            )
        return room

    def fits(self, longest: int) -> int:
        """The length of every row, if the longest fits."""
        if longest > self.tokens:
            raise JaxgenError(
                f"strict: a prompt and its new tokens are {longest} tokens, more than the {self.tokens} of its shape; "
                f"pass strict=jaxgen.Strict(tokens={bucket(longest)})"
            )
        return self.tokens
