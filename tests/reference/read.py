"""The committed reference files: reading (light tests) and writing (make.py). No torch."""

import json
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

_HERE = Path(__file__).parent
GENERATE, LOGITS, FILTERS = _HERE / "generate.json", _HERE / "logits.npz", _HERE / "filters.npz"


@dataclass(frozen=True)
class Reference:
    """What transformers on torch computes, and in which versions."""

    tokens: dict[str, np.ndarray]  # run -> int64 [B, steps]
    logits: dict[str, np.ndarray]  # "<case>/<row>" -> float32 [length, V]; "<run>/log_probs" -> [B, steps]
    filtered: dict[str, np.ndarray]  # setting -> float32 [B, V]
    versions: dict[str, str]


@cache
def read() -> Reference:
    """The committed reference."""
    runs = json.loads(GENERATE.read_text(encoding="utf-8"))
    tokens = {name: np.array([row.split() for row in run["rows"]], np.int64) for name, run in runs.items()}
    logits, filtered = (_arrays(path) for path in (LOGITS, FILTERS))
    return Reference(tokens, logits, filtered, next(iter(runs.values()))["versions"])


def write(reference: Reference) -> None:
    """Replace the committed reference."""
    runs = {
        name: {"versions": reference.versions, "rows": [" ".join(map(str, row)) for row in rows.tolist()]}
        for name, rows in reference.tokens.items()
    }
    GENERATE.write_text(json.dumps(runs, indent=1) + "\n", encoding="utf-8")
    versions = {"versions": np.array(json.dumps(reference.versions))}
    for path, arrays in ((LOGITS, reference.logits), (FILTERS, reference.filtered)):
        everything: dict[str, Any] = versions | arrays
        np.savez_compressed(path, **everything)


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(path, allow_pickle=False) as archive:
        return {name: archive[name] for name in archive.files if name != "versions"}
