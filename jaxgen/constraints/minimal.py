"""The smallest automaton that says the same: states behind which the same texts match become one.

A pattern that repeats a part (`item(, item)*`) is built with a copy of it for each place; nothing tells the copies
apart. Source: Moore 1956, refinement of partitions; as in Hopcroft 1971, what did not change is not looked at again.
"""

import numpy as np
from jaxtyping import Int

from jaxgen.constraints.automaton import DEAD, ByteAutomaton


def minimal(automaton: ByteAutomaton) -> ByteAutomaton:
    """The same texts with as few states as there can be, in the order that they were in.

    >>> from jaxgen.constraints.automaton import ByteAutomaton
    >>> step = np.zeros((5, 256), np.int32)
    >>> step[1, [97, 100]], step[[2, 3], 98] = (2, 3), 4  # ab|db
    >>> len(minimal(ByteAutomaton(step, np.arange(5) == 4)).step)  # behind an a and behind a d are one
    4
    """
    kind = _kinds(automaton)
    first, kind = np.unique(kind, return_index=True, return_inverse=True)[1:]
    place = np.argsort(np.argsort(first))[kind.reshape(-1)]  # a kind stands where its first state stood
    first = np.sort(first)
    if len(first) <= ByteAutomaton.start or place[ByteAutomaton.start] == DEAD:
        return automaton  # nothing matches
    return ByteAutomaton(place[automaton.step[first]].astype(np.int32), automaton.final[first])


def _kinds(automaton: ByteAutomaton) -> Int[np.ndarray, " S"]:
    """A number for each state; two have the same if the same texts match behind them.

    In each pass those states are told apart of which a byte leads to a state that has got a new number. All others of
    their kind agree as they did, and keep theirs.
    """
    step = np.unique(automaton.step, axis=1)  # most bytes do the same everywhere
    count, width = step.shape
    before = np.argsort(step, axis=None, kind="stable") // width  # states, by the state that a byte leads to
    begins = np.searchsorted(np.sort(step, axis=None), np.arange(count + 1))
    kind, changed = automaton.final.astype(np.int64), np.arange(count)
    sizes, kinds = np.bincount(kind, minlength=count + 1), 2
    while (seen := _between(before, begins[changed], begins[changed + 1])).size:
        told = np.concatenate([kind[seen, None], kind[step[seen]]], axis=1)
        groups, group, size = np.unique(told, axis=0, return_inverse=True, return_counts=True)
        # Where all of a kind were seen, the largest group keeps its number, so that little changes.
        order = np.lexsort((-size, groups[:, 0]))
        largest = np.flatnonzero(np.diff(groups[order, 0], prepend=-1))
        all_seen = np.add.reduceat(size[order], largest) == sizes[groups[order[largest], 0]]
        new = np.ones(len(groups), bool)
        new[order[largest[all_seen]]] = False
        number = groups[:, 0].copy()
        number[new] = kinds + np.arange(new.sum())
        kinds += int(new.sum())
        np.subtract.at(sizes, groups[new, 0], size[new])
        sizes[number[new]] = size[new]
        kind[seen] = number[group.reshape(-1)]
        changed = seen[new[group.reshape(-1)]]
    return kind


def _between(
    values: Int[np.ndarray, " E"], begins: Int[np.ndarray, " N"], ends: Int[np.ndarray, " N"]
) -> Int[np.ndarray, " M"]:
    """What stands in several stretches of `values`, each value once."""
    lengths = ends - begins
    return np.unique(values[np.arange(lengths.sum()) + np.repeat(begins - np.cumsum(lengths) + lengths, lengths)])
