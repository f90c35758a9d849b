"""What `benchmarks/families.py` and `benchmarks/engine.py` found, as tables."""

from typing import Any

XEON = "2 cores of an Intel Xeon"


def families(results: Any) -> str:
    """A line per family; nothing where it was not run.

    >>> rows = [{"family": "llama", "jaxgen": 56.1, "transformers": 46.4}]
    >>> results = {"machine": {"jax": "1.2"}, "prompt": 32, "new_tokens": 64, "rows": rows}
    >>> families(results).splitlines()[6]
    '| `llama` | 56 | 46 | 1.21 |'
    """
    if results is None:
        return ""
    lines = [
        f"| `{row['family']}` | {row['jaxgen']:.0f} | {row['transformers']:.0f} "
        f"| {row['jaxgen'] / row['transformers']:.2f} |"
        for row in results["rows"]
    ]
    prose = (
        f"Tokens per second of one row, {results['new_tokens']} after a prompt of {results['prompt']}, greedy, in "
        "float32, for random weights in a shape of about 125M parameters (more with experts)."
    )
    table = "\n".join(["| `model_type` | jaxgen | transformers | ratio |", "|---|---:|---:|---:|", *lines])
    command = "python benchmarks/families.py --json benchmarks/results/families.json"
    return f"## Families\n\n{prose}\n\n{table}\n\n{_source(command, results['machine'])}"


def engine(results: Any) -> str:
    """The engine against static batches; nothing where it was not run.

    >>> engine(None)
    ''
    """
    if results is None:
        return ""
    figures = results["figures"]
    ours = figures["engine"]
    rates = {"engine": ours["tokens_per_second"], **{k: v for k, v in figures.items() if k != "engine"}}
    lines = [f"| {name} | {rate:.0f} |" for name, rate in rates.items() if not isinstance(rate, str)]
    prose = (
        "A ragged load of greedy requests, float32, in a shape of 125M parameters, 16 rows: prompts of 8 to 96 tokens, "
        "new tokens of each request from a geometric distribution of mean 48, at most 256. Static batches decode until "
        "their longest row has ended. Tokens per second that were asked for. transformers' `generate_batch` has one "
        f"length for all requests. {ours['busy_rows']:.0%} of the rows in the engine's steps got a token, and requests "
        f"filled {ours['slots_used']:.0%} of the slots reserved for them; half of them had their first token within "
        f"{ours['first_token_s_p50']:.1f} s of being submitted, all at once. Where every row is busy to the end, the "
        f"engine, with all processors that nobody uses, gives {results['full']['engine']:.0f} tokens/s, and `generate` "
        f"in its shape (`strict`) {results['full']['strict generate']:.0f}."
    )
    table = "\n".join(["| | tokens/s |", "|---|---:|", *lines])
    command = "python benchmarks/engine.py --json benchmarks/results/engine.json"
    return f"## Continuous batching\n\n{prose}\n\n{table}\n\n{_source(command, results['machine'])}"


def batch(results: Any) -> str:
    """Rows per second of offline batches, a line per model and way; nothing where it was not run.

    >>> batch(None)
    ''
    >>> run = {"rows_per_second": 9.4, "first_run": {"seconds": 12.3, "compilations": 4}}
    >>> way = {**run, "prompt_padding": 0.25, "idle_steps": 0.5}
    >>> results = {"machine": {"jax": "1.2"}, "batch_size": 16, "models": {"demo": {"rows": 20, "a loop": way}}}
    >>> batch(results).splitlines()[6]
    '| demo, 20 rows | a loop | 9.4 | 25% | 50% | 4 | 12 s |'
    """
    if results is None:
        return ""
    lines = [
        f"| {name}, {found['rows']:,} rows | {way} | {one['rows_per_second']:.1f} | {one['prompt_padding']:.0%} "
        f"| {one['idle_steps']:.0%} | {one['first_run']['compilations']} | {one['first_run']['seconds']:.0f} s |"
        for name, found in results["models"].items()
        for way, one in found.items()
        if way != "rows"
    ]
    prose = (
        f"Ragged rows, {results['batch_size']} at a time, greedy, float32: prompts of 4 to 96 tokens, new tokens of "
        "each row from a geometric distribution of mean 16, at most 64. A loop takes the rows as they come and decodes "
        "until the longest of a batch has ended. Rows per second are those of a second run; what the first one "
        "compiled, and how long it took; the share of the prompt positions read that are padding, and of the decode "
        "steps of rows whose token nobody asked for."
    )
    head = ["| | | rows/s | padding | idle steps | compiled | first run |", "|---|---|---:|---:|---:|---:|---:|"]
    command = "python benchmarks/batch.py --rows-125m 0 --json benchmarks/results/batch.json"
    said = _source(command, results["machine"]).replace(XEON, f"{XEON}, a busy machine")
    return f"## Offline batches\n\n{prose}\n\n" + "\n".join([*head, *lines]) + f"\n\n{said}"


def _source(command: str, machine: dict[str, Any]) -> str:
    known = ("jax", "torch", "transformers")
    versions = ", ".join(f"{name} {machine[name]}" for name in known if name in machine)
    return f"`{command}` on {XEON}; {versions}.\n{{ .source }}\n"
