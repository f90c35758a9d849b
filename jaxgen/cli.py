"""The command line: `jaxgen generate`, `batch`, `chat`, `replay`, `inspect`, `convert`, `eval`, `bench` and `serve`."""

import _thread
import argparse
import contextlib
import glob
import importlib.util
import json
import logging
import os
import re
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxgen.arguments import parser, settings_of
from jaxgen.errors import JaxgenError
from jaxgen.text.utf8 import decode_utf8

_LONGEST = 1600  # characters of a message: what went wrong may be as long as what was given


def command() -> NoReturn:
    """The program `jaxgen`: `main`, and its end."""
    code = main()
    if code == 130:
        # At once: Python would take down what JAX, which may still compute, needs; that ended in a segmentation fault.
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        os._exit(code)
    sys.exit(code)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, 1 for other tokens or bad rows, 2 for errors (a line on stderr), 130 for Ctrl-C."""
    options = parser().parse_args(arguments)
    # Only what jaxgen says belongs on the terminal; transformers would remark that torch is not installed.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        _import_jax()
        with _every_interrupt_counts(), warnings.catch_warnings(), _telling("jaxgen", logging.WARNING):
            warnings.showwarning = _show_warning
            code = _COMMANDS[options.command](options) or 0
            sys.stdout.flush()
    except JaxgenError as error:
        return _complain(error)
    except BrokenPipeError:  # the reader (head, less) has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        return 130
    except RuntimeError as error:
        import jax

        if not isinstance(error, jax.errors.JaxRuntimeError):
            raise
        return _complain(error)  # most often: out of memory
    return code


def _complain(error: Exception) -> int:
    _say(str(error))
    return 2


def _say(text: str) -> None:
    """A line for the person at the terminal, beside the output; one of at most a screen."""
    line = " ".join(text.split())
    line = line if len(line) <= _LONGEST else f"{line[: _LONGEST // 2]} [...] {line[-_LONGEST // 2 :]}"
    sys.stderr.write(f"jaxgen: {line}\n")


@contextlib.contextmanager
def _telling(name: str, least: int) -> Iterator[None]:
    """What this logger says of at least this level is told on the terminal."""
    logger, handler = logging.getLogger(name), logging.Handler()
    handler.emit = lambda record: _say(record.getMessage())
    handler.setLevel(least)
    handler.addFilter(lambda record: record.name == name)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(min(least, logger.getEffectiveLevel()))
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


def _show_warning(message: Any, *_: Any, **__: Any) -> None:
    """One line. What a killed command has kept half of is dropped: JAX would complain of it for ever."""
    if damaged := re.match("Error reading persistent compilation cache entry for '(.*?)'", str(message)):
        import jax

        directory: str = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
        for path in Path(directory).glob(f"{glob.escape(damaged[1])}-*"):
            path.unlink(missing_ok=True)
        _say(f"what was kept of the compiled {damaged[1]} was damaged and is dropped")
    else:
        _say(str(message))


def _import_jax() -> None:
    """Import JAX, where Ctrl-C ends the process: C extensions that it interrupts make another error of it, or abort."""
    mine = signal.getsignal(signal.SIGINT) is signal.default_int_handler  # not that of a program that calls `main`
    if mine and "jax" not in sys.modules and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        try:
            import flax.nnx  # noqa: F401
            import jax  # noqa: F401
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)


@contextlib.contextmanager
def _every_interrupt_counts() -> Iterator[None]:
    """Ctrl-C also where Python drops its exception: in callbacks of the garbage collector, which importing JAX adds."""
    before = sys.unraisablehook

    def interrupt_again() -> None:
        time.sleep(0.05)  # until the callback has returned
        _thread.interrupt_main()

    def hook(dropped: Any) -> None:
        if issubclass(dropped.exc_type, KeyboardInterrupt):
            _thread.start_new_thread(interrupt_again, ())
        else:
            before(dropped)

    sys.unraisablehook = hook
    try:
        yield
    finally:
        sys.unraisablehook = before


def _keep_compiled(options: argparse.Namespace) -> None:
    """Keep compiled programs for the next command; where JAX was told of a directory already, that one is it."""
    import jax

    chosen = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if options.no_compile_cache:
        jax.config.update("jax_enable_compilation_cache", False)
    elif "JAX_COMPILATION_CACHE_DIR" not in os.environ and not chosen:
        from jaxgen.generation.programs.stages import enable_compile_cache

        try:
            enable_compile_cache()
        except (JaxgenError, OSError) as error:
            _say(f"compiled programs are not kept (--no-compile-cache does not try): {error}")


def _locate(options: argparse.Namespace) -> Path:
    """Where the model is, downloaded if need be."""
    from jaxgen import demo
    from jaxgen.convert.hub import locate

    directory = demo.path() if options.model is None else locate(options.model, revision=options.revision)
    if options.revision is not None and (options.model is None or directory == Path(options.model).expanduser()):
        raise JaxgenError(f"--revision {options.revision}: only hub ids have revisions, and {directory} is a directory")
    return directory


def _load(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer and the options of `generate`; a fresh seed is chosen here, and told, where one is needed."""
    from jaxgen.convert.load import AutoModelForCausalLM
    from jaxgen.generation.choosing.sample import random_key
    from jaxgen.generation.options.config import resolve
    from jaxgen.generation.options.table import Extras
    from jaxgen.text.tokenizer import load_tokenizer

    settings = settings_of(options)
    settings["num_return_sequences"] = 1  # one text per prompt, whatever the checkpoint's own defaults say
    directory = _locate(options)
    _keep_compiled(options)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=options.dtype, load_in_4bit=options.load_in_4bit)
    tokenizer = load_tokenizer(directory)
    if options.seed is None and resolve(Extras.take(settings)[1], None, model.generation_config).do_sample:
        options.seed = random_key(None, None)[1]
        _say(f"--seed {options.seed} gives this text again")
    return model, tokenizer, settings


def _generate(options: argparse.Namespace) -> None:
    if options.batch_size < 1:
        raise JaxgenError(f"--batch-size {options.batch_size} must be at least 1")
    if options.stream and options.record is not None:
        raise JaxgenError("--record and --stream exclude each other; the text is the same without --stream")
    if options.record is not None and not options.record.absolute().parent.is_dir():
        raise JaxgenError(f"--record {options.record}: there is no directory {options.record.parent}")
    from jaxgen.records.record import Recording

    places = _prompts(options)
    prompts = list(places.values())
    model, tokenizer, settings = _load(options)
    if options.stream:
        _stream(model, tokenizer, prompts, settings, options.seed)
        return
    recording = Recording(tokenizer)
    completed = _complete(model, tokenizer, prompts, settings, options, recording)
    try:
        for (index, prompt), (completion, details) in zip(places.items(), completed, strict=True):
            if options.json:
                line = {"index": index, "prompt": prompt, "completion": completion, **details}
                sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
            else:
                sys.stdout.write(prompt + completion + "\n")
            sys.stdout.flush()
    finally:  # also what was generated before an error, Ctrl-C or the end of a pipe
        if options.record is not None and recording.entries:
            recording.record().save(options.record)


def _prompts(options: argparse.Namespace) -> dict[int, str]:
    """The prompts by their place among the arguments, or by that of their line in --file or standard input."""
    if options.file is not None:
        if options.prompts:
            raise JaxgenError("prompts were given both as arguments and with --file; choose one")
        source = f"--file {options.file}"
        try:
            data = options.file.read_bytes()
        except (OSError, ValueError) as error:
            raise JaxgenError(f"{source}: cannot be read: {error}") from error
        text = decode_utf8(data, source)
    elif options.prompts and options.prompts != ["-"]:
        return {place: _utf8(prompt, f"prompt {place + 1}") for place, prompt in enumerate(options.prompts)}
    else:
        source, text = "standard input", _read_stdin()
    lines = text.replace("\r\n", "\n").replace("\r", "\n").removesuffix("\n").split("\n")
    prompts = {place: line for place, line in enumerate(lines) if line.strip()}
    if not prompts:
        raise JaxgenError("no prompts: give one as an argument, with --file, or on standard input")
    if blank := [str(place + 1) for place in range(len(lines)) if place not in prompts]:
        which = ", ".join(blank[:10]) + (f" and {len(blank) - 10} more" if len(blank) > 10 else "")
        _say(f"{source}: nothing is generated for blank lines: {which}")
    return prompts


def _read_stdin() -> str:
    """All of standard input, which may be closed, and which a caller may have replaced by one of text."""
    source = getattr(sys.stdin, "buffer", sys.stdin)
    data = source.read() if source is not None else ""
    return data if isinstance(data, str) else decode_utf8(data, "standard input")


def _utf8(argument: str, source: str) -> str:
    """An argument, in which Python hides bytes that are no UTF-8."""
    try:
        return decode_utf8(argument.encode("utf-8", "surrogateescape"), source)
    except UnicodeEncodeError as error:
        raise JaxgenError(f"{source}: character {error.start + 1} is not UTF-8 text") from error


def _complete(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    settings: dict[str, Any],
    options: argparse.Namespace,
    recording: Any,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each prompt's continuation and details; row ids make a row's text independent of --batch-size.

    With --record, what each batch was is added to `recording`.
    """
    from jaxgen.text.tokenizer import continuation

    for start in range(0, len(prompts), options.batch_size):
        batch = prompts[start : start + options.batch_size]
        inputs = tokenizer(batch, padding=True, return_tensors="np")
        result = model.generate(
            inputs["input_ids"],
            inputs["attention_mask"],
            seed=options.seed,
            row_ids=range(start, start + len(batch)),
            tokenizer=tokenizer,  # for stop strings
            return_dict_in_generate=True,
            **settings,
        )
        if options.record is not None:
            recording.add(result)
        width = inputs["input_ids"].shape[1]
        for row in range(len(batch)):
            count = result.lengths[row]
            tokens = result.sequences[row, width : width + count].tolist()
            own = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].tolist()
            yield continuation(tokenizer, own, tokens), {
                "token_ids": tokens,
                "logprobs": result.logprobs[row, :count].tolist(),
                "finish_reason": result.finish_reason[row],
            }  # fmt: skip
        del result  # it holds the batch's key-value cache


def _stream(model: Any, tokenizer: Any, prompts: list[str], settings: dict[str, Any], seed: int | None) -> None:
    from jaxgen.text.stream import stream

    for row, prompt in enumerate(prompts):
        pieces = stream(model, prompt, tokenizer=tokenizer, seed=seed, row_ids=[row], **settings)
        sys.stdout.write(prompt)
        for piece in pieces:
            sys.stdout.write(piece)
            sys.stdout.flush()
        sys.stdout.write("\n")


def _batch(options: argparse.Namespace) -> int:
    from jaxgen.batch.command import run

    settings = settings_of(options)
    directory = _locate(options)
    _keep_compiled(options)
    said, bad = run(options, directory, settings)
    sys.stdout.write(f"{said}\n")
    return 1 if bad else 0


def _chat(options: argparse.Namespace) -> None:
    from jaxgen.text.chat import Session, converse, lines_of

    system = None if options.system is None else _utf8(options.system, "--system")
    model, tokenizer, settings = _load(options)
    session = Session(model, tokenizer, system=system, seed=options.seed, **settings)
    if not sys.stdin.isatty():
        converse(session, lines_of(getattr(sys.stdin, "buffer", sys.stdin)), sys.stdout)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)
    sys.stdout.write("(/help says what there is besides asking)\n")
    converse(session, input, sys.stdout)
    sys.stdout.write("\n")


def _replay(options: argparse.Namespace) -> int:
    from jaxgen.records.record import Record
    from jaxgen.records.replay import replay, source_of

    _keep_compiled(options)
    record = Record.load(options.record)
    if options.load_model and options.model is None and (source := source_of(record)):
        _say(f"loading {source}")
    result = replay(record, options.model, load_model=options.load_model)
    sys.stdout.write(f"{result}\n")
    return result.exit_code


def _inspect(options: argparse.Namespace) -> None:
    from jaxgen.convert.inspect import describe

    memory = None if options.memory is None else 1e9 * options.memory
    sys.stdout.write(describe(_locate(options), options.dtype, options.devices, memory) + "\n")


def _convert(options: argparse.Namespace) -> None:
    from jaxgen.convert.checkpoint import Checkpoint
    from jaxgen.convert.convert import convert_checkpoint

    if options.method != "rtn" and options.calibration is None:
        raise JaxgenError(f"--method {options.method} needs calibration text: --calibration FILE, a UTF-8 text file")
    source = _locate(options)
    _keep_compiled(options)
    names = ("bits", "group_size", "method", "calibration", "lm_head")
    with _telling("jaxgen.convert", logging.INFO):
        target = convert_checkpoint(source, options.target, **{name: getattr(options, name) for name in names})
    before, after = (Checkpoint(place).total_bytes for place in (source, target))
    sys.stdout.write(f"{target}: {_size(after)} of weights, where {source} has {_size(before)}\n")
    sys.stdout.write(f'jaxgen generate "A list of colors: red, blue" --model {shlex.quote(str(target))}\n')


def _eval(options: argparse.Namespace) -> None:
    from jaxgen.integrations.harness import evaluate
    from jaxgen.integrations.lm_eval import JaxgenLM

    def load() -> JaxgenLM:
        directory = _locate(options)
        _keep_compiled(options)
        names = ("dtype", "load_in_4bit", "batch_size", "max_length", "strict")
        return JaxgenLM(directory, **{name: getattr(options, name) for name in names})

    names = ("num_fewshot", "limit", "apply_chat_template", "system_instruction")
    chosen = {**{name: getattr(options, name) for name in names}, **dict(options.set)}
    tasks = [name for name in options.tasks.split(",") if name]
    table = evaluate(load, tasks, include_path=options.include_path, output=options.output, options=chosen)
    sys.stdout.write(f"{table}\n")


def _bench(options: argparse.Namespace) -> None:
    from jaxgen import bench

    kinds, batches = bench.checked(options.kinds, options.batches, options.prompt_tokens, options.new_tokens)
    directory = _locate(options)
    sizes = {"prompt_tokens": options.prompt_tokens, "new_tokens": options.new_tokens}
    report = bench.measured(directory, kinds, batches, **sizes)
    told = {"model": "", **report} | {"model": options.model or "demo"}  # which stands first
    sys.stdout.write((json.dumps(told, indent=2) if options.json else bench.table(told)) + "\n")


def _serve(options: argparse.Namespace) -> None:
    for package in ("starlette", "uvicorn"):
        if importlib.util.find_spec(package) is None:
            raise JaxgenError(f'jaxgen serve needs {package}: pip install -e ".[serve]", which brings it')
    from jaxgen.convert.load import AutoModelForCausalLM
    from jaxgen.serve.server import Settings, checked_limits, serve
    from jaxgen.text.tokenizer import load_tokenizer

    key = options.api_key or os.environ.get("JAXGEN_API_KEY") or None
    settings = Settings(options.host, options.port, key, options.name, options.closing_time)
    limits = checked_limits(options.max_body, options.max_n, options.max_time, options.max_connections, options.records)
    directory = _locate(options)
    _keep_compiled(options)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=options.dtype, load_in_4bit=options.load_in_4bit)
    sizes = {name: getattr(options, name) for name in ("rows", "slots", "queue", "top_logprobs", "constraints")}
    serve(model, load_tokenizer(directory), settings, limits, **sizes)


def _size(count: int) -> str:
    return f"{count / 1e9:.2f} GB" if count >= 1e9 else f"{count / 1e6:.2f} MB"


_COMMANDS = {
    "generate": _generate,
    "batch": _batch,
    "chat": _chat,
    "replay": _replay,
    "inspect": _inspect,
    "convert": _convert,
    "eval": _eval,
    "bench": _bench,
    "serve": _serve,
}

if __name__ == "__main__":
    command()
