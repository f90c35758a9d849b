"""The program that builds automata for `automaton.py`: some patterns take all there is, and this one may be ended."""

import base64
from collections.abc import Callable
from typing import Any

import numpy as np

from jaxgen.bounded import answer_all
from jaxgen.constraints.automaton import ByteAutomaton
from jaxgen.constraints.minimal import minimal

# Stands before every text: the automaton is built for places behind it, where a `^` is wrong and nothing else special.
_FRONT = 0x00


def builder() -> Callable[..., dict[str, Any]]:
    """What makes an automaton of a pattern, of so many states at most."""
    from outlines_core import Index, Vocabulary

    vocabulary = Vocabulary(256, {bytes([byte]): [byte] for byte in range(256)})

    def build(pattern: str, states: int) -> dict[str, Any]:
        try:
            # A `\z` keeps the alternatives that come after one that matches already.
            index = Index(rf"\x{_FRONT:02X}(?:{pattern})\z", vocabulary)
        except ValueError as error:
            return {"refused": str(error)}
        moves, final = index.get_transitions(), index.get_final_states()
        if len(moves) > states:
            return {"states": len(moves)}
        # Numbered from 1 in the order in which the smallest bytes lead to them, which is the same every time.
        order = [moves[index.get_initial_state()][_FRONT]]
        number, step = {order[0]: 1}, [np.zeros(256, np.int32)]
        for state in order:  # which grows
            row = np.zeros(257, np.int32)  # 256: the end
            for byte, following in sorted(moves.get(state, {}).items()):
                if following not in number:
                    number[following] = len(order) + 1
                    order.append(following)
                row[byte] = number[following]
            step.append(row[:256])
        ends = np.array([False, *(state in final for state in order)])
        smallest = minimal(ByteAutomaton(np.array(step), ends))
        return {"step": _text(smallest.step), "final": _text(smallest.final)}

    return build


def _text(numbers: np.ndarray) -> str:
    return base64.b64encode(numbers.tobytes()).decode()


if __name__ == "__main__":
    answer_all(builder)
