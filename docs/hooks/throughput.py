"""What `benchmarks/families.py`, `engine.py` and `serve.py` found, as tables."""

from typing import Any


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
    """The engine and the servers against static batches; nothing where it was not run.

    >>> figure = {"tokens_per_second": 81.4, "same": 0.996}
    >>> ours = {**figure, "busy_rows": 0.75, "first_token_s_p50": 23.5, "slots_used": 0.27, "slots_held": 0.2}
    >>> figures = {"engine": ours, "static batches": figure, "another server": "ImportError: it needs more"}
    >>> results = {"machine": {}, "requests": 128, "rows": 16, "slots": 384, "figures": figures,
    ...            "full": {"engine": 199.2, "strict generate": 227.4}}
    >>> said = engine(results).splitlines()
    >>> said[7:9], "slots: 27% were filled" in said[2]
    (['| static batches | 81 | 99.6% |', '| another server | ImportError: it needs more | |'], True)
    """
    if results is None:
        return ""
    figures, ours = results["figures"], results["figures"]["engine"]
    lines = [
        f"| {name} | {said} | |"
        if isinstance(said, str)
        else f"| {name} | {said['tokens_per_second']:.0f} | {format(said['same'], '.1%') if 'same' in said else ''} |"
        for name, said in figures.items()
    ]
    prose = (
        f"{results['requests']} greedy requests of a ragged load, float32, one checkpoint of random weights in a shape "
        f"of 125M parameters, {results['rows']} rows: prompts of 8 to 96 tokens, new tokens of each request from a "
        "geometric distribution of mean 48, at most 256. Static batches decode until their longest row has ended. "
        "Tokens per second that were asked for; transformers' `generate_batch` has one length for all requests, and "
        "takes as many rows at a time as its cache has pages for: more than the others. The servers get texts over "
        f"HTTP, {2 * results['rows']} at a time, and transformers' has pages for all of them. *Same* are the requests "
        f"whose tokens are those of `generate`. {ours['busy_rows']:.0%} of the rows in the engine's steps got a token; "
        f"half of the requests had their first token within {ours['first_token_s_p50']:.1f} s of being submitted, all "
        f"at once. A row of the engine has {results['slots']} slots: {ours['slots_used']:.0%} were filled where a "
        f"request ended, and over all steps {ours['slots_held']:.0%} held a token. Where every row is busy to the end, "
        f"the engine, with all processors that nobody uses, gives {results['full']['engine']:.0f} tokens/s, and "
        f"`generate` in its shape (`strict`) {results['full']['strict generate']:.0f}."
    )
    table = "\n".join(["| | tokens/s | same |", "|---|---:|---:|", *lines])
    command = "python benchmarks/engine.py --json benchmarks/results/engine.json"
    return f"## Continuous batching\n\n{prose}\n\n{table}\n\n{_source(command, results['machine'])}"


def steps(results: Any) -> str:
    """What an engine's step costs with what nobody asks for; nothing where it was not run.

    >>> found = {"nothing": {"median": 145.4, "least": 121.6, "most": 220.8}}
    >>> steps({"machine": {}, "step_ms": found}).splitlines()[4]
    '| nothing | 145 | 122 to 221 |'
    """
    if results is None:
        return ""
    lines = [
        f"| {name} | {found['median']:.0f} | {found['least']:.0f} to {found['most']:.0f} |"
        for name, found in results["step_ms"].items()
    ]
    prose = (
        "Milliseconds of a decode step of 16 rows on one core, with what an engine has, in the same shape. The engines "
        "take turns, so that what else the machine does falls on all; it did other work."
    )
    table = "\n".join(["| an engine with | median | least to most |", "|---|---:|---:|", *lines])
    command = "taskset -c 0 python benchmarks/engine.py --steps --json benchmarks/results/engine_steps.json"
    return f"{prose}\n\n{table}\n\n{_source(command, results['machine'], '1 core of an Intel Xeon')}"


def batch(results: Any) -> str:
    """Rows per second of offline batches, a line per model and way; nothing where it was not run.

    >>> batch(None)
    ''
    >>> run = {"rows_per_second": 9.4, "rows_per_second_with_compilations": 5.1, "compile_seconds": 12.3}
    >>> way = {**run, "compilations": 4, "prompt_padding": 0.25, "idle_steps": 0.5}
    >>> results = {"machine": {"jax": "1.2"}, "batch_size": 16, "models": {"demo": {"rows": 20, "a loop": way}}}
    >>> batch(results).splitlines()[6]
    '| demo, 20 rows | a loop | 9.4 | 5.1 | 25% | 50% | 4 | 12 s |'
    """
    if results is None:
        return ""
    lines = [
        f"| {name}, {found['rows']:,} rows | {way} | {one['rows_per_second']:.1f} "
        f"| {one['rows_per_second_with_compilations']:.1f} | {one['prompt_padding']:.0%} | {one['idle_steps']:.0%} "
        f"| {one['compilations']} | {one['compile_seconds']:.0f} s |"
        for name, found in results["models"].items()
        for way, one in found.items()
        if way != "rows"
    ]
    prose = (
        f"Ragged rows, {results['batch_size']} at a time, greedy, float32: prompts of 4 to 96 tokens, new tokens of "
        "each row from a geometric distribution of mean 16, at most 64. A loop takes the rows as they come and decodes "
        "until the longest of a batch has ended. Rows per second of one run without the time in which something was "
        "compiled, and with it; the share of the prompt positions read that are padding, and of the decode steps of "
        "rows whose token nobody asked for; what was compiled, and how long that took."
    )
    names = ("rows/s", "and compiling", "padding", "idle steps", "compiled", "in")
    head = [f"| | | {' | '.join(names)} |", "|---|---|" + "---:|" * len(names)]
    said = _source("python benchmarks/batch.py --json benchmarks/results/batch.json", results["machine"])
    return f"## Offline batches\n\n{prose}\n\n" + "\n".join([*head, *lines]) + f"\n\n{said}"


def serve(results: Any) -> str:
    """A line per model that was served; nothing where it was not run.

    >>> times = {"first_token_s": {"p50": 0.61, "p95": 1.2}, "per_token_s": {"p50": 0.021, "p95": 0.3}}
    >>> memory = {"ready": 600.4, "first_half": 650.0, "second_half": 650.4, "end": 650.4}
    >>> asked = {"requests": 1000, "at_a_time": 32, "lost": 0, "wrong": 1, "tokens_per_second": 98.7}
    >>> results = {"machine": {}, "models": {"demo": {**asked, **times, "memory_mb": memory}}}
    >>> serve(results).splitlines()[6]
    '| demo | 1,000 | 0 | 1 | 99 | 0.6, 1.2 | 21, 300 | 650, 650 |'
    """
    if results is None:
        return ""
    lines = []
    for name, found in results["models"].items():
        first, token, memory = found["first_token_s"], found["per_token_s"], found["memory_mb"]
        lines.append(
            f"| {name} | {found['requests']:,} | {found['lost']} | {found['wrong']} | {found['tokens_per_second']:.0f} "
            f"| {first['p50']:.1f}, {first['p95']:.1f} | {1000 * token['p50']:.0f}, {1000 * token['p95']:.0f} "
            f"| {memory['first_half']:.0f}, {memory['second_half']:.0f} |"
        )
    together = max(found["at_a_time"] for found in results["models"].values())
    prose = (
        f"`jaxgen serve` in float32 with 32 rows, and {together} clients, each with one streamed request after the "
        "other: prompts of 4 to 63 tokens, at most 12 new ones on average, greedy, sampled and penalised. An answer is "
        "*lost* that is not whole, and *wrong* if its text, length or end is not that of `generate(strict=)` with the "
        "same seed, or a log-probability is off by more than 1e-5. Times: the median, and what 95% stay below. Memory "
        "is the most that the server had in the first half of the requests, and in the second. Clients and server "
        "share the machine."
    )
    header = "| | requests | lost | wrong | tokens/s | first token, s | per token, ms | memory, MB |"
    table = "\n".join([header, "|---|" + "---:|" * 7, *lines])
    command = "python benchmarks/serve.py --json benchmarks/results/serve.json"
    return f"## Serving\n\n{prose}\n\n{table}\n\n{_source(command, results['machine'])}"


def _source(command: str, machine: dict[str, Any], on: str = "2 cores of an Intel Xeon") -> str:
    known = ("jax", "torch", "transformers", "starlette", "uvicorn")
    versions = ", ".join(f"{name} {machine[name]}" for name in known if name in machine)
    return f"`{command}` on {on}; {versions}.\n{{ .source }}\n"
