"""`jaxgen bench`: how fast a checkpoint loads and generates on this machine, and what memory that takes."""

import json
import math
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxgen.errors import JaxgenError
from jaxgen.generation.options.checks import integer
from jaxgen.generation.options.config import GenerationConfig

KINDS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "float16": {"dtype": "float16"},
    "int4": {"load_in_4bit": True},
}
_REPEATS = 3  # of what is timed, after a first call that compiles; the median counts


def measure(
    directory: Path, kind: str, batches: Sequence[int], *, prompt_tokens: int = 64, new_tokens: int = 64
) -> dict[str, Any]:
    """Load a checkpoint in one of `KINDS`, and time greedy search for these batches: seconds, tokens per second, bytes.

    Of each batch: `first_call_seconds` (which compiles), `first_token_seconds` (the prompt is read, and a token
    chosen), `tokens_per_second` (of all rows together, after their first). `peak_bytes` is of the device, or for the
    CPU of this process since it began; None where nobody knows. A batch for which the memory does not suffice has an
    `error`, and larger ones are left out. Raises `JaxgenError` as `from_pretrained` and `generate`.
    """
    import jax
    from flax import nnx

    from jaxgen.convert.load import AutoModelForCausalLM

    started = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(directory, **KINDS[kind])
    jax.block_until_ready(nnx.state(model))
    found: dict[str, Any] = {"kind": kind, "load_seconds": time.perf_counter() - started, "batches": []}
    model.generation_config = GenerationConfig(do_sample=False, pad_token_id=0)  # greedy, and no token ends a row
    for batch in batches:
        try:
            times = _times(model, batch, prompt_tokens, new_tokens)
        except RuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found["batches"].append({"batch": batch, "error": "the memory does not suffice"})
            break
        found["batches"].append({"batch": batch, **times})
    return {**found, "peak_bytes": _peak_bytes(jax.local_devices()[0])}


def _times(model: Any, batch: int, prompt_tokens: int, new_tokens: int) -> dict[str, float]:
    ids = np.arange(batch * prompt_tokens).reshape(batch, prompt_tokens) * 7919 % model.config.vocab_size

    def seconds(tokens: int) -> float:
        started = time.perf_counter()
        # One cache, so that both lengths run the same programs.
        model.generate(ids, max_new_tokens=tokens, max_cache_len=prompt_tokens + new_tokens)
        return time.perf_counter() - started

    first_call = seconds(new_tokens)
    first = statistics.median(seconds(1) for _ in range(_REPEATS))
    whole = statistics.median(seconds(new_tokens) for _ in range(_REPEATS))
    rate = batch * (new_tokens - 1) / max(whole - first, 1e-9)
    return {"first_call_seconds": first_call, "first_token_seconds": first, "tokens_per_second": rate}


def _peak_bytes(device: Any) -> int | None:
    if stats := device.memory_stats():
        return stats.get("peak_bytes_in_use")
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def checked(kinds: str, batches: str, prompt_tokens: int, new_tokens: int) -> tuple[list[str], list[int]]:
    """The kinds and batches that were asked for, separated by commas. Raises `JaxgenError` for what cannot be."""
    names = [name for name in kinds.split(",") if name]
    if not names or (unknown := [name for name in names if name not in KINDS]):
        raise JaxgenError(f"--kinds {unknown[0] if names else kinds!r}: choose among {', '.join(KINDS)}")
    sizes = [int(size) if size.isdigit() else size for size in batches.split(",") if size]
    if not sizes:
        raise JaxgenError(f"--batches {batches!r} names no batch; write such as 1,8")
    integer(1)("--prompt-tokens", prompt_tokens)
    integer(2)("--new-tokens", new_tokens)
    return names, [integer(1)("--batches", size) for size in sizes]


def measured(directory: Path, kinds: Sequence[str], batches: Sequence[int], **sizes: int) -> dict[str, Any]:
    """`measure` for each kind, and where: several in a process each, since a peak of memory is a process's."""
    if len(kinds) > 1:
        reports = [_apart(directory, kind, batches, **sizes) for kind in kinds]
        return {**reports[0], "runs": [run for report in reports for run in report["runs"]]}
    import jax

    import jaxgen

    runs = [measure(directory, kinds[0], batches, **sizes)]
    device = jax.local_devices()[0]
    versions = {"jaxgen": jaxgen.__version__, "jax": jax.__version__}
    return {**versions, "platform": device.platform, "device": device.device_kind, **sizes, "runs": runs}


def _apart(directory: Path, kind: str, batches: Sequence[int], **sizes: int) -> dict[str, Any]:
    command = [sys.executable, "-m", "jaxgen", "bench", "--json", "--model", str(directory), "--kinds", kind]
    command += ["--batches", ",".join(map(str, batches))]
    for name, size in sizes.items():
        command += [f"--{name.replace('_', '-')}", str(size)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode == 130:
        raise KeyboardInterrupt
    if done.returncode:
        reason = done.stderr.strip().removeprefix("jaxgen: ") or f"its process ended with exit code {done.returncode}"
        raise JaxgenError(f"{kind}: {reason}")
    return json.loads(done.stdout)


def table(report: dict[str, Any]) -> str:
    """What was measured, for people.

    >>> row = {"batch": 8, "first_call_seconds": 2.0, "first_token_seconds": 0.012, "tokens_per_second": 1234.4}
    >>> run = {"kind": "int4", "load_seconds": 0.51, "peak_bytes": 2_000_000_000, "batches": [row]}
    >>> print(table({"runs": [run]}))
    | kind | load (s) | peak memory | batch | first call (s) | first token (ms) | tokens/s |
    |---|---|---|---|---|---|---|
    | int4 | 0.51 | 2.00 GB | 8 | 2.00 | 12.0 | 1,234 |
    """
    lines = [
        "| kind | load (s) | peak memory | batch | first call (s) | first token (ms) | tokens/s |",
        "|---|---|---|---|---|---|---|",
    ]
    for run in report["runs"]:
        peak = math.nan if run["peak_bytes"] is None else run["peak_bytes"] / 1e9
        head = f"| {run['kind']} | {run['load_seconds']:.2f} | {peak:.2f} GB |"
        for row in run["batches"]:
            if "error" in row:
                lines.append(f"{head} {row['batch']} | {row['error']} | | |")
                continue
            first, rate = 1000 * row["first_token_seconds"], row["tokens_per_second"]
            lines.append(f"{head} {row['batch']} | {row['first_call_seconds']:.2f} | {first:.1f} | {rate:,.0f} |")
    return "\n".join(lines)
