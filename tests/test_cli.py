"""The command line, run as a user runs it: text out, one line for errors, never a traceback."""

import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxgen import JaxgenError, cli, demo

COLORS = "A list of colors: red, blue"
COLORS_CONTINUED = ", green, yellow, orange, purple, pink,"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def test_the_first_command_in_a_process_of_its_own():
    result = subprocess.run(
        [sys.executable, "-m", "jaxgen.cli", "generate", COLORS],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert result.stdout == COLORS + COLORS_CONTINUED + "\n"


def test_several_prompts_in_batches_give_the_same(capsys):
    prompts = [COLORS, "1, 2, 3", "A, B, C, D, E"]
    options = ["--do-sample", "--seed", "5", "--max-new-tokens", "9"]
    together = run(capsys, "generate", *prompts, *options)
    assert [line.startswith(prompt) for line, prompt in zip(together.splitlines(), prompts, strict=True)]
    assert run(capsys, "generate", *prompts, *options, "--batch-size", "1") == together


def test_standard_input_and_files(capsys, monkeypatch, tmp_path: Path):
    text = f"{COLORS}\n\n1, 2, 3\n"
    expected = run(capsys, "generate", COLORS, "1, 2, 3")
    for arguments in ([], ["-"]):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        assert run(capsys, "generate", *arguments) == expected
    (tmp_path / "prompts.txt").write_text(text)
    assert run(capsys, "generate", "--file", str(tmp_path / "prompts.txt")) == expected


def test_json(capsys):
    lines = run(capsys, "generate", COLORS, "Portugal is", "--json").splitlines()
    first, second = map(json.loads, lines)
    assert list(first) == ["prompt", "completion", "token_ids", "logprobs", "finish_reason"]
    assert first["prompt"] == COLORS
    assert first["completion"] == COLORS_CONTINUED
    assert first["finish_reason"] == "length"
    assert len(first["token_ids"]) == len(first["logprobs"]) == 20
    assert all(np.isfinite(first["logprobs"]))
    assert second["completion"].startswith(" a country in southwestern Europe")


def test_streaming_prints_the_same_text(capsys):
    for options in ([], ["--do-sample", "--seed", "3", "--max-new-tokens", "40"]):
        prompts = [COLORS, "I am a cat."]
        assert run(capsys, "generate", *prompts, *options, "--stream") == run(capsys, "generate", *prompts, *options)


def test_the_space_after_the_prompt_is_kept(tmp_path):
    """Llama's tokenizers strip the first space of what they decode; a continuation must not lose it."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    from jaxgen.text.tokenizer import continuation

    words = {"<unk>": 0, "\u2581Portugal": 1, "\u2581is": 2, "\u2581a": 3}
    raw = Tokenizer(models.BPE(vocab=words, merges=[], unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    raw.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, unk_token="<unk>", clean_up_tokenization_spaces=False)
    assert tokenizer.decode([3]) == "a"
    assert continuation(tokenizer, [1, 2], [3]) == " a"


def test_a_fresh_seed_is_told_and_repeats(capsys):
    arguments = ["generate", "I am a cat.", "1, 2, 3", "--do-sample", "--temperature", "3", "--batch-size", "1"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr()
    seed = first.err.split("--seed ")[1].split()[0]
    assert run(capsys, *arguments, "--seed", seed) == first.out


def test_inspect(capsys):
    text = run(capsys, "inspect", str(demo.path()))
    config = json.loads((demo.path() / "config.json").read_text())
    rows = dict(line.split(None, 1) for line in text.splitlines())
    assert f"{config['num_hidden_layers']} layers, hidden {config['hidden_size']}" in rows["architecture"]
    assert f"window {config['sliding_window']}" in rows["attention"]
    kv_bytes = 2 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"] * 4
    assert f"{kv_bytes / 1000:.4g} kB per token" in rows["cache"]
    size = (demo.path() / "model.safetensors").stat().st_size
    assert int(rows["parameters"].replace(",", "")) * 2 == pytest.approx(size, rel=0.01)  # bfloat16
    assert "the weights fit" in rows["device"]


BAD = {
    "unknown model": (["generate", "x", "--model", "no/such-model-here"], "no/such-model-here"),
    "prompt not UTF-8": (["generate", "\udcff abc"], "not UTF-8"),
    "bad path": (["generate", "x", "--model", "./nowhere"], "./nowhere"),
    "bad temperature": (["generate", "x", "--do-sample", "--temperature", "0"], "temperature=0.0"),
    "bad dtype": (["generate", "x", "--dtype", "int3"], "int3"),
    "too long": (["generate", "x", "--max-new-tokens", "100000"], "max_new_tokens=100000"),
    "file and arguments": (["generate", "x", "--file", "y"], "--file"),
    "no such file": (["generate", "--file", "/nowhere/prompts.txt"], "/nowhere/prompts.txt"),
    "bad batch size": (["generate", "x", "--batch-size", "0"], "--batch-size 0"),
    "inspect nothing": (["inspect", "./nowhere"], "./nowhere"),
}


@pytest.mark.parametrize("name", BAD)
def test_errors_are_one_line(name: str, capsys, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    arguments, message = BAD[name]
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("jaxgen: ")
    assert captured.err.count("\n") == 1
    assert message in captured.err


def test_no_prompts(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert cli.main(["generate"]) == 2
    assert "no prompts" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--tempreature", "1"], ["--max-new-tokens", "x"], ["--json", "--stream"]])
def test_usage_errors_are_one_line_too(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "x", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_directory_without_a_tokenizer(tmp_path: Path):
    from jaxgen.text.tokenizer import load_tokenizer

    with pytest.raises(JaxgenError, match="no tokenizer"):
        load_tokenizer(tmp_path)
