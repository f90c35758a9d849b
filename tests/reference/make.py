"""Make the committed reference with transformers on torch, or check it: `python -m tests.reference.make [--check]`.

Writes, next to this file:
- `generate.json`: the new tokens of every run in `cases.RUNS`, one string per row;
- `logits.npz`: `<case>/<row>` float32 `[length, V]`, and `<run>/log_probs` float32 `[B, steps]`;
- `filters.npz`: what HF's logits processors make of `filters.inputs(SEED)` under each of `filters.SETTINGS`.
Each holds the versions that computed it.
"""

import argparse
import json
import sys

import numpy as np

from tests.reference import filters, live
from tests.reference.cases import CASES, LOG_PROBS, RUNS
from tests.reference.read import FILTERS, GENERATE, LOGITS, Reference, read, write

ATOL = 1e-5  # float32 sums differ this much between CPUs
SMALLEST_LEAD = 1e-3  # with a smaller lead, greedy tokens would test luck: choose another seed for the case


def compute() -> Reference:
    """Everything, live. Raises `ValueError` for a run that is decided by less than `SMALLEST_LEAD`."""
    tokens, logits = {}, {}
    for name, case in CASES.items():
        model = live.hf_model(case.config, case.seed)
        prompts = case.prompts()
        for row, values in enumerate(live.prefill_logits(model, prompts)):
            logits[f"{name}/{row}"] = values
        for run_name, run in RUNS.items():
            if run.case != name:
                continue
            new, scores = live.generate(model, prompts, run)
            lead = live.smallest_lead(scores, new, run.eos())
            if lead < SMALLEST_LEAD:
                raise ValueError(f"{run_name}: the closest decision leads by {lead}; choose another seed")
            tokens[run_name] = new
            if run_name in LOG_PROBS:
                logits[f"{run_name}/log_probs"] = live.log_probs(scores, new)
    batch = filters.inputs(filters.SEED)
    filtered = {name: live.filtered(batch, settings) for name, settings in filters.SETTINGS.items()}
    return Reference(tokens, logits, filtered, live.versions())


def differences(committed: Reference, computed: Reference) -> list[str]:
    """What differs, one line per entry; empty if nothing does (versions may differ)."""
    found = []
    for kind in ("tokens", "logits", "filtered"):
        old, new = getattr(committed, kind), getattr(computed, kind)
        found += [f"{kind}: {name} is only on one side" for name in sorted(old.keys() ^ new.keys())]
        for name in sorted(old.keys() & new.keys()):
            same_shape = old[name].shape == new[name].shape
            if not same_shape or not np.allclose(old[name], new[name], rtol=0 if kind == "tokens" else ATOL, atol=ATOL):
                found.append(f"{kind}: {name} differs from what is committed")
    return found


def main() -> int:
    """Command line; the exit code is 1 when `--check` finds a difference."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with what is committed; write nothing")
    check = parser.parse_args().check
    computed = compute()
    if not check:
        write(computed)
        sizes = {path.name: path.stat().st_size for path in (GENERATE, LOGITS, FILTERS)}
        sys.stdout.write(json.dumps(sizes) + "\n")
        return 0
    found = differences(read(), computed)
    sys.stdout.write("".join(f"{line}\n" for line in found) or "the committed reference matches\n")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
