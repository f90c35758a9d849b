"""Which rows hold the beginning of a prompt already: a shared prefix is read once, and copied.

What a row's cache holds of its prompt was read in pieces of one size, each in one shape, so the same tokens have the
same keys and values to the last bit wherever they were read. The last piece of a prompt ends where the prompt does, so
what is behind the last whole piece is had only of a prompt of the same length: of another sample of it, that is all.
A row keeps what it holds after its request has ended, until another one comes.
"""

import dataclasses

import numpy as np
from jaxtyping import Int


@dataclasses.dataclass
class Held:
    """What a row's cache holds of a prompt: its first `count` tokens."""

    prompt: Int[np.ndarray, " T"] = dataclasses.field(default_factory=lambda: np.zeros(0, np.int32))
    count: int = 0
    length: int = 0  # tokens of the row by now: on a ring they overwrite its first ones


class Prefixes:
    """What all rows hold. `spare` is how many tokens a ring has room for beside its window; None: there is no ring."""

    def __init__(self, rows: int, chunk: int, spare: int | None):
        self.rows, self._chunk, self._spare = [Held() for _ in range(rows)], chunk, spare

    def longest(self, prompt: Int[np.ndarray, " T"], but: int | None = None) -> tuple[int, int]:
        """How many tokens of a prompt some row holds at most, and which; not row `but`.

        Its last token is never among them: it is what the row begins with.
        """
        best, source = 0, -1
        for row, held in enumerate(self.rows):
            if row != but and (count := self.usable(prompt, held)) > best:
                best, source = count, row
        return best, source

    def usable(self, prompt: Int[np.ndarray, " T"], held: Held) -> int:
        """How many tokens of a prompt a row has read, in the pieces that it would be read in, and still holds."""
        count = self.shared(prompt, held.prompt, held.count)
        return count if self._spare is None or held.length - count <= self._spare else 0

    def forget(self) -> None:
        """No row holds anything any more."""
        self.rows = [Held() for _ in self.rows]

    def shared(self, one: Int[np.ndarray, " T"], other: Int[np.ndarray, " U"], read: int) -> int:
        """How many tokens of one prompt are had from the first `read` tokens of another one."""
        most = min(read, len(one) - 1)
        differ = np.flatnonzero(one[:most] != other[:most])
        count = int(differ[0]) if differ.size else most
        whole = count == len(one) - 1 == len(other) - 1
        return count if whole else count // self._chunk * self._chunk
