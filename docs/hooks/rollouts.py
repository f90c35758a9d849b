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
    known = {row["mode"] for row in results["rows"]}
    modes = "*fast* without"
    if "engine" in known:
        modes = f"*engine* by an `Engine`, scored with its `strict`, {modes}"
    if "ragged engine" in known:
        modes += ", *ragged* with rows of 1 to 160 tokens"
    prose = (
        "What `generate` said of the tokens that it drew, against what scoring the same tokens says: differences in "
        f"nats, and the share of ratios outside [0.9, 1.1]. *exact* is with `strict=` in both, {modes}, and "
        "transformers on torch is measured the same way (`output_scores` against a forward pass). The demo model, 8 "
        "prompts with 8 samples of 48 tokens, temperature 1.5. Rates are those of the fastest of 5 calls, for which "
        "all took turns; the machine's other core did other work. The larger a device, the more it costs to read "
        "tokens one after the other, as exact scoring does. Nothing was measured on a GPU."
    )
    return f"{prose}\n\n{table}\n\n{_source(results)}\n"


def ragged(results: Any) -> str:
    """What rows of many lengths take, in an engine and batch after batch; nothing where it was not run.

    >>> row = {"weights": "int4", "mode": "ragged batch", "generate_tokens_per_second": 1000.0}
    >>> other = {**row, "mode": "ragged engine", "generate_tokens_per_second": 2500.4}
    >>> _pair("int4", row, other)
    '| int4 | 1,000 | 2,500 | 2.5 |'
    """
    found = {(row["mode"], row["weights"]): row for row in (results or {"rows": []})["rows"]}
    kinds = [weights for mode, weights in found if mode == "ragged engine"]
    if not kinds:
        return ""
    header = "| weights | batch after batch, tokens/s | engine, tokens/s | ratio |\n|---|---:|---:|---:|"
    pairs = [_pair(each, found["ragged batch", each], found["ragged engine", each]) for each in kinds]
    prose = (
        "Rollouts whose rows end after 1 to 160 tokens (a geometric distribution of mean 40): 8 prompts with 8 "
        "samples, 16 rows at a time. An `Engine` gives the place of a row that has ended to the next; `generate` runs "
        "each batch until its longest row has ended. Only tokens that were asked for count; they took turns in one run."
    )
    return "\n".join([prose, "", header, *pairs, "", _source(results), ""])


def _pair(weights: str, batch: dict[str, Any], engine: dict[str, Any]) -> str:
    before, after = (row["generate_tokens_per_second"] for row in (batch, engine))
    return f"| {weights} | {before:,.0f} | {after:,.0f} | {after / before:.1f} |"


def _source(results: Any) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    machine = results["machine"]
    command = "taskset -c 0 python benchmarks/rollouts.py --json benchmarks/results/rollouts.json"
    core = "core" if machine["cores"] == 1 else "cores"
    return f"`{command}` ({results['date']}), {machine['cores']} {core}, {machine['cpu']}; {versions}.\n{{ .source }}"


def _line(row: dict[str, Any]) -> str:
    name = f"{row['engine']}, {row['mode']}" if row["mode"] else row["engine"]
    difference = (f"{row[kind]:.1e}" if row[kind] else "0" for kind in ("largest", "sd"))
    share = f"{row['outside']:.2%}" if row["outside"] else "0%"
    rates = (f"{row[kind]:,.0f}" for kind in ("generate_tokens_per_second", "score_tokens_per_second"))
    count = f"{row['different']:,} of {row['tokens']:,}"
    return "| " + " | ".join((name, row["weights"], count, *difference, share, *rates)) + " |"
