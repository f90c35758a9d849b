"""What a row will take: its prompt in tokens, and the length at which it ends. No weights are needed for that."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Int

from jaxgen.batch.rows import Row
from jaxgen.engine.constraints import Room
from jaxgen.engine.options import NEUTRAL, RowOptions
from jaxgen.errors import JaxgenError
from jaxgen.generation.choosing.sample import key_words
from jaxgen.generation.options.config import GenerationConfig, resolve
from jaxgen.generation.options.table import Extras
from jaxgen.generation.prompts.contexts import check_pieces, contexts, note
from jaxgen.generation.prompts.layout import SMALLEST_TOTAL, bucket, checked_prompt
from jaxgen.generation.prompts.row_limits import row_limits
from jaxgen.text.inputs import encode

CONSTRAINTS = (1024, 384)  # room of a row for one, as an engine has by default


@dataclasses.dataclass(frozen=True)
class Task:
    """A row that fits, and the bucket of its length: the same wherever and whenever it is planned."""

    row: Row
    ids: Int[np.ndarray, " T"]
    slots: int

    @property
    def options(self) -> dict[str, Any]:
        """Those of the row itself."""
        return self.row.options


class Planner:
    """Plans rows for a model, by its config and its stored generation config; `options` are those of all rows.

    Raises `JaxgenError` for options that an engine has not.
    """

    def __init__(self, tokenizer: Any, config: Any, stored: GenerationConfig, options: Mapping[str, Any]):
        self._tokenizer, self._config, self._stored, self._options = tokenizer, config, stored, dict(options)
        room = Room(1, config.vocab_size, CONSTRAINTS, None)
        self._checks = RowOptions(1, config.vocab_size, tuple(NEUTRAL), room, None)
        self._usual = self._resolved({})

    def plan(self, row: Row) -> Task:
        """Raises `JaxgenError` for a row that cannot be: too long, or with options of its own that are none."""
        config = self._resolved(row.options) if row.options else self._usual
        ids = checked_prompt([encode(self._tokenizer, row.prompt)["input_ids"]], None, self._config.vocab_size)[0][0]
        lengths = np.array([len(ids)], np.int32)
        check_pieces(self._config, lengths)
        limit = row_limits(config, lengths, contexts(self._config, lengths), note(self._config))[0]
        return Task(row, ids, bucket(int(limit), SMALLEST_TOTAL))

    def _resolved(self, own: Mapping[str, Any]) -> GenerationConfig:
        options = {**self._options, **own}
        if (seed := options.pop("seed", None)) is not None and key_words(None, seed)[0].ndim > 1:
            raise JaxgenError("seed: a row has one")
        extras, fields = Extras.take({"tokenizer": self._tokenizer, **options})
        config = resolve({"return_dict_in_generate": True, **fields}, None, self._stored)
        if config.sequences_per_prompt > 1:
            raise JaxgenError("num_return_sequences: a row has one completion; write it several times, with an id each")
        if config.max_time is not None:
            raise JaxgenError("max_time: what a row gets would depend on the others, and on the machine")
        self._checks.check(config, extras)
        return config
