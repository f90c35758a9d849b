"""What a seed means, measured: `python benchmarks/reproducibility.py --json benchmarks/results/reproducibility.json`.

The demo model continues the same prompts, greedily and sampled, with one thing varied at a time. Every row (prompt and
seed) is compared with the same row of a base run: batches of 8, left-padded. A row counts as other if any of its tokens
is. Log-probabilities are compared up to a row's first other token: how many are equal to the last bit, and the largest
difference. transformers on torch, with `set_seed` before each call, is varied in the same ways in the same run; it
promises no more than that the same call repeats, in the same versions on the same machine, and asks for left padding.

    L0  equal logits, equal tokens: the draws alone, from given logits
    L1  other rows, order or padding in the same compiled shape
    L2  another compiled shape: sums may round differently
    L3  another run, process, compile cache, or 8 simulated devices that share the rows
    L4  another version: `--python PATH` (repeatable), an interpreter with jaxgen on another JAX; and the golden tokens
    strict  what L1 and L2 vary, with `strict=jaxgen.Strict(rows=8, tokens=64)`

All on CPU. Needs the extra `oracle`, for transformers; `--quick` takes float32 only, and fewer rows.
"""

import argparse
import datetime
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

HERE = Path(__file__).parent
JOBS, TORCH = HERE / "reproducibility_jobs.py", HERE / "reproducibility_torch.py"
WEIGHTS = ("float32", "bfloat16", "int4")
# The demo is sure of itself: at a higher temperature there is something to choose.
MODES: dict[str, Any] = {
    "greedy": {"do_sample": False},
    "sampled": {"do_sample": True, "temperature": 2.0, "top_k": 0},
}
STRICT = {"rows": 8, "tokens": 64}
MANY = 1000

Result = dict[str, np.ndarray]  # "<weights>/<mode>/<name>/<tokens or logprobs>"
Line = dict[str, Any]


def prompts_of(count: int) -> tuple[list[list[int]], list[list[int]]]:
    """Beginnings of documents that the demo was not trained on: 3 to 16 tokens, and two of 40."""
    from jaxgen import demo
    from jaxgen.demo.corpus import documents
    from jaxgen.text.tokenizer import load_tokenizer

    tokenizer, short, long = load_tokenizer(demo.path()), [], []
    for document in documents(3):
        ids = tokenizer(document.text, add_special_tokens=not document.text.startswith("<|"))["input_ids"]
        length = 3 + len(short) % 14
        if len(short) < count and len(ids) > length:
            short.append(ids[:length])
        elif len(long) < 2 and len(ids) > 40:
            long.append(ids[:40])
        if len(short) == count and len(long) == 2:
            return short, long
    raise RuntimeError("the corpus has no end")


def variations(count: int) -> dict[str, dict[str, Any]]:
    """name -> level, label, batches of prompt numbers, and how they run. `torch`: transformers can be varied so too."""
    rng = np.random.default_rng(0)

    def cut(order: list[int], size: int = 8) -> list[list[int]]:
        return [order[start : start + size] for start in range(0, count, size)]

    given = list(range(count))
    base = cut(given)
    turned = [rng.permutation(batch).tolist() for batch in base]
    mixed = cut(rng.permutation(given).tolist())
    # Sevens, the last of which begins earlier, so that all are in the bucket of 8.
    sevens = [given[min(start, count - 7) :][:7] for start in range(0, count, 7)]
    with_long = [[*batch, count] for batch in sevens]
    found = {
        "base": ("", "", base, {}, True),
        "order": ("L1", "order of the rows", turned, {}, True),
        "mates": ("L1", "batch mates", mixed, {}, True),
        "partly": ("L1", "batches of 7 (one idle row)", sevens, {}, True),
        "left": ("L1", "padding: 9 more on the left", base, {"extra": 9}, True),
        "right": ("L1", "padding: on the right", base, {"side": "right"}, False),
        "holes": ("L1", "padding: between the tokens", base, {"side": "holes", "extra": 20}, False),
        "stream 1": ("L1", "streaming, 1 token at a time", base, {"options": {"chunk_size": 1}}, False),
        "stream 7": ("L1", "streaming, 7 at a time", base, {"options": {"chunk_size": 7}}, False),
        "batch 1": ("L2", "batch size 1", cut(given, 1), {}, True),
        "batch 3": ("L2", "batch size 3", cut(given, 3), {}, True),
        "batch all": ("L2", f"batch size {count}", [given], {}, True),
        "long": ("L2", "one mate of 40 tokens", with_long, {}, True),
        "prefill": ("L2", "prefill_chunk_size=4", base, {"options": {"prefill_chunk_size": 4}}, False),
        "cache": ("L2", "max_cache_len=256", base, {"options": {"max_cache_len": 256}}, False),
        "again": ("L3", "the same again", base, {}, True),
    }
    table = {
        name: {"level": level, "label": label, "batches": batches, "torch": torch, **how}
        for name, (level, label, batches, how, torch) in found.items()
    }
    for name in ("base", "order", "mates", "partly", "left", "right", "batch 1", "batch 3", "long"):
        strict = dict(table[name], level="strict", torch=False, options={"strict": STRICT})
        table[f"strict {name}"] = strict
    return table


def run(script: Path, spec: dict[str, Any], directory: Path, python: str = sys.executable) -> tuple[Result, Any]:
    """Do a job in a process of its own: its arrays, and what it says of itself."""
    request, answer = directory / "spec.json", directory / "result.npz"
    request.write_text(json.dumps(spec), encoding="utf-8")
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
    command = [python, script, request, answer]
    done = subprocess.run(command, check=False, env=environment, capture_output=True, text=True)
    if done.returncode:
        name = f"{python} {script.name} ({spec['job']})"
        raise RuntimeError(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
    with np.load(answer) as archive:
        result = dict(archive)
    return result, json.loads(str(result.pop("about")))


def compare(one: Result, other: Result, key: str, other_key: str) -> dict[str, Any]:
    """Rows and tokens that differ; and log-probabilities, as long as the tokens before and the token are the same."""
    tokens, others = one[f"{key}/tokens"], other[f"{other_key}/tokens"]
    agree = np.logical_and.accumulate(tokens == others, axis=-1)
    mine, theirs = one[f"{key}/logprobs"][agree], other[f"{other_key}/logprobs"][agree]
    return {
        "rows": int(np.prod(tokens.shape[:-1])),
        "rows_other": int((~agree[..., -1]).sum()),
        "tokens": tokens.size,
        "tokens_other": int((tokens != others).sum()),
        "logprobs": mine.size,
        "logprobs_same_bits": int((mine.view(np.uint32) == theirs.view(np.uint32)).sum()),
        "largest_difference": float(np.abs(mine - theirs).max(initial=0.0)),
    }


def processor() -> str:
    """Whose processor it is."""
    text = Path("/proc/cpuinfo").read_text(encoding="utf-8") if Path("/proc/cpuinfo").exists() else ""
    names = [line.partition(":")[2].strip() for line in text.splitlines() if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


class Report:
    """The lines of the table, printed as they come."""

    def __init__(self) -> None:
        self.lines: list[Line] = []

    def add(self, level: str, varied: str, engine: str, weights: str, counts: dict[str, dict[str, Any]]) -> None:
        """A line: `counts` per mode, from `compare`."""
        line = {"level": level, "varied": varied, "engine": engine, "weights": weights, **counts}
        self.lines.append(line)
        cells = []
        for mode in ("greedy", "sampled"):
            count = counts.get(mode)
            cells.append(f"{count['rows_other']:5} of {count['rows']:<5}" if count else " " * 14)
        total, same = (sum(count[name] for count in counts.values()) for name in ("logprobs", "logprobs_same_bits"))
        largest = max(count["largest_difference"] for count in counts.values())
        bits = "all" if same == total else f"{same / total:.1%}"
        print(
            f"{level:6} {varied:35} {engine:12} {weights:8} {cells[0]} {cells[1]}  {bits:>6}  {largest:8.1e}",
            flush=True,
        )

    def add_modes(
        self, level: str, varied: str, engine: str, one: Result, base: Result, name: str, base_name: str = "base"
    ) -> None:
        """A line per kind of weights that both have."""
        for weights in WEIGHTS:
            counts = {
                mode: compare(one, base, f"{weights}/{mode}/{name}", f"{weights}/{mode}/{base_name}")
                for mode in MODES
                if f"{weights}/{mode}/{name}/tokens" in one and f"{weights}/{mode}/{base_name}/tokens" in base
            }
            if counts:
                self.add(level, varied, engine, weights, counts)


class Study:
    """All that is measured, in order."""

    def __init__(self, directory: Path, pythons: list[str], quick: bool, results: Path | None):
        self.directory, self.pythons, self.quick, self.results = directory, pythons, quick, results
        self.start = time.monotonic()
        short, long = prompts_of(8 if quick else 24)
        self.table = variations(len(short))
        self.spec = {
            "prompts": short, "long": long, "new_tokens": 24, "modes": MODES,
            "seeds": [0] if quick else [0, 2**32 - 1], "weights": WEIGHTS[:1] if quick else WEIGHTS,
        }  # fmt: skip
        self.report, self.versions = Report(), {}
        self.draws: list[Line] = []
        self.texts: Line = {}
        self.strict_cost: list[Line] = []

    def job(self, job: str, python: str = sys.executable, script: Path = JOBS, **more: Any) -> tuple[Result, Any]:
        return run(script, {**self.spec, "job": job, **more}, self.directory, python)

    def measure(self) -> None:
        self.only_base = {"base": self.table["base"]}
        self.noise()
        self.base, about = self.job("generate", variations=self.table)
        self.versions["base"] = about["versions"]
        for level in ("L1", "L2", "strict"):
            self.varied("jaxgen", self.base, level)
        for part in (self.transformers, self.runs, self.other_versions, self.seeds, self.cost):
            self.save()
            part()
        self.save()

    def save(self) -> None:
        """Write what is known by now: what was measured survives an error in what comes after."""
        if self.results is None:
            return
        report = {
            "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
            "machine": {"cpu": processor(), "cores": len(os.sched_getaffinity(0))},
            "versions": self.versions,
            "seconds": round(time.monotonic() - self.start),
            "draws": self.draws,
            "lines": self.report.lines,
            "vectorised": self.texts,
            "strict_cost_tokens_per_second": self.strict_cost,
        }
        self.results.write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")

    def varied(self, engine: str, result: Result, level: str) -> None:
        for name, variation in self.table.items():
            if variation["level"] == level and not name.endswith("base"):
                base = "strict base" if level == "strict" else "base"
                self.report.add_modes(level, variation["label"], engine, result, result, name, base)

    def noise(self) -> None:
        positions = 128 if self.quick else 2048
        one, _ = self.job("draws", draws="all", positions=positions)
        again, _ = self.job("draws", draws="base", positions=positions)
        eight, _ = self.job("draws", draws="eight", positions=positions)
        others = {
            "rows in another order": one["order"], "each row alone": one["alone"], "8 idle rows more": one["idle"],
            "positions in chunks of 128": one["chunks"], "64 positions at once": one["at_once"],
            "vocabulary padded by 64": one["wide"], "another process": again["base"], "8 devices": eight["eight"],
        }  # fmt: skip
        for python in self.pythons:
            result, about = self.job("draws", python, draws="base", positions=positions)
            others[f"jax {about['versions']['jax']}"] = result["base"]
        for varied, tokens in others.items():
            different = int((tokens != one["base"]).sum())
            self.draws.append({"varied": varied, "draws": tokens.size, "other": different})
            print(f"{'L0':6} {varied:35} {different} of {tokens.size:,} draws are other")
        total = sum(line["draws"] for line in self.draws)
        print(f"{'L0':6} {'all of them':35} {sum(line['other'] for line in self.draws)} of {total:,}")

    def runs(self) -> None:
        again = self.table["again"]
        self.report.add_modes("L3", again["label"], "jaxgen", self.base, self.base, "again")
        cache = str(self.directory / "cache")
        for label in ("another process, cold compile cache", "another process, warm compile cache"):
            result, about = self.job("generate", variations=self.only_base, cache=cache)
            if ("warm" in label) != bool(about["cache_hits"]):
                raise RuntimeError(f"{label}: {about['cache_hits']} executables came from the cache")
            self.report.add_modes("L3", label, "jaxgen", result, self.base, "base")
        mesh, _ = self.job("mesh")
        self.report.add_modes("L3", "8 devices, against one", "jaxgen", mesh, mesh, "eight", "one")
        self.report.add_modes("L3", "8 devices, against model.generate", "jaxgen", mesh, self.base, "eight")

    def other_versions(self) -> None:
        for python in self.pythons:
            result, about = self.job("generate", python, variations=self.only_base)
            version = about["versions"]["jax"]
            self.versions[f"jax {version}"] = about["versions"]
            label = f"jax {version}, Python {about['versions']['python']}"
            self.report.add_modes("L4", label, "jaxgen", result, self.base, "base")
        for python in [sys.executable, *self.pythons]:
            test = [python, "-m", "pytest", "-q", "-n", "0", "tests/test_golden.py"]
            done = subprocess.run(test, check=False, cwd=HERE.parent, capture_output=True, text=True)
            last = done.stdout.strip().splitlines()[-1] if done.stdout.strip() else done.stderr[-200:]
            version = subprocess.run(
                [python, "-c", "import jax; print(jax.__version__)"], capture_output=True, text=True, check=True
            ).stdout.strip()
            self.report.lines.append({"level": "L4", "varied": f"golden tokens, jax {version}", "pytest": last})
            print(f"{'L4':6} {f'golden tokens, jax {version}':35} {last}")

    def seeds(self) -> None:
        many = 500 if self.quick else MANY
        result, _ = self.job("seeds", many=many, alone=[417, *range(0, many, 100 if self.quick else 20)])
        self.texts = {"seeds": many, "different_texts": int(result["different"])}
        print(f"{'L2':6} {many} seeds of one prompt gave {self.texts['different_texts']} different texts")
        for level, name, label in (
            ("L2", "", f"{many} seeds, 4 batches: some alone"),
            ("strict", "strict ", "seeds, batches of 8: alone"),
        ):
            counts = compare(result, result, f"float32/sampled/{name}alone", f"float32/sampled/{name}together")
            self.report.add(level, label, "jaxgen", "float32", {"sampled": counts})

    def transformers(self) -> None:
        chosen = {name: variation for name, variation in self.table.items() if variation["torch"]}
        weights = [name for name in self.spec["weights"] if name != "int4"]
        base, about = self.job("generate", script=TORCH, variations=chosen, weights=weights)
        self.versions["base"] |= about["versions"]
        for level in ("L1", "L2", "L3"):
            for name, variation in chosen.items():
                if variation["level"] == level:
                    self.report.add_modes(level, variation["label"], "transformers", base, base, name)
        other, _ = self.job("generate", script=TORCH, variations=self.only_base, weights=weights)
        self.report.add_modes("L3", "another process", "transformers", other, base, "base")

    def cost(self) -> None:
        batches = [1, 8, 32]
        result, _ = self.job("cost", batches=batches, repeats=1 if self.quick else 5)
        print("tokens per second: batch, default, Strict(rows=max(8, batch)), the same with tokens=96")
        for batch, rates in zip(batches, result["tokens_per_second"].tolist(), strict=True):
            names = ("default", "strict", "strict, tokens=96")
            self.strict_cost.append({"batch": batch, **dict(zip(names, rates, strict=True))})
            print(f"{batch:6} {rates[0]:9.0f} {rates[1]:9.0f} {rates[2]:9.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--python", action="append", default=[], help="an interpreter with jaxgen on another JAX")
    parser.add_argument("--quick", action="store_true", help="float32 only, fewer rows: under a minute")
    options = parser.parse_args()
    print(f"{'level':6} {'varied':35} {'engine':12} {'weights':8} {'greedy: other':14} {'sampled: other':14}  "
          "same bits  largest difference")  # fmt: skip
    with tempfile.TemporaryDirectory() as directory:
        study = Study(Path(directory), options.python, options.quick, options.json)
        study.measure()
    seconds = time.monotonic() - study.start
    rows = [count for line in study.report.lines for count in line.values() if isinstance(count, dict)]
    print(f"{sum(count['rows'] for count in rows):,} rows compared in {seconds:.0f} s")


if __name__ == "__main__":
    main()
