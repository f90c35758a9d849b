"""Load on a live `jaxgen serve`: is any answer lost or wrong, does memory grow, how long do tokens take?

    python benchmarks/serve.py [--models demo 125M] [--requests 1000] [--at-a-time 32] [--json FILE]

Needs the extra `test`. A server in a process of its own, float32, 32 rows of 128 slots; the demo, or random weights of
the 125M shape with a tokenizer that has a word for each id. Each client asks for one streamed completion after the
other: prompts of 4 to 63 ids, each asked twice, new tokens from a geometric distribution (mean 12, at most 64); greedy
and without an end, sampled, or filtered and penalised with log-probabilities; each with a seed of its own.

An answer is lost that is not whole: another status than 200, an error among the events, no end, or more than 5 minutes.
When all are there and the server is gone, `generate(strict=)` is asked for the same in batches of one shape, and an
answer is wrong whose text, number of tokens or reason to end differs, or a log-probability by more than 1e-5. Memory is
what the server has resident, looked at after each answer; it remembers 2,000 tokens of answers, which it has before
the middle. "Per token" is the time from the first tokens of an answer to the last, by the tokens between; they come a
few at a time. A model that was measured before stays in FILE.
"""

import argparse
import asyncio
import dataclasses
import json
import os
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx2 as httpx
import jax
import numpy as np
from servers import jaxgen_serve, random_checkpoint, running
from shapes import SHAPE_125M

import jaxgen
from jaxgen import demo
from jaxgen.text.tokenizer import continuation, load_tokenizer

ROWS, SLOTS, RECORDS, SECONDS = 32, 128, 2_000, 300.0
# What a client sends, and what `generate` calls it.
KINDS: tuple[tuple[dict[str, Any], dict[str, Any]], ...] = (
    ({"temperature": 0, "ignore_eos": True}, {"do_sample": False, "eos_token_id": None}),
    ({"temperature": 1.2}, {"do_sample": True, "temperature": 1.2, "top_k": 0}),
    (
        {"temperature": 0.8, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1, "logprobs": 1},
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 20, "repetition_penalty": 1.1},
    ),
)


@dataclasses.dataclass
class Ask:
    """A request, and what came of it."""

    kind: int
    ids: list[int]
    new: int
    seed: int
    text: str = ""
    logprobs: list[float] = dataclasses.field(default_factory=list)
    count: int = 0
    reason: str | None = None
    whole: bool = False
    error: str | None = None
    sent: float = 0.0
    first: float = 0.0  # when its first tokens came, how many, and when the last came
    first_count: int = 0
    last: float = 0.0


def asks(number: int, vocab_size: int) -> list[Ask]:
    """What is asked for, in this order."""
    rng = np.random.default_rng(0)
    news = np.minimum(rng.geometric(1 / 12, number), 64)
    lengths, kinds = rng.integers(4, 64, number), rng.integers(0, len(KINDS), number)
    prompts = [rng.integers(3, vocab_size, length).tolist() for length in lengths[::2]]
    return [
        Ask(int(kind), prompts[seed // 2], int(new), seed)
        for seed, (kind, new) in enumerate(zip(kinds, news, strict=True))
    ]


def resident(process: int) -> float:
    """What a process has in memory, in MB."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="ascii").splitlines()
    [line] = [line for line in lines if line.startswith("VmRSS:")]
    return int(line.split()[1]) * 1024 / 1e6


async def load(url: str, process: int, asked: Sequence[Ask], at_a_time: int) -> list[float]:
    """Carry out all requests; what the server had in memory after each."""
    memory: list[float] = []
    left = iter(asked)
    async with httpx.AsyncClient(base_url=url, timeout=SECONDS) as client:

        async def one_client() -> None:
            for ask in left:
                try:
                    async with asyncio.timeout(SECONDS):
                        await complete(client, ask)
                except Exception as error:
                    ask.error = f"{type(error).__name__}: {error}"
                memory.append(resident(process))

        await asyncio.gather(*(one_client() for _ in range(at_a_time)))
    return memory


async def complete(client: httpx.AsyncClient, ask: Ask) -> None:
    """Send a request, and note what comes."""
    body = {**KINDS[ask.kind][0], "prompt": ask.ids, "max_tokens": ask.new, "seed": ask.seed, "stream": True}
    body["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
    ask.sent = time.perf_counter()
    async with client.stream("POST", "/v1/completions", json=body) as answer:
        if answer.status_code != 200:
            ask.error = f"{answer.status_code}: {(await answer.aread()).decode()[:200]}"
            return
        async for line in answer.aiter_lines():
            if line == "data: [DONE]":
                ask.whole = ask.error is None and ask.reason is not None
            elif line:
                note(ask, json.loads(line.removeprefix("data: ")))


def note(ask: Ask, event: dict[str, Any]) -> None:
    """Take an event into what came."""
    if "error" in event:
        ask.error = str(event["error"])
        return
    if (count := event["usage"]["completion_tokens"]) > ask.count:
        ask.last, ask.count = time.perf_counter(), count
        if not ask.first:
            ask.first, ask.first_count = ask.last, count
    for choice in event["choices"]:
        ask.text += choice["text"]
        ask.reason = choice["finish_reason"] or ask.reason
        if choice["logprobs"]:
            ask.logprobs += choice["logprobs"]["token_logprobs"]


def wrong(model: Any, tokenizer: Any, asked: Sequence[Ask]) -> list[str]:
    """What is otherwise than `generate` gives it, of answers that are whole."""
    found: list[str] = []
    strict = jaxgen.Strict(rows=ROWS, tokens=SLOTS)
    for kind, (_, options) in enumerate(KINDS):
        same = sorted((ask for ask in asked if ask.kind == kind and ask.whole), key=lambda ask: ask.new)
        for start in range(0, len(same), ROWS):
            part = same[start : start + ROWS]
            width = max(len(ask.ids) for ask in part)
            out = model.generate(
                np.array([[0] * (width - len(ask.ids)) + ask.ids for ask in part]),
                np.array([[0] * (width - len(ask.ids)) + [1] * len(ask.ids) for ask in part]),
                strict=strict,
                row_ids=[0] * len(part),
                max_new_tokens=part[-1].new,
                return_dict_in_generate=True,
                **(options | ({"seed": [ask.seed for ask in part]} if options["do_sample"] else {})),
            )
            for row, ask in enumerate(part):
                count = min(int(out.lengths[row]), ask.new)
                tokens = out.sequences[row, width : width + count].tolist()
                reason = "stop" if out.finish_reason[row] == "eos" and len(tokens) == out.lengths[row] else "length"
                text = continuation(tokenizer, ask.ids, tokens, skip_special_tokens=True)
                own = out.model_logprobs[row, :count]
                near = not ask.logprobs or (len(ask.logprobs) == count and np.abs(own - ask.logprobs).max() <= 1e-5)
                if (text, count, reason) != (ask.text, ask.count, ask.reason) or not near:
                    found.append(f"seed {ask.seed}: {ask.text[:60]!r} {ask.reason}, and not {text[:60]!r} {reason}")
    return found


def measure(directory: Path, number: int, at_a_time: int) -> dict[str, Any]:
    """All figures of one model."""
    model = jaxgen.AutoModelForCausalLM.from_pretrained(directory, dtype="float32")
    asked = asks(number, model.config.vocab_size)
    sizes = {"rows": ROWS, "slots": SLOTS, "records": RECORDS, "top_logprobs": 1}
    with running(jaxgen_serve(directory, **sizes), "/ready") as (url, process):
        ready, start = resident(process), time.perf_counter()
        memory = asyncio.run(load(url, process, asked, at_a_time))
        seconds = time.perf_counter() - start
    lost = [ask for ask in asked if not ask.whole]
    differing = wrong(model, load_tokenizer(directory), asked)
    for said in [*(f"lost: {ask.error}" for ask in lost), *differing][:10]:
        sys.stderr.write(said + "\n")
    return {
        "requests": number,
        "at_a_time": at_a_time,
        "lost": len(lost),
        "wrong": len(differing),
        "compared_logprobs": sum(len(ask.logprobs) for ask in asked if ask.whole),
        "tokens": sum(ask.count for ask in asked),
        "seconds": seconds,
        "tokens_per_second": sum(ask.count for ask in asked) / seconds,
        "first_token_s": percentiles([ask.first - ask.sent for ask in asked if ask.whole]),
        "per_token_s": percentiles(
            [(ask.last - ask.first) / (ask.count - ask.first_count) for ask in asked if ask.count > ask.first_count]
        ),
        "memory_mb": {
            "ready": ready,
            "first_half": max(memory[: number // 2]),
            "second_half": max(memory[number // 2 :]),
            "end": memory[-1],
        },
    }


def percentiles(values: Sequence[float]) -> dict[str, float]:
    """The median, and what 19 of 20 stay below."""
    twentieths = statistics.quantiles(values, n=20, method="inclusive")
    return {"p50": twentieths[9], "p95": twentieths[18]}


def main() -> None:
    """Print and keep the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=("demo", "125M"), default=["demo", "125M"])
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--at-a-time", type=int, default=32)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count()}
    machine |= {"jax": jax.__version__, "starlette": version("starlette"), "uvicorn": version("uvicorn")}
    known = json.loads(options.json.read_text(encoding="utf-8")) if options.json and options.json.exists() else {}
    kept = known.get("models", {})
    for name in options.models:
        with tempfile.TemporaryDirectory() as directory:
            place = demo.path() if name == "demo" else random_checkpoint(Path(directory), SHAPE_125M)
            kept[name] = measure(place, options.requests, options.at_a_time)
        print(json.dumps({name: kept[name]}, indent=1))
        if options.json:
            text = json.dumps({"machine": machine, "models": kept}, indent=1) + "\n"
            options.json.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
