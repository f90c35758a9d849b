"""Damage to files, drawn from a seed: what a flipped bit, a lost field or a hostile author does to them."""

import copy
import json
import random
from typing import Any

# What no field expects: other types, the edges of int32, float32 and JSON, and text that is none.
_STRANGE: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 3, 10**6, 2**31 - 1, 2**31, 2**32, -(2**63), 10**30, 10**400, 0.0, 0.5, -1e-300, 1e39,
    1e308, float("nan"), float("inf"),
    "", "x", "1", "\ud800", "\0", "é" * 9, [], [1], ["x"], [[]], {}, {"x": 1}, {"": {}},
)  # fmt: skip


def mutate_json(draw: random.Random, value: Any) -> str:
    """The JSON of `value` with one to three of its parts changed, lost, renamed, or of another type."""
    value = copy.deepcopy(value)
    for _ in range(draw.choice((1, 1, 1, 2, 3))):
        holders = list(_holders(value))
        if not holders:
            break
        holder = draw.choice(holders)
        key = draw.choice(list(holder)) if isinstance(holder, dict) else draw.randrange(len(holder))
        kind = draw.randrange(6)
        if kind == 0:
            del holder[key]
        elif kind == 1 and isinstance(holder, dict):
            name = str(key)
            place = draw.randrange(len(name) or 1)
            holder[name[:place] + chr(ord(name[place : place + 1] or "a") ^ 1) + name[place + 1 :]] = holder.pop(key)
        elif kind == 2 and type(holder[key]) in (int, float):
            holder[key] = (
                holder[key] + draw.choice((1, -1)) if draw.random() < 0.5 else holder[key] * draw.choice((-1, 2, 1000))
            )
        elif kind == 3 and isinstance(holder[key], str) and holder[key]:
            place = draw.randrange(len(holder[key]))
            holder[key] = (
                holder[key][:place] + draw.choice("\0x{}%(*\ud800é") + holder[key][place + draw.randrange(2) :]
            )
        else:
            holder[key] = copy.deepcopy(draw.choice(_STRANGE))
    return json.dumps(value)


def mutate_text(draw: random.Random, text: str) -> str:
    """`text` with one to three of its characters lost, repeated, or replaced by others of it or strange ones."""
    for _ in range(draw.choice((1, 1, 2, 3))):
        place = draw.randrange(len(text))
        other = draw.choice((draw.choice(text), draw.choice("\0{}%|-(\"'1*.é"), text[place] * 2, ""))
        text = text[:place] + other + text[place + 1 :]
    return text


def mutate_bytes(draw: random.Random, data: bytes) -> bytes:
    """`data` with a bit flipped, cut short, or with some bytes lost, repeated or replaced."""
    changed, place, kind = bytearray(data), draw.randrange(len(data)), draw.randrange(5)
    until = min(len(data), place + draw.randrange(1, 9))
    if kind == 0:
        del changed[place:]
    elif kind == 1:
        del changed[place:until]
    elif kind == 2:
        changed[place:place] = changed[place:until]
    elif kind == 3:
        changed[place:until] = draw.randbytes(until - place)
    else:
        changed[place] ^= 1 << draw.randrange(8)
    return bytes(changed)


def _holders(value: Any):
    """Every object and list inside, the outermost first, as far as there is something in it."""
    if isinstance(value, dict | list) and value:
        yield value
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _holders(inner)
