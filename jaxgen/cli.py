"""The command line: `jaxgen generate`, `chat`, `replay`, `inspect` and `convert`."""

import argparse
import contextlib
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from jaxgen.errors import JaxgenError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; returns 0, 1 if a replay differs, 2 for errors (a line on stderr), 130 for Ctrl-C."""
    options = _parser().parse_args(arguments)
    # Only what jaxgen says belongs on the terminal; transformers would remark that torch is not installed.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    try:
        code = options.run(options) or 0
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
    sys.stderr.write("jaxgen: " + " ".join(str(error).split()) + "\n")
    return 2


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage around it."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="jaxgen", description="Hugging Face generate for JAX.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    generate = commands.add_parser("generate", help="continue prompts", description="Continue prompts.")
    generate.set_defaults(run=_generate)
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue; none or '-': lines of stdin")
    generate.add_argument("--file", type=Path, help="read prompts from this file, one per line")
    _add_sampling(generate)
    generate.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    generate.add_argument("--record", type=Path, metavar="FILE", help="write what determined the text, for replay")
    output = generate.add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="print text as it is generated")
    output.add_argument("--json", action="store_true", help="print one JSON object per prompt and line")

    chat = commands.add_parser("chat", help="talk to a model", description="Talk to a model; /help says how.")
    chat.set_defaults(run=_chat)
    _add_sampling(chat)
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")

    replay = commands.add_parser(
        "replay",
        help="run a record again",
        description="Run a record again and say whether the same came out: exit 0 for the same tokens, 1 for others, "
        "2 if that cannot be said.",
    )
    replay.set_defaults(run=_replay)
    replay.add_argument("record", metavar="RECORD", type=Path, help="a file that generate --record wrote")
    replay.add_argument("--model", metavar="DIR_OR_ID", help="where the model is now, if it was a directory then")

    inspect = commands.add_parser("inspect", help="describe a checkpoint", description="Describe a checkpoint.")
    inspect.set_defaults(run=_inspect)
    inspect.add_argument("model", metavar="DIR_OR_ID")
    inspect.add_argument("--dtype", default="auto", help="as for generate: what the sizes are computed for")

    convert = commands.add_parser(
        "convert",
        help="write a checkpoint with int4 weights",
        description="Write a checkpoint with int4 weights, in compressed-tensors' format. Interrupted, it "
        "goes on where it was when it is started again.",
    )
    convert.set_defaults(run=_convert)
    convert.add_argument("source", metavar="SRC", help="checkpoint directory or hub id, not quantised")
    convert.add_argument("target", metavar="DST", type=Path, help="new directory")
    convert.add_argument("--bits", type=int, default=4, help="4 (default)")
    convert.add_argument(
        "--group-size", type=int, default=128, metavar="N", help="32, 64, 128 (default); -1: whole rows"
    )
    convert.add_argument("--method", default="rtn", help="rtn (default), gptq or autoround")
    convert.add_argument("--calibration", type=Path, metavar="FILE", help="text for gptq and autoround")
    convert.add_argument("--lm-head", action="store_true", help="quantise the output head too")
    return parser


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    """The options of every command that generates: the model, and how to choose tokens."""
    parser.add_argument("--model", metavar="DIR_OR_ID", help="checkpoint directory or hub id (default: the demo)")
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: the model's, or 20; 256 in a chat")
    parser.add_argument("--do-sample", action=argparse.BooleanOptionalAction, help="sample, or search greedily")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--seed", type=int, help="any int; the same seed gives the same text")


def _load(options: argparse.Namespace) -> tuple[Any, Any, dict[str, Any]]:
    """Model, tokenizer and the options of `generate`; a fresh seed is chosen here, and told, where one is needed."""
    from jaxgen import demo
    from jaxgen.convert.hub import locate
    from jaxgen.convert.load import AutoModelForCausalLM
    from jaxgen.generation.config import resolve
    from jaxgen.generation.sample import random_key
    from jaxgen.text.tokenizer import load_tokenizer

    directory = locate(options.model) if options.model else demo.path()
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=options.dtype)
    tokenizer = load_tokenizer(directory)
    names = ("max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p")
    settings = {name: value for name in names if (value := getattr(options, name)) is not None}
    settings["num_return_sequences"] = 1  # one text per prompt, whatever the checkpoint's own defaults say
    if options.seed is None and resolve(settings, None, model.generation_config).do_sample:
        options.seed = random_key(None, None)[1]
        sys.stderr.write(f"jaxgen: --seed {options.seed} gives this text again\n")
    return model, tokenizer, settings


def _generate(options: argparse.Namespace) -> None:
    if options.batch_size < 1:
        raise JaxgenError(f"--batch-size {options.batch_size} must be at least 1")
    if options.stream and options.record is not None:
        raise JaxgenError("--record and --stream exclude each other; the text is the same without --stream")
    if options.record is not None and not options.record.absolute().parent.is_dir():
        raise JaxgenError(f"--record {options.record}: there is no directory {options.record.parent}")
    from jaxgen.records.record import Recording

    prompts = _prompts(options)
    model, tokenizer, settings = _load(options)
    if options.stream:
        _stream(model, tokenizer, prompts, settings, options.seed)
        return
    recording = Recording(tokenizer)
    try:
        for prompt, completion, details in _complete(model, tokenizer, prompts, settings, options, recording):
            if options.json:
                line = {"prompt": prompt, "completion": completion, **details}
                sys.stdout.write(json.dumps(line, ensure_ascii=False) + "\n")
            else:
                sys.stdout.write(prompt + completion + "\n")
            sys.stdout.flush()
    finally:  # also what was generated before an error, Ctrl-C or the end of a pipe
        if options.record is not None and recording.entries:
            recording.record().save(options.record)


def _prompts(options: argparse.Namespace) -> list[str]:
    """The prompts, from --file, from the arguments, or from standard input."""
    if options.file is not None:
        if options.prompts:
            raise JaxgenError("prompts were given both as arguments and with --file; choose one")
        try:
            text = options.file.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise JaxgenError(f"--file {options.file}: cannot be read: {error}") from error
    elif options.prompts and options.prompts != ["-"]:
        return [_utf8(prompt) for prompt in options.prompts]
    else:
        try:
            text = sys.stdin.read()
        except UnicodeDecodeError as error:
            raise JaxgenError(f"standard input is not UTF-8 text: {error}") from error
    prompts = [_utf8(line.removesuffix("\r")) for line in text.split("\n") if line.strip()]
    if not prompts:
        raise JaxgenError("no prompts: give one as an argument, with --file, or on standard input")
    return prompts


def _utf8(prompt: str) -> str:
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise JaxgenError(f"prompt {prompt!r} is not UTF-8 text: {error}") from error
    return prompt


def _complete(
    model: Any,
    tokenizer: Any,
    prompts: list[str],
    settings: dict[str, Any],
    options: argparse.Namespace,
    recording: Any,
) -> Iterator[tuple[str, str, dict[str, Any]]]:
    """Each prompt with its continuation and details; row ids make a row's text independent of --batch-size.

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
            return_dict_in_generate=True,
            **settings,
        )
        if options.record is not None:
            recording.add(result)
        width = inputs["input_ids"].shape[1]
        for row, prompt in enumerate(batch):
            count = result.lengths[row]
            tokens = result.sequences[row, width : width + count].tolist()
            own = inputs["input_ids"][row][inputs["attention_mask"][row] == 1].tolist()
            yield prompt, continuation(tokenizer, own, tokens), {
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


def _chat(options: argparse.Namespace) -> None:
    from jaxgen.text.chat import Session, converse, lines_of

    system = None if options.system is None else _utf8(options.system)
    model, tokenizer, settings = _load(options)
    session = Session(model, tokenizer, system=system, seed=options.seed, **settings)
    if not sys.stdin.isatty():
        converse(session, lines_of(sys.stdin), sys.stdout)
        return
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (gives input() its line editing)
    sys.stdout.write("(/help says what there is besides asking)\n")
    converse(session, input, sys.stdout)
    sys.stdout.write("\n")


def _replay(options: argparse.Namespace) -> int:
    from jaxgen.records.replay import replay

    result = replay(options.record, options.model)
    sys.stdout.write(f"{result}\n")
    return result.exit_code


def _inspect(options: argparse.Namespace) -> None:
    from jaxgen.convert.inspect import describe

    sys.stdout.write(describe(options.model, dtype=options.dtype) + "\n")


def _convert(options: argparse.Namespace) -> None:
    from jaxgen.convert.convert import convert_checkpoint

    names = ("bits", "group_size", "method", "calibration", "lm_head")
    convert_checkpoint(options.source, options.target, **{name: getattr(options, name) for name in names})


if __name__ == "__main__":
    sys.exit(main())
