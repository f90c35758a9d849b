"""MkDocs hook: the parts of the pages that are made when the site is built, so that they cannot go stale.

`<!-- generated: NAME -->` on a line of its own becomes what `PARTS[NAME]()` returns. The tables of figures come from
benchmarks/results; where the file is missing, the part is left out. Figures are rounded here and nowhere else.
"""

import argparse
import json
import os
import re
import runpy
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
MARKER = re.compile(r"^<!-- generated: (.*) -->$", re.M)
sys.path.insert(0, str(Path(__file__).parent))  # MkDocs loads this file by its path

from fields import fields  # noqa: E402
from levels import reproducibility  # noqa: E402
from meshes import meshes  # noqa: E402
from pictures import plots, result  # noqa: E402
from rollouts import ragged, rollouts  # noqa: E402
from throughput import batch, engine, families, serve, steps  # noqa: E402

# The files of results do not all say what they were measured on.
EPYC, XEON, NO_GPU = "2 cores of an AMD EPYC", "2 cores of an Intel Xeon", "a machine without a GPU"
AOT = {"jax": "0.10.2", "jax-cuda12-plugin": "0.10.2"}


def on_page_markdown(markdown: str, **_: Any) -> str:
    """What MkDocs calls for each page. Raises KeyError for a part that nobody makes."""
    return MARKER.sub(lambda match: make(match[1]), markdown)


def make(name: str) -> str:
    """A part, by its name; "fields NAME" is a table of the fields of `jaxgen.NAME`."""
    if name.startswith("fields "):
        return field_table(name.removeprefix("fields "))
    return PARTS[name]()


def read(name: str) -> Any:
    """The results of a benchmark, or None where there are none."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def rows_of(header: Iterable[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table whose columns after the first stand on the right."""
    header = list(header)
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)


def part(title: str, prose: str, table: str, source: str) -> str:
    """A section: what was measured, the figures, and the command, machine and versions that gave them."""
    return f"## {title}\n\n{prose}\n\n{table}\n\n{source}\n"


def source(command: str, machine: str, versions: dict[str, Any] | None, name: str) -> str:
    """The line below a table."""
    said = ", ".join(f"{package} {version}" for package, version in (versions or {}).items() if package != "jaxgen")
    said = f"; {said}" if said else ""
    return f"`{command}` on {machine}{said}. All figures: `benchmarks/results/{name}.json`.\n{{ .source }}"


def support() -> str:
    """What `python -m jaxgen.generation.options.support` prints, and the tests that show it."""
    from jaxgen.generation.options.support import table

    shown_by = runpy.run_path(str(ROOT / "tests" / "shown_by.py"))["SHOWN_BY"]
    return table(shown_by).replace("| option | | |", "| option | supported? | shown by |")


# What is said of a section of options, and the pages that its words lead to.
SAID = {
    "Processors": "They run in this order; those of sampling stand before the watermark.\n\n",
    "Sampling": "These count when `do_sample=True`, in this order.\n\n",
}
LINKS = {"`WatermarkingConfig`": "processors.md", "`GenerateOutput`": "generate.md"}


def options() -> str:
    """The fields of a GenerationConfig, a table for each section."""
    from jaxgen.generation.options.table import OPTIONS

    text = ""
    for section in dict.fromkeys(option.section for option in OPTIONS.values()):
        rows = [(n, o.default_shown, o.says) for n, o in OPTIONS.items() if o.section == section]
        lines = "\n".join(f"| `{name}` | {default} | {says} |" for name, default, says in rows)
        text += f"## {section}\n\n{SAID.get(section, '')}| option | default | meaning |\n|---|---|---|\n{lines}\n\n"
    for word, page in LINKS.items():
        text = text.replace(word, f"[{word}]({page})")
    return text.rstrip()


def command_line() -> str:
    """The help of every command."""
    from jaxgen.arguments import parser

    before = {name: os.environ.get(name) for name in ("COLUMNS", "NO_COLOR")}
    os.environ.update(COLUMNS="90", NO_COLOR="1")
    try:
        actions = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
        return "\n".join(
            f"## jaxgen {name}\n\n```text\n{command.format_help()}```\n"
            for action in actions
            for name, command in action.choices.items()
        )
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def field_table(name: str) -> str:
    """The fields of a dataclass: name, type and meaning."""
    import importlib

    import jaxgen

    module, _, last = name.rpartition(".")
    kind = getattr(importlib.import_module(module) if module else jaxgen, last)
    rows = ((f"`{field}`", f"`{kind.replace('|', chr(92) + '|')}`", said) for field, kind, said in fields(kind))
    return "| field | type | |\n|---|---|---|\n" + "\n".join("| " + " | ".join(row) + " |" for row in rows)


def decode_cpu() -> str:
    """Tokens per second against transformers, on each machine."""
    tables = []
    for name, machine in (("decode_cpu", EPYC), ("decode_cpu_xeon", XEON)):
        if (results := read(name)) is None:
            continue
        rows = (
            (_model(r["model"]), r["batch"], f"{r['jaxgen']:,.0f}", f"{r['transformers']:,.0f}", f"{r['ratio']:.1f}")
            for r in results["rows"]
        )
        header = ("model", "batch", "jaxgen", "transformers", "ratio")
        said = f"{machine} that reads {results['machine']['read_gb_per_second']:.0f} GB/s"
        command = source("python benchmarks/decode_cpu.py --repeats 7", said, results["machine"]["versions"], name)
        tables.append(rows_of(header, rows) + "\n\n" + command)
    if not tables:
        return ""
    prose = (
        "Tokens per second, jaxgen and transformers on torch with the same weights: prompts of 16 tokens, 64 new ones, "
        "greedy, float32. The ratio depends on the machine."
    )
    return part("Decoding on a CPU", prose, "\n\n".join(tables), "")


def _model(name: str) -> str:
    return {"demo": "demo, 2.7M parameters", "125M": "125M shape, random weights"}.get(name, name)


def speculate() -> str:
    """Speed of speculation against plain decoding."""
    if (results := read("speculate")) is None:
        return ""
    rows = (
        (_model(r["model"]), r["drafter"], r["batch"], f"{r['acceptance']:.0%}", f"{r['speed_up']:.2f}")
        for r in results["rows"]
    )
    prose = (
        "Speed against plain decoding, with 4 drafts at a time. On these CPUs it does not pay: a model reads five "
        "tokens there in two to six times the time of one."
    )
    table = rows_of(("model", "drafts from", "batch", "accepted", "speed"), rows)
    command = source("python benchmarks/speculate.py", XEON, _versions(results), "speculate")
    return part("Speculative decoding", prose, table, command)


def _versions(results: dict[str, Any]) -> dict[str, Any]:
    """The versions that a file of results names, in whichever of its two forms."""
    machine = results.get("machine", {})
    return results.get("versions") or machine.get("versions") or {k: machine[k] for k in ("jax",) if k in machine}


def beams() -> str:
    """Tokens per second of beam search."""
    if (results := read("beams")) is None:
        return ""
    rows = (
        (
            _model(r["model"]),
            r["batch"],
            r["prompt"],
            *(f"{r[name]:,.1f}" for name in ("moved", "copied", "transformers")),
        )
        for r in results["rows"]
    )
    prose = (
        "Tokens per second and prompt with 4 beams. *moved* is what jaxgen does, which copies only what beams do not "
        "share; *copied* copies the whole cache at each step."
    )
    table = rows_of(("model", "batch", "prompt", "moved", "copied", "transformers"), rows)
    command = source(
        "python benchmarks/beams.py --new-tokens 32 --repeats 3", XEON, results["machine"]["versions"], "beams"
    )
    return part("Beam search", prose, table, command)


def processors() -> str:
    """Time of each logits processor."""
    if (results := read("processors")) is None:
        return ""
    cases = [f"V = {case['vocab']:,}, {case['batch']} rows" for case in results["cases"]]
    rows = ((name, *(f"{us / 1000:.2f}" for us in times)) for name, times in results["microseconds"].items())
    prose = "Milliseconds per step, for vocabularies of V tokens. `top_p` and `typical_p` need no sort."
    command = source("python benchmarks/processors.py --repeats 9", XEON, _versions(results), "processors")
    return part("Logits processors", prose, rows_of(("processor", *cases), rows), command)


def constraints() -> str:
    """What constraints cost to build, to hold and per step."""
    if (results := read("constraints")) is None:
        return ""
    header = ("constraint", "V", "states", "classes", "kB", "first, s", "next, s", "1 row, ms", "8 rows, ms")
    rows = (
        (
            r["constraint"],
            f"{r['vocab']:,}",
            r["states"],
            r["classes"],
            f"{r['kilobytes']:.0f}",
            f"{r['first_seconds']:.2f}",
            f"{r['next_seconds']:.3f}",
            *(f"{(r[f'microseconds_{batch}'] - r[f'nothing_{batch}']) / 1000:.2f}" for batch in (1, 8)),
        )
        for r in results["rows"]
    )
    prose = (
        "Vocabularies of V tokens. What is held on the device; the time to build it, where nothing is known of the "
        "vocabulary and where it has been read; and the time that the mask adds to a step."
    )
    command = source(
        "python benchmarks/constraints.py --repeats 41",
        f"{XEON} that others used too",
        _versions(results),
        "constraints",
    )
    return part("Constraints", prose, rows_of(header, rows), command)


METHODS = {"absmax": "int4, absmax / 7", "rtn": "int4, searched (default)", "bitsandbytes": "NF4 (bitsandbytes)"}


def quality() -> str:
    """What four bits cost."""
    if (results := read("quality")) is None:
        return ""
    rows = (
        (
            METHODS.get(r["method"]) or (f"int4, {r['method']}" if r["method"] else r["weights"]),
            r["group_size"] or "",
            r["bits_per_weight"],
            f"{r['kl'] * 1e5:.2f} ± {r['kl_error'] * 1e5:.2f}",
            f"{r['perplexity']:.4f}",
            f"{r['agreement']:.2%}",
        )
        for r in results["rows"]
    )
    prose = (
        f"Divergence of the {results['model']}'s predictions from those in float32, on {results['tokens']['text']:,} "
        "tokens of text that it was neither trained nor calibrated on. The demo has 2.7M parameters: on a 7B model, "
        "expect the order, not the figures."
    )
    table = rows_of(("weights", "group", "bits", "KL, 1e-5 nats", "perplexity", "same top token"), rows)
    return part(
        "Quality of int4",
        prose,
        table,
        source("python benchmarks/quality.py", XEON, results["versions"], "quality"),
    )


def convert() -> str:
    """Time and memory of a conversion."""
    if (r := read("convert")) is None:
        return ""
    prose = (
        f"A random checkpoint of the Mistral-7B shape ({r['layers']} layers, {r['source_files']} files), converted to "
        f"int4 with groups of {r['group_size']}."
    )
    row = (
        f"{r['source_bytes'] / 1e9:.2f} GB",
        f"{r['target_bytes'] / 1e9:.2f} GB",
        f"{r['seconds']:,.0f} s",
        f"{r['peak_anonymous_bytes'] / 1e9:.2f} GB",
    )
    command = f"python benchmarks/convert.py --layers {r['layers']} --shards {r['source_files']}"
    table = rows_of(("bfloat16", "int4", "time", "most anonymous memory"), [row])
    return part("Conversion", prose, table, source(command, XEON, _versions(r), "convert"))


def gpu_aot() -> str:
    """What XLA makes of a decode step for an H200."""
    if (results := read("gpu_aot")) is None:
        return ""
    names = {"int4": "int4,&nbsp;group&nbsp;{}", "nf4": "NF4,&nbsp;block&nbsp;{}", "bf16": "bfloat16"}
    rows = (
        (
            names[r["weights"]].format(r["group_size"]),
            r["batch"],
            f"{r['launches_per_layer']:.1f}",
            r["launches_per_token"],
            f"{r['temp_bytes'] / 1e6:.1f} MB",
            r["loop_weight_buffers"],
            ", ".join(f"{name}&nbsp;{count}" for name, count in r["kernels"].items()),
        )
        for r in results
        if r["stage"] == "decode" and r["layers"] == 32
    )
    prose = (
        "A decode step of the Mistral-7B shape, compiled for an H200 on a machine without a GPU. These are facts about "
        "the program, not times."
    )
    header = ("weights", "batch", "launches per layer", "per token", "temporary memory")
    table = rows_of((*header, "unpacked weights in the loop", "launches of `jaxgen.kernels` per token"), rows)
    command = source("python benchmarks/gpu_aot.py --weights int4 nf4 bf16 --json", NO_GPU, AOT, "gpu_aot")
    return part("Compiled for a GPU", prose, table, command)


def decode_steps(rows: list[dict[str, Any]]) -> str:
    """Whole steps on a GPU."""
    header = ("weights", "batch", "context", "ms per step", "tokens/s", "share of the bandwidth's floor")
    lines = (
        (r["weights"], r["batch"], r["context"], r["ms_per_step"], f"{r['tokens_per_s']:,.0f}",
         f"{100 * r['share_of_floor']:.0f}%")
        for r in rows
    )  # fmt: skip
    return rows_of(header, lines)


def gpu_later() -> str:
    """The steps of a later run, of which the page tells the rest."""
    results = read("gpu-nvidia-h200-later") or {"rows": []}
    return decode_steps([row for row in results["rows"] if row["part"] == "decode"])


def gpu() -> str:
    """Times on a GPU: whole steps, prompts, and the products that they are made of."""
    if (results := read("gpu-nvidia-h200")) is None:
        return ""
    of = {part: [row for row in results["rows"] if row["part"] == part] for part in ("decode", "prefill", "kernel")}
    steps = decode_steps(of["decode"])
    prompts = rows_of(
        ("weights", "prompt", "ms", "tokens/s"),
        ((r["weights"], r["prompt"], r["ms"], f"{r['tokens_per_s']:,}") for r in of["prefill"]),
    )
    products = rows_of(
        ("int4 product", "rows", "microseconds"),
        ((r["product"], r["rows"], r["microseconds"][0][0]) for r in of["kernel"]),
    )
    prose = (
        "Random weights of the Mistral-7B shape; int4 in groups of 128, bfloat16 activations. The floor is what reading"
        " weights and cache once would take at the bandwidth that a sum over a large array reaches."
    )
    about = f"one {results['device']}"
    command = source(
        "python benchmarks/gpu.py --parts check step prefill", about, _versions(results), "gpu-nvidia-h200"
    )
    return part("Decoding on a GPU", prose, "\n\n".join((steps, prompts, products)), command)


def changes() -> str:
    """CHANGELOG.md without its title."""
    return (ROOT / "CHANGELOG.md").read_text(encoding="utf-8").split("\n", 1)[1]


def differences() -> str:
    """The README's table of differences from transformers."""
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Differences from transformers")[1]
    return section.split("\n## ")[0].strip()


PARTS: dict[str, Callable[[], str]] = {
    "differences": differences,
    "support": support,
    "options": options,
    "command line": command_line,
    "changes": changes,
    "decode_cpu": decode_cpu,
    "speculate": speculate,
    "beams": beams,
    "processors": processors,
    "constraints": constraints,
    "quality": quality,
    "convert": convert,
    "gpu-nvidia-h200": gpu,
    "gpu-nvidia-h200-later": gpu_later,
    "gpu_aot": gpu_aot,
    "result": result,
    "plots": plots,
    "reproducibility": lambda: reproducibility(read("reproducibility")),
    "rollouts": lambda: rollouts(read("rollouts")),
    "ragged": lambda: ragged(read("rollouts")),
    "families": lambda: families(read("families")),
    "engine": lambda: engine(read("engine")),
    "engine_steps": lambda: steps(read("engine_steps")),
    "mesh": lambda: meshes(read("mesh")),
    "batch": lambda: batch(read("batch")),
    "serve": lambda: serve(read("serve")),
}
