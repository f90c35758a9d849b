"""The command line, run as a user runs it: text out, one line for errors, never a traceback."""

import gc
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxgen
from jaxgen import JaxgenError, cli, demo
from jaxgen.arguments import parser, settings_of
from jaxgen.text.tokenizer import load_tokenizer

COLORS = "A list of colors: red, blue"
COLORS_CONTINUED = ", green, yellow, orange, purple, pink,"


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    return captured.out


def command(*arguments: str, **environment: str) -> tuple[int, str, str]:
    """Exit code, output and errors of `python -m jaxgen` in a process of its own."""
    result = subprocess.run(
        [sys.executable, "-m", "jaxgen", *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        env=os.environ | environment,
    )
    return result.returncode, result.stdout, result.stderr


@pytest.mark.slow
def test_the_first_command_and_the_second_which_finds_compiled_programs(tmp_path: Path, monkeypatch):
    """In the user's own directory, private, and it stays as it is with the same command, or with --no-compile-cache."""
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    directory = tmp_path / ".cache" / "jaxgen" / "compiled"
    expected = (0, COLORS + COLORS_CONTINUED + "\n", "")
    assert command("generate", COLORS, "--no-compile-cache", HOME=str(tmp_path)) == expected
    assert not directory.exists()
    assert command("generate", COLORS, HOME=str(tmp_path)) == expected
    programs = {file.name for file in directory.glob("*-cache")}
    assert directory.stat().st_mode & 0o777 == 0o700
    assert {name.split("-")[0] for name in programs} >= {"jit__run_prefill", "jit__run_decode"}
    assert command("generate", COLORS, HOME=str(tmp_path)) == expected
    assert {file.name for file in directory.glob("*-cache")} == programs


def test_a_damaged_program_is_told_in_a_line_and_dropped(tmp_path: Path, monkeypatch):
    """A kill while JAX writes one leaves the half of it, which JAX would complain of for ever."""
    options = {"HOME": str(tmp_path), "JAX_COMPILATION_CACHE_DIR": str(tmp_path)}
    code = (
        "import sys, jax, jaxgen.cli as cli; jax.config.update('jax_persistent_cache_min_compile_time_secs', 0); "
        "cli._COMMANDS['inspect'] = lambda _: print(jax.jit(lambda x: x + 1)(1)); sys.exit(cli.main(['inspect', 'x']))"
    )

    def run() -> tuple[str, str]:
        result = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | options
        )
        return result.stdout, result.stderr

    assert run() == ("2\n", "")
    entry = next(tmp_path.glob("jit__lambda*-cache"))
    whole = entry.stat().st_size
    os.truncate(entry, whole // 2)
    said = "jaxgen: what was kept of the compiled jit__lambda was damaged and is dropped\n"
    assert run() == ("2\n", said)
    assert run() == ("2\n", "")
    assert entry.stat().st_size > whole // 2


def test_without_a_private_directory_it_says_so_and_goes_on(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / ".cache").write_text("a file")
    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    jax.config.update("jax_compilation_cache_dir", None)
    try:
        cli._keep_compiled(parser().parse_args(["generate", "x"]))
    finally:
        jax.config.update("jax_compilation_cache_dir", chosen)
    said = capsys.readouterr().err
    assert said.startswith("jaxgen: compiled programs are not kept (--no-compile-cache does not try): ")
    assert said.count("\n") == 1


def test_version(capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["--version"])
    assert caught.value.code == 0
    assert capsys.readouterr() == (f"jaxgen {jaxgen.__version__}\n", "")


@pytest.mark.slow
def test_several_prompts_in_batches_give_the_same(capsys):
    prompts = [COLORS, "1, 2, 3", "A, B, C, D, E"]
    options = ["--do-sample", "--seed", "5", "--max-new-tokens", "9"]
    together = run(capsys, "generate", *prompts, *options)
    assert [line.startswith(prompt) for line, prompt in zip(together.splitlines(), prompts, strict=True)]
    assert run(capsys, "generate", *prompts, *options, "--batch-size", "1") == together


def test_standard_input_and_files(capsys, monkeypatch, tmp_path: Path):
    """Lines stay where they are: --json counts all of them, and those without a prompt are named."""
    text = f"{COLORS}\r\n\n1, 2, 3\n"
    expected = run(capsys, "generate", COLORS, "1, 2, 3")
    path = tmp_path / "prompts.txt"
    path.write_bytes(b"\xef\xbb\xbf" + text.encode())
    for source, arguments in {"standard input": [[], ["-"]], f"--file {path}": [["--file", str(path)]]}.items():
        for argument in arguments:
            monkeypatch.setattr(sys, "stdin", io.StringIO(text))
            assert cli.main(["generate", *argument]) == 0
            blank = f"jaxgen: {source}: nothing is generated for blank lines: 2\n"
            assert capsys.readouterr() == (expected, blank)
    assert cli.main(["generate", "--json", "--file", str(path)]) == 0
    assert [json.loads(line)["index"] for line in capsys.readouterr().out.splitlines()] == [0, 2]


def test_many_blank_lines_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n" * 1000 + "1, 2, 3"))
    assert cli._prompts(parser().parse_args(["generate"])) == {1000: "1, 2, 3"}
    assert capsys.readouterr().err.endswith("blank lines: 1, 2, 3, 4, 5, 6, 7, 8, 9, 10 and 990 more\n")


@pytest.mark.parametrize("arguments", [["generate"], ["generate", "--file", "FILE"]], ids=" ".join)
def test_bytes_that_are_no_text_are_named_by_their_place(arguments: list[str], capsys, monkeypatch, tmp_path: Path):
    data = b"1, 2, 3\nsecret \xff secret\n"
    (tmp_path / "FILE").write_bytes(data)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data), encoding="utf-8"))
    assert cli.main(arguments) == 2
    said = capsys.readouterr().err
    assert said.endswith(": line 2, byte 8 (0xff) is not UTF-8 text\n")
    assert "secret" not in said
    assert said.count("\n") == 1


def test_json(capsys):
    lines = run(capsys, "generate", COLORS, "Portugal is", "--json").splitlines()
    first, second = map(json.loads, lines)
    assert list(first) == ["index", "prompt", "completion", "token_ids", "logprobs", "finish_reason"]
    assert first["prompt"] == COLORS
    assert first["completion"] == COLORS_CONTINUED
    assert first["finish_reason"] == "length"
    assert len(first["token_ids"]) == len(first["logprobs"]) == 20
    assert all(np.isfinite(first["logprobs"]))
    assert second["completion"].startswith(" a country in southwestern Europe")


@pytest.mark.slow
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


OPTIONS = {
    "beams": (["--num-beams", "3", "--set", "length_penalty=0.5"], {"num_beams": 3, "length_penalty": 0.5}),
    "penalty": (["--repetition-penalty", "1.3"], {"repetition_penalty": 1.3}),
    "regex": (["--regex", "[0-9]+"], {"constraint": jaxgen.regex("[0-9]+")}),
    "choice": (["--choice", "a", "--choice", "b.c"], {"constraint": jaxgen.choice(["a", "b.c"])}),
    "stop": (["--stop", "yellow", "--stop", "orange"], {"stop_strings": ["yellow", "orange"]}),
    "int": (["--set", "no_repeat_ngram_size=2", "--set", "min_new_tokens=5"],
            {"no_repeat_ngram_size": 2, "min_new_tokens": 5}),
    "words of Python": (["--set", "strict=True"], {"strict": True}),
    "lists": (["--set", "bad_words_ids=[[3], [4, 5]]"], {"bad_words_ids": [[3], [4, 5]]}),
    "a word": (["--set", "early_stopping=never", "--num-beams", "2"], {"early_stopping": "never", "num_beams": 2}),
    "a text": (["--set", "stop_strings=purple, pink"], {"stop_strings": "purple, pink"}),
}  # fmt: skip


@pytest.mark.parametrize("name", OPTIONS)
def test_options_become_those_of_generate(name: str):
    arguments, options = OPTIONS[name]
    assert settings_of(parser().parse_args(["generate", "x", *arguments])) == options


@pytest.mark.parametrize("name", ["beams", "stop"])
def test_options_give_what_generate_gives(name: str, capsys):
    arguments, options = OPTIONS[name]
    model = jaxgen.AutoModelForCausalLM.from_pretrained(demo.path())
    tokenizer = load_tokenizer(demo.path())
    ids = model.generate(**tokenizer([COLORS], return_tensors="np"), tokenizer=tokenizer, **options)
    expected = tokenizer.batch_decode(ids, skip_special_tokens=True)
    [line] = run(capsys, "generate", COLORS, *arguments, "--json").splitlines()
    assert [COLORS + json.loads(line)["completion"]] == expected


@pytest.mark.slow
def test_four_bits(capsys):
    model = jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), load_in_4bit=True)
    inputs = load_tokenizer(demo.path())([COLORS], return_tensors="np")
    expected = model.generate(**inputs, max_new_tokens=4, return_dict_in_generate=True)
    assert cli.main(["generate", COLORS, "--load-in-4bit", "--max-new-tokens", "4", "--json"]) == 0
    np.testing.assert_array_equal(json.loads(capsys.readouterr().out)["logprobs"], expected.logprobs[0])


def test_an_interrupt_that_python_drops_ends_the_command(capsys, monkeypatch):
    """As JAX's callback of the garbage collector did, in the first seconds, with the exception of a Ctrl-C."""

    def interrupted(*_: object):
        gc.callbacks.remove(interrupted)
        raise KeyboardInterrupt

    def work(_: object):
        gc.callbacks.append(interrupted)
        gc.collect()
        for _ in range(1000):
            time.sleep(0.01)

    monkeypatch.setitem(cli._COMMANDS, "inspect", work)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background a shell has it ignored
    try:
        assert cli.main(["inspect", "x"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr() == ("", "")


@pytest.mark.skipif(os.name == "nt", reason="Windows has no signals to send")
@pytest.mark.parametrize("moment", [0.0, 0.1, 0.2, "text"])
def test_ctrl_c_ends_a_command_at_any_time(moment: float | str):
    """By the signal while JAX is imported, whose extensions would abort, and with 130 and no crash afterwards."""
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); from jaxgen.cli import command; "
        "print('here', flush=True); command()"
    )
    arguments = ["generate", COLORS, "--max-new-tokens", "450", "--stream", "--no-compile-cache"]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert process.stdout is not None
    assert process.stdout.readline() == b"here\n"
    if moment == "text":
        process.stdout.read(len(COLORS) + 2)
    else:
        time.sleep(float(moment))
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=60)
    assert process.returncode in ((130,) if moment == "text" else (130, -signal.SIGINT))


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
    "no such option": (
        ["generate", "x", "--set", "temprature=2"],
        "temprature=...: generate has no such option; did you mean temperature?",
    ),
    "no value": (["generate", "x", "--set", "top_k=many"], "top_k='many'"),
    "a long value": (["generate", "x", "--set", "top_k=" + "[" * 9999], "must be an int"),
    "refused by generate": (["generate", "x", "--set", "penalty_alpha=0.6"], "penalty_alpha=0.6 is not supported"),
    "of the command's own": (["generate", "x", "--set", "output_scores=true"], "prints one text per prompt"),
    "twice": (["generate", "x", "--set", "top_k=3", "--top-k", "3"], "top_k is given twice"),
    "an argument of generate": (["chat", "--set", "seed=3"], "seed=...: generate has no such option"),
    "the revision of a directory": (
        ["generate", "x", "--model", str(demo.path()), "--revision", "v1"],
        "--revision v1",
    ),
    "the revision of the demo": (["chat", "--revision", "v1"], "--revision v1"),
    "no such revision": (["inspect", "no/such-model-here", "--revision", "v1"], "no/such-model-here"),
    "no calibration": (["convert", str(demo.path()), "DST", "--method", "gptq"], "--calibration FILE"),
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
    assert len(captured.err) < 2000


def test_no_prompts(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert cli.main(["generate"]) == 2
    assert "no prompts" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments", [["--tempreature", "1"], ["--max-new-tokens", "x"], ["--json", "--stream"], ["--set", "top_k"]]
)
def test_usage_errors_are_one_line_too(arguments: list[str], capsys):
    with pytest.raises(SystemExit) as caught:
        cli.main(["generate", "x", *arguments])
    assert caught.value.code == 2
    assert capsys.readouterr().err.count("\n") == 1


def test_a_directory_without_a_tokenizer(tmp_path: Path):
    with pytest.raises(JaxgenError, match="no tokenizer"):
        load_tokenizer(tmp_path)


def test_eval_says_what_it_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    for name in ("jaxgen.integrations.lm_eval", "jaxgen.integrations.harness"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    assert cli.main(["eval", "--tasks", "arc_easy"]) == 2
    assert capsys.readouterr().err == "jaxgen: evaluation needs lm-eval: pip install lm-eval\n"
