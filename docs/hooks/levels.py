"""The table of the promise: what was varied, at which level, how much was compared, and what differed."""

from typing import Any

Lines = list[dict[str, Any]]
NAMES = {
    "L0": "the draws: equal logits, equal tokens",
    "L1": "other rows, order or padding in the same compiled shape",
    "L2": "another compiled shape",
    "L3": "another run, process, compile cache, or 8 simulated devices",
    "L4": "another version of JAX",
    "strict": "as L1 and L2, with `strict=`",
}


def reproducibility(results: Any) -> str:
    """Sections from what `benchmarks/reproducibility.py` wrote; nothing where it was not run.

    >>> counts = {"rows": 8, "rows_other": 1, "logprobs": 96, "logprobs_same_bits": 95, "largest_difference": 2e-6}
    >>> one = {"level": "L1", "varied": "order", "engine": "jaxgen", "weights": "int4", "greedy": counts}
    >>> other = one | {"engine": "transformers"}
    >>> print(_levels([one, other]).splitlines()[-1])
    | L1 | order | int4 | 1 of 8 | 99.0% | 2.0e-06 | 1 of 8 |
    """
    if results is None:
        return ""
    parts = [_draws(results["draws"]), _heading(results["lines"]), _strict(results["strict_cost_tokens_per_second"])]
    base = ", ".join(f"{name} {version}" for name, version in results["versions"].get("base", {}).items())
    machine = results["machine"]
    command = "python benchmarks/reproducibility.py --json benchmarks/results/reproducibility.json"
    parts.append(
        f"`{command}` ({results['date']}), {machine['cores']} cores, {machine['cpu']}; {base}.\n{{ .source }}\n"
    )
    return "\n".join(parts)


def _table(header: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    lines = [header, ("---",) * len(header), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines) + "\n"


def _draws(draws: Lines) -> str:
    total, other = sum(line["draws"] for line in draws), sum(line["other"] for line in draws)
    rows = [("L0", line["varied"], f"{line['other']:,} of {line['draws']:,}") for line in draws]
    prose = f"Tokens drawn from given logits with the same key: {other:,} of {total:,} draws differ.\n"
    return f"## The draws\n\n{prose}\n{_table(('level', 'varied', 'other draws'), rows)}"


def _heading(lines: Lines) -> str:
    levels = "\n".join(f"- **{level}**: {text}" for level, text in NAMES.items())
    prose = (
        "Each line varies one thing. A row is one prompt with one seed, greedy or sampled; it counts as other if any "
        "of its tokens is. Log-probabilities are compared up to a row's first other token: how many are equal to the "
        "last bit, and the largest difference. The last column is transformers on torch with `set_seed` before each "
        "call, varied in the same way in the same run; it promises only that the same call repeats.\n"
    )
    return f"## What was varied\n\n{prose}\n{levels}\n\n{_levels(lines)}"


def _levels(lines: Lines) -> str:
    """A row per level, variation and kind of weights; transformers' figure beside jaxgen's."""
    found: dict[tuple[str, str, str], dict[str, Lines]] = {}
    for line in lines:
        key = (line["level"], line["varied"], line.get("weights", ""))
        found.setdefault(key, {}).setdefault(line.get("engine", "jaxgen"), []).append(line)
    header = ("level", "varied", "weights", "other rows", "same bits", "largest difference", "transformers: other rows")
    rows = []
    for (level, varied, weights), engines in sorted(found.items(), key=lambda item: _place(item[0][0])):
        ours, theirs = (_sums(engines.get(engine, [])) for engine in ("jaxgen", "transformers"))
        said = [line["pytest"] for line in engines.get("jaxgen", []) if "pytest" in line]
        bits = "" if ours is None else _share(ours["logprobs_same_bits"], ours["logprobs"])
        largest = "" if ours is None else f"{ours['largest_difference']:.1e}" if ours["largest_difference"] else "0"
        rows.append((level, varied, weights, said[0] if said else _other(ours), bits, largest, _other(theirs)))
    return _table(header, rows)


def _place(level: str) -> int:
    return list(NAMES).index(level) if level in NAMES else len(NAMES)


def _sums(lines: Lines) -> dict[str, Any] | None:
    """Greedy and sampled rows together."""
    counts = [value for line in lines for value in line.values() if isinstance(value, dict)]
    if not counts:
        return None
    names = ("rows", "rows_other", "logprobs", "logprobs_same_bits")
    sums = {name: sum(count[name] for count in counts) for name in names}
    return sums | {"largest_difference": max(count["largest_difference"] for count in counts)}


def _other(sums: dict[str, Any] | None) -> str:
    return "" if sums is None else f"{sums['rows_other']:,} of {sums['rows']:,}"


def _share(part: int, total: int) -> str:
    """Never rounded to all or nothing."""
    if part in (0, total):
        return "all" if part else "none"
    return f"{min(max(part / total, 0.001), 0.999):.1%}"


def _strict(costs: Lines) -> str:
    if not costs:
        return ""
    header = tuple(name for name in costs[0] if name != "batch")
    rows = [(cost["batch"], *(f"{cost[name]:,.0f}" for name in header)) for cost in costs]
    prose = "Tokens per second of the demo, by batch size.\n"
    return f"## What strict costs\n\n{prose}\n{_table(('batch', *header), rows)}"
