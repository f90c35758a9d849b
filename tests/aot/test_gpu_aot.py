"""What XLA makes of the real 7B shape on an H200, compiled without one by `benchmarks/gpu_aot.py`.

Needs JAX's CUDA plugin (not the CUDA libraries), and is not collected without it; `.ci/run` installs it.
"""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
BATCHES = (1, 8, 32)
IN_REGISTERS = "--no-spilling"  # the script fails where a kernel would keep numbers in memory for want of registers
Row = dict[str, Any]


@cache  # every test looks at the same compilations
def rows(*options: str, script: str = "gpu_aot.py") -> list[Row]:
    command = [sys.executable, str(BENCHMARKS / script), "--json", *options]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


def decode(layers: int = 32, *options: str) -> list[Row]:
    return rows("--stage", "decode", "--weights", "int4", "--layers", str(layers), *options)


def test_keys():
    row = decode(32, IN_REGISTERS)[0]
    assert set(row) == {
        "stage", "weights", "batch", "layers", "group_size", "temp_bytes", "alias_bytes", "kv_bytes",
        "loop_weight_buffers", "weight_transposes", "command_buffers", "linears", "fused_linears", "kernels",
        "launches_per_layer", "launches_per_token", "compile_seconds",
    }  # fmt: skip
    assert [row["batch"] for row in decode(32, IN_REGISTERS)] == list(BATCHES)


@pytest.mark.parametrize("batch", BATCHES)
def test_decode_moves_nothing_that_it_need_not(batch: int):
    (row,) = [row for row in decode(32, IN_REGISTERS) if row["batch"] == batch]
    assert row["kv_bytes"] == 2 * 32 * batch * 8 * 128 * 768 * 2  # keys and values, layers, rows, heads, slots, bf16
    # The whole state is updated in place; beside the cache it is tokens, log-probabilities and counters.
    assert 0 <= row["alias_bytes"] - row["kv_bytes"] < 20_000 * batch
    assert row["temp_bytes"] < 32_000_000
    assert row["loop_weight_buffers"] == 0
    assert row["weight_transposes"] == 0
    assert row["command_buffers"] == 1


def test_a_layer_is_five_kernels_for_one_row_and_at_most_eight_for_more():
    one, eight, many = decode(32, IN_REGISTERS)
    assert one["launches_per_layer"] <= 6  # the fifth one's parts are put together in a launch of their own
    assert eight["launches_per_layer"] <= 8
    assert many["launches_per_layer"] <= 7
    last = {"write_down": 1}
    several = {"int4_rows": 4 * 32, "attend": 32, "add_norm": 2 * 32 + 1, **last}
    assert one["kernels"] == {"int4_row": 4 * 32, "attend": 32, "attend_combine": 32, "dense_row": 1, **last}
    assert eight["kernels"] == {"attend_combine": 32, **several}
    assert many["kernels"] == several
    # Outside the layers: the embedding, rotary tables, norm and head, the choice of a token, and writing it down.
    outside = [row["launches_per_token"] - 32 * row["launches_per_layer"] for row in (one, eight, many)]
    assert max(outside) <= 15


@pytest.mark.parametrize(
    "options",
    [
        ("--group-size", "32", "64", "-1"),  # of 64, ptxas keeps two numbers in memory, and has registers left
        ("--scale-dtype", "float16", IN_REGISTERS),
        ("--card", "a100", IN_REGISTERS),
        ("--strict", IN_REGISTERS),
    ],
)
def test_other_groups_scales_and_cards_have_kernels_as_well(options: tuple[str, ...]):
    for row in decode(2, *options, "--batch", "1", "8", "64"):
        kernel = "int4_row" if row["batch"] == 1 else "int4_rows"
        assert row["kernels"][kernel] == row["linears"] == 8, row
        assert row["loop_weight_buffers"] == 0, row
        assert row["alias_bytes"] >= row["kv_bytes"]


def test_an_adapter_costs_one_launch_for_each_linear_layer():
    for row in decode(2, "--rank", "16", "--batch", "1", "8"):
        one = row["batch"] == 1
        assert row["launches_per_layer"] == (6 if one else 8) + 4
        assert row["kernels"]["int4_row" if one else "int4_rows"] == 8
        assert row["loop_weight_buffers"] == 0


@pytest.mark.parametrize("card", ["h200", "a100"])
def test_tables_of_16_numbers_have_kernels(card: str):
    """NF4 and FP4 in blocks of 64: as many launches as int4, and no weight in memory."""
    options = ("--stage", "decode", "--weights", "nf4", "--layers", "2", "--group-size", "64", "--card", card)
    one, eight = rows(*options, "--batch", "1", "8", IN_REGISTERS)
    assert one["kernels"]["lookup_row"] == eight["kernels"]["lookup_rows"] == 8
    assert one["launches_per_layer"] <= 6
    assert eight["launches_per_layer"] <= 8
    for row in (one, eight):
        assert row["loop_weight_buffers"] == row["weight_transposes"] == 0
        assert row["command_buffers"] == 1
        assert row["temp_bytes"] < 8_000_000


def test_products_take_few_instructions_per_weight():
    """They wait for arithmetic as much as for memory: another instruction per weight would show."""
    most = {("int4", 1): 4.3, ("int4", 8): 3.5, ("nf4", 1): 4.4, ("nf4", 8): 4.1}
    for row in rows(script="gpu_instructions.py"):
        assert row["per_weight"] <= most[row["weights"], row["rows"]], row


def test_without_kernels_every_linear_layer_is_one_fusion_that_reads_int4():
    """The form for GPUs that run none, and where their compiler refuses one."""
    for row in decode(2, "--xla"):
        assert row["linears"] == row["fused_linears"] == 8
        assert row["kernels"] == {}
        assert row["loop_weight_buffers"] == row["weight_transposes"] == 0
        assert row["launches_per_layer"] <= (12 if row["batch"] == 1 else 14)


def test_without_experimental_options_no_weight_is_unpacked_into_memory():
    for row in decode(2, "--xla", "--fallback", "--batch", "1", "8"):
        assert row["loop_weight_buffers"] == 0
        assert row["weight_transposes"] == 0
        assert row["alias_bytes"] >= row["kv_bytes"]


@pytest.mark.parametrize("stage", ["decode", "prefill"])
def test_strict_compiles_with_its_options(stage: str):
    """A GPU's compiler takes the options that ask for sums in one order, and no weight is unpacked into the loop."""
    for row in rows("--stage", stage, "--weights", "int4", "bf16", "--layers", "2", "--strict", "--batch", "8"):
        assert row["loop_weight_buffers"] == 0
        assert row["alias_bytes"] >= row["kv_bytes"] or stage == "prefill"


def test_prefill_unpacks_one_weight_at_a_time():
    """Four times the layers need no more memory, but for the cache and XLA's liberties (a weight is 235 MB)."""
    options = ("--stage", "prefill", "--weights", "int4", "nf4", "--layers", "2", "8", "--batch", "8")
    *few, int4, nf4 = rows(*options)
    for before, row in zip(few, (int4, nf4), strict=True):
        assert row["temp_bytes"] < before["temp_bytes"] + 250_000_000


def test_prefill_of_packed_weights_is_that_of_floats_and_one_unpacking_for_each():
    """No copy of a scale, and nothing that puts activations into another order."""
    options = ("--stage", "prefill", "--layers", "2", "--group-size", "64", "--batch", "1", "8")
    for int4, nf4, floats in zip(*(rows(*options, "--weights", kind) for kind in ("int4", "nf4", "bf16")), strict=True):
        assert int4["launches_per_layer"] == nf4["launches_per_layer"] == floats["launches_per_layer"] + 4
        assert int4["launches_per_token"] == nf4["launches_per_token"] == floats["launches_per_token"] + 2 * 4


def test_bfloat16_decodes_in_place():
    one, *_ = decoded = rows("--stage", "decode", "--weights", "bf16", "--layers", "2", IN_REGISTERS)
    assert one["launches_per_layer"] <= 6
    for row in decoded:
        assert row["loop_weight_buffers"] == row["weight_transposes"] == 0
        assert row["command_buffers"] == 1
        assert row["temp_bytes"] < 32_000_000


@pytest.mark.parametrize(
    ("generate", "most"),
    [
        ({"num_beams": 4}, 10_000_000),
        ({"prompt_lookup_num_tokens": 5}, 12_000_000),
        ({"cache_implementation": "quantized"}, 8_000_000),  # read as it is: nothing is unpacked
        (
            {"do_sample": True, "top_k": 50, "top_p": 0.9, "repetition_penalty": 1.2, "no_repeat_ngram_size": 3},
            8_000_000,
        ),
    ],
    ids=["beams", "lookup", "int8 cache", "sampling"],
)
def test_other_ways_of_generating_compile_and_move_no_cache(generate: dict[str, Any], most: int):
    """With the experimental options, which have made XLA abort on other programs; beams move blocks of slots only.

    The bounds leave no room for an unpacked weight either: the smallest takes 33 MB.
    """
    for row in decode(2, "--batch", "1", "8", "--generate", json.dumps(generate), IN_REGISTERS):
        assert row["alias_bytes"] >= row["kv_bytes"]
        assert row["temp_bytes"] < most
