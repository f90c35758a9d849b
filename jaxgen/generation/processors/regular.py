"""The processor of `constraint`: what a regular expression does not allow to come next is removed."""

from jaxgen.generation.choosing.constrained import Automata
from jaxgen.generation.processors.constraint import restrict
from jaxgen.generation.processors.processor import Call, Logits, Processor, static
from jaxgen.generation.prompts.rows import Rows


class Constrained(Processor):
    """Remove what must not come next, and what would leave too few tokens for an end.

    A row of which the processors before have removed all that may come chooses evenly among that: the constraint holds
    whatever else is asked. Source: Willard and Louf 2023 (arXiv 2307.09702).
    """

    automata: Automata
    beams: bool = static()

    @classmethod
    def of(cls, value: Automata, call: Call) -> "Constrained":
        return cls(value, call.beams)

    def __call__(self, logits: Logits, rows: Rows) -> Logits:
        assert rows.constrained is not None
        left = rows.max_lengths - rows.lengths - 1
        return restrict(logits, rows, self.automata.allowed(rows.constrained, rows.prompts, left), self.beams)
