"""What jaxgen promises of its tokens, tried on this device; and the token loop as one CUDA graph. Parts of `gpu.py`."""

import json
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxgen import AutoModelForCausalLM, GenerationConfig, MistralConfig, Strict, demo
from jaxgen.generation.execute import Program, advance, prefill, program_for
from jaxgen.generation.options.config import resolve
from jaxgen.generation.prepare import Request, prepare
from jaxgen.generation.programs import stages
from jaxgen.generation.programs.stages import Stage
from jaxgen.generation.programs.structure import split
from jaxgen.lowering import Target, tracing_for
from jaxgen.models.layers import QuantizedWeight
from jaxgen.quant.adapted import Adapted
from tests.reference.golden import GOLDEN, RUNS, generate, load, new_tokens

# XLA's default kinds of commands and WHILE; the loop stands alone in its graph, where XLA wants five thunks.
ONE_GRAPH = {
    "xla_gpu_enable_command_buffer": "FUSION,CUBLAS,CUBLASLT,CUSTOM_CALL,CUDNN,DYNAMIC_SLICE_FUSION,WHILE",
    "xla_gpu_graph_min_graph_size": 1,
}
FROM_CPU = ("greedy", "seed 1", "int4", "prompt lookup")  # of the runs in tests/reference/golden.json


def golden(report: Any, tiny: bool) -> None:
    """The demo's tokens in float32 and int4 against those recorded on a CPU."""
    committed = json.loads(GOLDEN.read_text())
    models: dict[str, Any] = {form: load(form) for form in ("float32", "int4")}
    for name in FROM_CPU[:2] if tiny else FROM_CPU:

        def compare(name: str = name) -> dict[str, Any]:
            rows = new_tokens(generate(models.__getitem__, committed["prompts"], RUNS[name]))
            return {"same": rows == committed["runs"][name]["rows"]}

        report.attempt("promises", {"what": f"demo, {name}: as on a CPU"}, 5, compare)


def in_16_bits(report: Any) -> None:
    """The demo where kernels apply: bfloat16, and int4 beside it; greedy, with drafts, and as XLA's form would be."""
    prompts = json.loads(GOLDEN.read_text())["prompts"]
    greedy = json.loads(GOLDEN.read_text())["runs"]["greedy"]["rows"]
    options: dict[str, Any] = {"do_sample": False}
    for int4 in (False, True):
        model = AutoModelForCausalLM.from_pretrained(demo.path(), dtype="bfloat16", load_in_4bit=int4)

        def run(model: Any = model, int4: bool = int4, **more: Any) -> dict[str, Any]:
            plain = new_tokens(generate(lambda _: model, prompts, options))
            drafted = new_tokens(generate(lambda _: model, prompts, options | {"prompt_lookup_num_tokens": 4}))
            return {
                "kernels": model.decodes_with_kernels,
                "refused": [stage._refused for stage in _kernel_stages()],
                "rows_with_drafts_as_without": sum(a == b for a, b in zip(drafted, plain, strict=True)),
                **({} if int4 else {"rows_as_in_float32": sum(a == b for a, b in zip(plain, greedy, strict=True))}),
                "of": len(plain),
            }

        report.attempt("promises", {"what": f"demo, {'int4' if int4 else 'bfloat16'}: greedy and drafts"}, 5, run)


def _kernel_stages() -> list[Stage]:
    return [stages._kernels_on_gpu, stages._kernels_int4_on_gpu, stages._strict_kernels_on_gpu]


def config(tiny: bool) -> MistralConfig:
    """A small model of the shapes that kernels are for."""
    return MistralConfig(
        vocab_size=4096, hidden_size=256 if tiny else 1024, intermediate_size=512 if tiny else 3584,
        num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=2, head_dim=32 if tiny else 128,
        sliding_window=None,
    )  # fmt: skip


def strict(report: Any, tiny: bool, model: Any, kind: str) -> None:
    """A row alone, in a crowd, and in another place of it: to the last bit."""

    def run() -> dict[str, Any]:
        rng = np.random.default_rng(0)
        ids, more = (rng.integers(0, 4096, (8, 24)) for _ in range(2))
        options: dict[str, Any] = {
            "max_new_tokens": 8 if tiny else 40, "do_sample": True, "seed": 3, "eos_token_id": None,
            "return_dict_in_generate": True, "strict": Strict(rows=8, tokens=64),
        }  # fmt: skip
        names = [f"row {i}" for i in range(8)]
        crowd = model.generate(ids, row_ids=names, **options)
        alone = model.generate(ids[3:4], row_ids=names[3:4], **options)
        more[0] = ids[3]
        moved = model.generate(more, row_ids=[names[3], *(f"other {i}" for i in range(7))], **options)
        wanted = crowd.logprobs[3]
        return {
            "alone": bool((alone.logprobs[0] == wanted).all()),
            "moved": bool((moved.logprobs[0] == wanted).all()),
            "refused": stages._strict_kernels_on_gpu._refused,
        }

    report.attempt("promises", {"what": f"strict, {kind}: to the last bit"}, 5, run)


def steps(report: Any, model: Any, kind: str, shapes: tuple[tuple[int, int], ...]) -> None:
    """Logits of kernels against those of XLA's form: a step of some rows, and a few tokens of some rows."""

    def compiled_for(target: Target) -> Any:
        structure, weights = split(model)

        def both(weights: Any, tokens: Any, starts: Any, counts: Any, cache: Any) -> Any:
            with tracing_for(target):
                module = structure.module(weights)
                if tokens.shape[1] == 1:
                    return module.step(tokens[:, 0], starts, cache)[0]
                hidden, after = module.extend(tokens, starts, counts, cache)
                return module.logits(hidden), [layer.keys for layer in after]

        return lambda *args: jax.jit(both)(weights, *args)

    def run(rows: int, new: int) -> dict[str, Any]:
        rng = np.random.default_rng(0)
        tokens = jnp.asarray(rng.integers(0, 4096, (rows, 40)), jnp.int32)
        starts = jnp.asarray(rng.integers(20, 40, rows), jnp.int32)
        counts = jnp.asarray(rng.integers(1, new + 1, rows), jnp.int32)
        _, cache = jax.jit(lambda t, n: model.prefill(t, n, 96))(tokens, starts)
        args = tokens[:, :new], starts, counts, cache
        on_gpu = jax.default_backend() == "gpu"
        got, expected = (compiled_for(target)(*args) for target in (Target(True, kernels=on_gpu), Target()))
        if new > 1:
            real = np.arange(new) < np.asarray(counts)[:, None]
            (got, keys), (expected, wanted) = got, expected
            got, expected = np.asarray(got)[real], np.asarray(expected)[real]
            same = [
                float(jnp.abs(a.astype(jnp.float32) - b.astype(jnp.float32)).max())
                for a, b in zip(keys, wanted, strict=True)
            ]
            return {"error": _relative(got, expected), "keys_differ_by": same[:2]}
        return {"error": _relative(got, expected)}

    for rows, new in shapes:
        what = {"what": f"logits, {kind}: kernels against XLA", "rows": rows, "tokens": new}
        report.attempt("promises", what, 5, lambda r=rows, n=new: run(r, n))


def _relative(got: Any, expected: Any) -> float:
    got, expected = np.asarray(got, np.float64), np.asarray(expected, np.float64)
    return float(np.linalg.norm(got - expected) / np.linalg.norm(expected))


def adapted(model: Any) -> Any:
    """With a LoRA adapter of rank 16 beside every quantised weight."""
    for layer in model.model.layers:
        for linear in (layer.self_attn.qkv_proj, layer.self_attn.o_proj, layer.mlp.gate_up_proj, layer.mlp.down_proj):
            weight = linear.weight[...]
            shapes = (16, weight.shape[1]), (weight.shape[0], 16)
            down, up = (jax.random.normal(jax.random.key(i), s, jnp.bfloat16) * 0.02 for i, s in enumerate(shapes))
            linear.weight = QuantizedWeight(Adapted(weight, down, up))
    return model


def promises(report: Any, tiny: bool, random_model: Any) -> None:
    """All of them; the widest first."""
    golden(report, tiny)
    in_16_bits(report)
    for kind in ("bfloat16", "int4"):
        strict(report, tiny, random_model(config(tiny), kind), kind)
    steps(report, adapted(random_model(config(tiny), "int4")), "int4 with an adapter", ((1, 1), (8, 1)))
    steps(report, random_model(config(tiny), "bfloat16"), "bfloat16", ((1, 5), (1, 1), (8, 1)))
    steps(report, random_model(config(tiny), "int4"), "int4", ((1, 5), (1, 1), (8, 1)))


def as_one_graph(program: Program) -> Program:
    """The same with the loop among XLA's command buffers: a CUDA graph with a node that repeats another."""
    target = Target(gpu_decode=True, kernels=jax.default_backend() == "gpu")
    options = {**program.decode.compiler_options, **ONE_GRAPH}
    stage = Stage(
        stages._run_decode, stages._describe_decode, compiled_for=target, compiler_options=options,
        **stages._DECODE,
    )  # fmt: skip
    return program._replace(decode=stage)


def one_graph(report: Any, tiny: bool, random_model: Any) -> None:
    """The loop as one graph: its tokens over many steps and early ends are those of the other; and its time."""

    def tokens_of(program: Program, request: Request) -> tuple[np.ndarray, np.ndarray, float]:
        state = prefill(program, request)
        jax.block_until_ready(state.lengths)
        start = time.perf_counter()
        state = advance(program, request, state)
        jax.block_until_ready(state.lengths)
        return np.asarray(state.tokens), np.asarray(state.lengths), time.perf_counter() - start

    def many(model: Any, batch: int, calls: int, new: int) -> dict[str, Any]:
        ids, graph, total, differ, early = np.random.default_rng(0).integers(0, 4096, (batch, 16)), None, 0, 0, 0
        seconds, ends = [0.0, 0.0], []
        for call in range(calls):
            # Some calls end early: a row where one of these comes up, the call where all rows have.
            eos = list(range(10, 10 + (512 if tiny else 16)))
            options = {"max_new_tokens": new, "do_sample": True, "temperature": 50.0, "top_k": 0, "eos_token_id": eos}
            request = prepare(model, ids, None, resolve(options, None, GenerationConfig()), seed=call)
            program = program_for(model, request)
            graph = graph or as_one_graph(program)
            found = [tokens_of(p, request) for p in (program, program._replace(decode=graph.decode))]
            differ += not all((a == b).all() for a, b in zip(found[0][:2], found[1][:2], strict=True))
            made = int(found[0][1].max()) - ids.shape[1]
            total, early = total + made, early + (made < new)
            ends.append(made)
            if call > 0:
                seconds = [seconds[i] + found[i][2] / made for i in range(2)]
        count = max(1, calls - 1)
        us = {
            f"us_per_step_{name}": round(1e6 * s / count, 1) for name, s in zip(("now", "graph"), seconds, strict=True)
        }
        return {
            "steps": total,
            "calls": calls,
            "ended_early": early,
            "lengths": ends,
            "calls_that_differ": differ,
            **us,
        }

    model = random_model(config(tiny), "int4")
    for batch in (1, 8):
        calls, new = (4, 16) if tiny else (12, 600)
        what = {"what": "many steps", "batch": batch}
        report.attempt("graph", what, 10, lambda b=batch, c=calls, n=new: many(model, b, c, n))
