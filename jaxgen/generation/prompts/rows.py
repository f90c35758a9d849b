"""What a processor, or a stopping criterion, may know of the rows whose next token is being chosen."""

import dataclasses

from jaxtyping import Array, Bool, Int

from jaxgen.pytree import pytree


@pytree
@dataclasses.dataclass
class Rows:
    """Rows in the middle of generation. There is no padding here: a row's token p is `tokens[row, p]`."""

    tokens: Int[Array, "R S"]  # the prompt, then the new tokens; from `lengths` on: anything
    lengths: Int[Array, " R"]  # tokens the row holds; the position of the next one
    prompt_lengths: Int[Array, " R"]  # how many of them came with the prompt
    max_lengths: Int[Array, " R"]  # the length at which the row ends: prompt and all the new tokens it may get
    prompts: Int[Array, " R"]  # the index, in the call, of the prompt that the row continues
    running: Bool[Array, " R"]  # False: the row has ended, or only fills up a bucket; its result is not used
    constrained: Int[Array, " R"] | None = None  # where the row is in its constraint's automaton

    @property
    def new_tokens(self) -> Int[Array, " R"]:
        """How many tokens the row has been given so far."""
        return self.lengths - self.prompt_lengths
