"""The smallest automaton that says the same: states behind which the same texts match become one.

A pattern that repeats a part (`item(, item)*`) is built with a copy of it for each place; nothing tells the copies
apart. Source: Moore 1956, refinement of partitions.
"""

import numpy as np

from jaxgen.constraints.automaton import DEAD, ByteAutomaton


def minimal(automaton: ByteAutomaton) -> ByteAutomaton:
    """The same texts with as few states as there can be, in the order that they were in.

    >>> from jaxgen.constraints.automaton import byte_automaton
    >>> large = byte_automaton("a(b|c)|d(b|c)")
    >>> len(large.step), len(minimal(large).step)  # behind an a and behind a d are one
    (5, 4)
    """
    columns = np.unique(automaton.step, axis=1).T  # most bytes do the same everywhere
    kind, found = automaton.final.astype(np.int64), 0
    while kind.max() >= found:  # until a pass tells no more kinds of states apart
        found = int(kind.max()) + 1
        for after in columns:
            kind = np.unique(kind * len(kind) + kind[after], return_inverse=True)[1].reshape(-1)
    first, kind = np.unique(kind, return_index=True, return_inverse=True)[1:]
    place = np.argsort(np.argsort(first))[kind.reshape(-1)]  # a kind stands where its first state stood
    first = np.sort(first)
    if len(first) <= ByteAutomaton.start or place[ByteAutomaton.start] == DEAD:
        return automaton  # nothing matches
    return ByteAutomaton(place[automaton.step[first]].astype(np.int32), automaton.final[first])
