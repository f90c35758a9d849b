"""What `benchmarks/rollouts.py` found, as a table: sampler against scorer."""

from typing import Any


def rollouts(results: Any) -> str:
    """A line per engine, weights and mode; nothing where it was not run.

    >>> row = {"engine": "jaxgen", "weights": "int4", "mode": "exact", "tokens": 1000, "different": 0, "largest": 0.0}
    >>> row |= {"sd": 0.0, "outside": 0.0, "generate_tokens_per_second": 50.4, "score_tokens_per_second": 1234.5}
    >>> _line(row)
    '| jaxgen, exact | int4 | 0 of 1,000 | 0 | 0 | 0% | 50 | 1,234 |'
    """
    if results is None:
        return ""
    header = (
        "| | weights | not the same bits | largest | sd | outside [0.9, 1.1] | generate, tokens/s | score, tokens/s |"
    )
    table = "\n".join([header, "|---|---|---:|---:|---:|---:|---:|---:|", *map(_line, results["rows"])])
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    machine = results["machine"]
    command = "taskset -c 0 python benchmarks/rollouts.py --json benchmarks/results/rollouts.json"
    engine = any(row["mode"] == "engine" for row in results["rows"])
    modes = "*engine* by an `Engine`, scored with its `strict`, *fast* without" if engine else "*fast* without"
    prose = (
        "What `generate` said of the tokens that it drew, against what scoring the same tokens says: differences in "
        f"nats, and the share of ratios outside [0.9, 1.1]. *exact* is with `strict=` in both, {modes}, and "
        "transformers on torch is measured the same way (`output_scores` against a forward pass). The demo model, 8 "
        "prompts with 8 samples of 48 tokens, temperature 1.5. Rates were taken while other work shared the machine: "
        "they are no comparison, and what exactness costs in time is unknown. The larger a device, the more "
        "it costs to read tokens one after the other, as exact scoring does. Nothing was measured on a GPU."
    )
    core = "core" if machine["cores"] == 1 else "cores"
    source = f"`{command}` ({results['date']}), {machine['cores']} {core}, {machine['cpu']}; {versions}.\n{{ .source }}"
    return f"{prose}\n\n{table}\n\n{source}\n"


def _line(row: dict[str, Any]) -> str:
    name = f"{row['engine']}, {row['mode']}" if row["mode"] else row["engine"]
    difference = (f"{row[kind]:.1e}" if row[kind] else "0" for kind in ("largest", "sd"))
    share = f"{row['outside']:.2%}" if row["outside"] else "0%"
    rates = (f"{row[kind]:,.0f}" for kind in ("generate_tokens_per_second", "score_tokens_per_second"))
    count = f"{row['different']:,} of {row['tokens']:,}"
    return "| " + " | ".join((name, row["weights"], count, *difference, share, *rates)) + " |"
