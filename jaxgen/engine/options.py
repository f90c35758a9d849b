"""The options of an engine's rows: arrays over the rows, so that each request has its own and nothing is compiled.

Which processors there are is decided when the engine starts. One that no running row has switched on is skipped on the
device, and a row that has it off keeps its logits bit for bit.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool

from jaxgen.engine.constraints import ConstrainedRows, Room
from jaxgen.errors import JaxgenError, UnsupportedError, shown
from jaxgen.generation.choosing.constrained import Automaton
from jaxgen.generation.choosing.stop_strings import StopStrings
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.options.table import OPTIONS, Extras
from jaxgen.generation.processors.filters import TopK
from jaxgen.generation.processors.history import SequenceBias
from jaxgen.generation.processors.processor import Call, Count, Filter, Logits, Processor, static
from jaxgen.generation.programs.inputs import TracedOptions, traced_options
from jaxgen.generation.prompts.layout import pad_to
from jaxgen.generation.prompts.rows import Rows

# The options whose processors an engine has, with a value of each that makes one.
NEUTRAL: dict[str, Any] = {
    "sequence_bias": (((0,), 0.0),),
    "repetition_penalty": 1.0,
    "frequency_penalty": 0.0,
    "presence_penalty": 0.0,
    "no_repeat_ngram_size": 1,
    "min_length": 0,
    "min_new_tokens": 0,
    "temperature": 1.0,
    "top_k": 1,
    "top_p": 1.0,
    "min_p": 1.0,
    "typical_p": 1.0,
}
# Options that the host sees to, and those that say nothing of how a token is chosen where nothing is drafted.
_ON_THE_HOST = (
    *("max_length", "max_new_tokens", "max_time", "stop_strings", "eos_token_id", "pad_token_id", "bos_token_id"),
    *("do_sample", "num_return_sequences", "return_dict_in_generate", "top_logprobs"),
    *("num_assistant_tokens", "assistant_confidence_threshold", "max_matching_ngram_size"),
)
ENDS = 4  # ids that may end a row
BIASES, BIASED = 512, 8  # entries of a sequence_bias, and tokens of one
_USUAL_TOP_K = 64


class AnyTopK(Filter):
    """`TopK` where each row has its own k: sorted out while all are small, as they mostly are, else counted out."""

    k: Count

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        """The logits, without all but each row's k largest."""
        few, any_number = (TopK(self.k, bound) for bound in (_USUAL_TOP_K, 0))
        small = (jnp.where(rows.running, self.k, 0) <= _USUAL_TOP_K).all()
        return jax.lax.cond(small, lambda: few(logits, rows), lambda: any_number(logits, rows))


class OfRows(Processor):
    """A processor whose numbers have an axis of rows, for those rows that have it on."""

    on: Bool[Array | np.ndarray, " R"]
    processor: Processor
    broadcasts: bool = static()  # it takes such numbers as they are: else it is mapped over the rows

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        """The logits, of some rows changed."""

        def one(processor: Processor, logits: Array, row: Rows) -> Array:
            return processor(logits[None], jax.tree.map(lambda x: x[None], row))[0]

        def changed() -> Logits:
            mapped = self.processor if self.broadcasts else lambda *given: jax.vmap(one)(self.processor, *given)
            return jnp.where(self.on[:, None], mapped(logits, rows), logits)

        return jax.lax.cond((self.on & rows.running).any(), changed, lambda: logits)


class Asked(NamedTuple):
    """What a request asks of how its tokens are chosen."""

    processors: dict[str, Processor]
    stops: StopStrings | None
    automaton: Automaton | None  # of its constraint


class RowOptions:
    """What every row of an engine was asked for, on the host; `traced` is what the device gets of it."""

    def __init__(self, rows: int, vocab_size: int, names: tuple[str, ...], room: Room | None, device: Any):
        self.room = room
        self._vocab_size, self._device, self._known = vocab_size, device, None
        self._eos = np.full((rows, ENDS), -1, np.int32)
        self._samples, self._ranked = np.zeros(rows, bool), np.zeros(rows, bool)
        self._on = {name: np.zeros(rows, bool) for name in OPTIONS if name in names}
        call = Call({"min_new_tokens": None}, (0,))
        self._numbers = {
            name: jax.tree.map(lambda x: np.repeat(np.asarray(x)[None], rows, axis=0), made(name, NEUTRAL[name], call))
            for name in self._on
        }

    def check(self, config: GenerationConfig, extras: Extras) -> Asked:
        """What a request asks; raises `JaxgenError` for what this engine has not."""
        for name, value in vars(extras).items():
            if value is not None and name not in ("tokenizer", "constraint"):
                raise UnsupportedError(f"{name}: not in an engine, whose rows share one program; use model.generate")
        for name, option in OPTIONS.items():
            value = getattr(config, name)
            if name in self._on or name in _ON_THE_HOST or not option.is_on(value) or value == option.default:
                continue
            unused = (option.only_sampling and not config.do_sample) or (option.only_beams and config.beams == 1)
            if unused or (name == "cache_implementation" and value == "static"):
                continue
            had = f"pass it in processors= when the engine is made: {[*NEUTRAL]}" if name in NEUTRAL else ""
            raise UnsupportedError(f"{name}={shown(value)}: not in this engine; {had or 'use model.generate'}")
        if len(config.eos_token_ids) > ENDS:
            raise JaxgenError(f"eos_token_id: {len(config.eos_token_ids)} ids, and an engine's rows end at {ENDS}")
        plain = Extras(tokenizer=extras.tokenizer)
        stops = traced_options(config, self._vocab_size, plain).stop_strings  # checks all values on the way
        call = Call({**vars(config)}, config.eos_token_ids)
        on = {}
        for name in self._on:
            option, value = OPTIONS[name], getattr(config, name)
            if option.is_on(value) and value != option.off and (config.do_sample or not option.only_sampling):
                processor = made(name, value, call)
                if processor is not None:
                    on[name] = processor
        return Asked(on, stops, self._automaton(extras, config.eos_token_ids))

    def _automaton(self, extras: Extras, eos: tuple[int, ...]) -> Automaton | None:
        if extras.constraint is None:
            return None
        if self.room is None:
            raise UnsupportedError("constraint: this engine has no room for any; Engine(constraints=) makes it")
        return self.room.automaton(extras.constraint, extras.tokenizer, eos)

    def set(self, row: int, config: GenerationConfig, asked: Asked) -> int | None:
        """Give a row the options of a request; the state in which its constraint begins, if there is room for one."""
        eos = pad_to(np.array(config.eos_token_ids, np.int32), (ENDS,), fill=-1)
        wanted = [(self._eos, eos), (self._samples, bool(config.do_sample)), (self._ranked, bool(config.top_logprobs))]
        for name, on in self._on.items():
            wanted.append((on, name in asked.processors))
            if name in asked.processors:
                given = jax.tree.leaves(asked.processors[name])
                wanted += zip(jax.tree.leaves(self._numbers[name]), given, strict=True)
        changes = [(table, value) for table, value in wanted if not np.array_equal(table[row], value)]
        for table, value in changes:
            table[row] = value
        if changes or asked.automaton is not None:  # most rows want what the one before them wanted
            self._known = None
        return None if self.room is None else self.room.put(row, asked.automaton)

    def forget(self) -> None:
        """What is on the device may be lost."""
        self._known = None
        if self.room is not None:
            self.room.forget()

    def traced(self) -> TracedOptions:
        """All of it, on the device: sent again only after a change."""
        if self._known is None:
            rows = {
                name: OfRows(on.copy(), jax.tree.map(np.copy, self._numbers[name]), name in ("top_k", "top_p"))
                for name, on in self._on.items()
            }
            constrained = () if self.room is None else (ConstrainedRows(self.room.automata, None, beams=False),)
            filters = [rows.pop(name) for name in [*rows] if OPTIONS[name].only_sampling]
            plain = traced_options(GenerationConfig(), self._vocab_size)
            processors = (*rows.values(), *constrained, *filters)  # in the order of `generate`
            own: dict[str, Any] = {"eos_ids": self._eos.copy(), "samples": self._samples.copy()}
            own["ranked"] = self._ranked.copy()
            numbers = dataclasses.replace(plain, processors=processors, **own)
            self._known = jax.device_put(numbers, self._device)
        return self._known


def made(name: str, value: Any, call: Call) -> Processor | None:
    """The processor of an option's value, in the one shape that an engine has for it; None if it has nothing to do."""
    kind: Any = OPTIONS[name].processor
    processor = kind.of(value, call)
    if isinstance(processor, TopK):
        return AnyTopK(processor.k)
    if isinstance(processor, SequenceBias):
        number, longest = processor.prefixes.shape
        if len(value) > BIASES or longest >= BIASED:
            raise JaxgenError(
                f"sequence_bias: {len(value)} sequences of up to {longest + 1} tokens; an engine takes {BIASES} of "
                f"up to {BIASED}"
            )
        prefixes = np.full((BIASES, BIASED - 1), -1, np.int32)
        number = min(number, BIASES)
        prefixes[:number, BIASED - 1 - longest :] = processor.prefixes[:number]
        return SequenceBias(
            prefixes, pad_to(processor.last[:number], (BIASES,)), pad_to(processor.bias[:number], (BIASES,))
        )
    return processor
