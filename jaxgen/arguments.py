"""What may stand on the command line: the commands, their options, and how these become options of `generate`."""

import argparse
import difflib
import json
from pathlib import Path
from typing import Any, NoReturn

import jaxgen
from jaxgen.errors import JaxgenError

# Options of `generate` that have a name of their own on the command line.
NAMED = (
    "max_new_tokens", "do_sample", "temperature", "top_k", "top_p", "min_p", "repetition_penalty", "num_beams",
    "stop_strings",
)  # fmt: skip
# Options that decide what `generate` returns, which the commands decide themselves.
_RETURNED = ("num_return_sequences", "return_dict_in_generate", "top_logprobs")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage around it."""

    def error(self, message: str) -> NoReturn:
        """Exit with 2."""
        self.exit(2, f"{self.prog}: {message} (see {self.prog} --help)\n")


def parser() -> Parser:
    """The parser of every command; `command` of what it returns is the command's name."""
    parser = Parser(prog="jaxgen", description="Hugging Face generate for JAX.")
    parser.add_argument("--version", action="version", version=f"jaxgen {jaxgen.__version__}")
    commands = parser.add_subparsers(required=True, metavar="COMMAND", dest="command")

    generate = commands.add_parser("generate", help="continue prompts", description="Continue prompts.")
    generate.add_argument("prompts", nargs="*", metavar="PROMPT", help="text to continue; none or '-': lines of stdin")
    generate.add_argument("--file", type=Path, help="read prompts from this file, one per line")
    _add_generating(generate)
    generate.add_argument("--batch-size", type=int, default=8, metavar="N", help="prompts at a time (default: 8)")
    generate.add_argument("--record", type=Path, metavar="FILE", help="write what determined the text, for replay")
    output = generate.add_mutually_exclusive_group()
    output.add_argument("--stream", action="store_true", help="print text as it is generated")
    output.add_argument(
        "--json",
        action="store_true",
        help="print one JSON object per prompt and line; its index counts the lines of the input from 0",
    )

    chat = commands.add_parser("chat", help="talk to a model", description="Talk to a model; /help says how.")
    _add_generating(chat)
    chat.add_argument("--system", metavar="TEXT", help="what the model is told before the conversation")

    replay = commands.add_parser(
        "replay",
        help="run a record again",
        description="Run a record again and say whether the same came out: exit 0 for the same tokens, 1 for others, "
        "2 if that cannot be said.",
    )
    replay.add_argument("record", metavar="RECORD", type=Path, help="a file that generate --record wrote")
    replay.add_argument("--model", metavar="DIR_OR_ID", help="where the model is now, if it was a directory then")
    replay.add_argument("--load-model", action="store_true", help="load the hub's model that the record names")
    _add_compile_cache(replay)

    inspect = commands.add_parser("inspect", help="describe a checkpoint", description="Describe a checkpoint.")
    inspect.add_argument("model", metavar="DIR_OR_ID")
    _add_revision(inspect)
    inspect.add_argument("--dtype", default="auto", help="as for generate: what the sizes are computed for")
    inspect.add_argument("--devices", type=int, metavar="N", help="what each of so many has, in every layout")
    inspect.add_argument(
        "--memory", type=float, metavar="GB", help="of each of --devices (default: what a GPU here has)"
    )

    _add_batch(commands)
    _add_convert(commands)
    _add_eval(commands)
    _add_bench(commands)
    _add_serve(commands)
    return parser


def _add_batch(commands: Any) -> None:
    batch = commands.add_parser(
        "batch",
        help="continue many prompts of a file",
        description="Continue the rows of a file, in parts of a directory. Started again after whatever stopped it, it "
        "goes on with what is missing. Exit 1 says that some rows are in errors.jsonl.",
    )
    batch.add_argument(
        "input",
        metavar="FILE",
        type=Path,
        help=".jsonl, .csv or .parquet: prompt or messages, and perhaps id and options",
    )
    batch.add_argument("--output", required=True, type=Path, metavar="DIR", help="a new directory, or that of this run")
    batch.add_argument("--format", choices=("jsonl", "parquet"), default="jsonl", help="of the parts (default: jsonl)")
    batch.add_argument("--logprobs", action="store_true", help="write the log-probability of each token too")
    batch.add_argument("--batch-size", type=int, default=32, metavar="N", help="rows at a time (default: 32)")
    batch.add_argument("--engine", choices=("local", "ray"), default="local", help="where it runs (default: local)")
    batch.add_argument("--workers", type=int, default=1, metavar="N", help="on Ray: models at a time (default: 1)")
    batch.add_argument("--part-rows", type=int, default=1000, metavar="N", help="rows of a part (default: 1000)")
    _add_generating(batch)


def _add_bench(commands: Any) -> None:
    bench = commands.add_parser(
        "bench", help="measure speed and memory", description="Measure loading, generating and memory on this machine."
    )
    bench.add_argument("--model", metavar="DIR_OR_ID", help="checkpoint directory or hub id (default: the demo)")
    _add_revision(bench)
    bench.add_argument(
        "--kinds", default="float32,bfloat16,int4", metavar="K,K", help="default: %(default)s; or float16"
    )
    bench.add_argument("--batches", default="1,2,4,8,16,32", metavar="N,N", help="rows (default: %(default)s)")
    bench.add_argument("--prompt-tokens", type=int, default=64, metavar="N", help="of each row (default: 64)")
    bench.add_argument("--new-tokens", type=int, default=64, metavar="N", help="of each row (default: 64)")
    bench.add_argument("--json", action="store_true", help="print a JSON object in place of the table")


def _add_eval(commands: Any) -> None:
    evaluate = commands.add_parser(
        "eval", help="run tasks of lm-eval", description="Run tasks of EleutherAI's lm-evaluation-harness."
    )
    _add_loading(evaluate)
    evaluate.add_argument("--tasks", required=True, metavar="T,T", help="their names, separated by commas")
    evaluate.add_argument("--include-path", type=Path, metavar="DIR", help="a directory with more tasks")
    evaluate.add_argument("--num-fewshot", type=int, metavar="N", help="examples before each question")
    evaluate.add_argument("--limit", type=float, metavar="N", help="the first N questions of each; below 1: a share")
    evaluate.add_argument("--batch-size", default="8", metavar="N", help="requests at a time (default: 8), or auto")
    evaluate.add_argument("--max-length", type=int, metavar="N", help="the longest context (default: the model's)")
    evaluate.add_argument("--apply-chat-template", action="store_true", help="ask as in a chat")
    evaluate.add_argument("--system-instruction", metavar="TEXT", help="what the model is told before each question")
    evaluate.add_argument("--strict", action="store_true", help="nothing depends on --batch-size, which is at most 8")
    evaluate.add_argument("--output", type=Path, metavar="FILE", help="write all results and answers, as JSON")
    _add_set(evaluate, "any other option of lm-eval's simple_evaluate, such as bootstrap_iters=0")
    _add_compile_cache(evaluate)


def _add_serve(commands: Any) -> None:
    serve = commands.add_parser(
        "serve",
        help="answer requests over HTTP",
        description="Answer requests over HTTP, as OpenAI's and text-generation-inference's clients send them; a page "
        "to chat is at /.",
    )
    serve.add_argument("model", nargs="?", metavar="DIR_OR_ID", help="checkpoint or hub id (default: the demo)")
    _add_kind(serve)
    serve.add_argument("--name", help="what clients call the model (default: its hub id, or its directory's name)")
    serve.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine only)")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    serve.add_argument(
        "--api-key", metavar="KEY", help="what clients must bring (default: the environment's JAXGEN_API_KEY, or none)"
    )
    serve.add_argument("--rows", type=int, default=32, metavar="N", help="requests at a time (default: 32)")
    serve.add_argument(
        "--slots", type=int, metavar="N", help="tokens of each, prompt and answer (default: the context, at most 4096)"
    )
    serve.add_argument("--queue", type=int, default=1024, metavar="N", help="requests that may wait (default: 1024)")
    serve.add_argument("--top-logprobs", type=int, default=20, metavar="N", help="alternatives per token (default: 20)")
    serve.add_argument(
        "--constraints",
        type=_room,
        default=(1024, 384),
        metavar="S,C",
        help="room of each row for a constraint: states and classes of tokens (default: 1024,384); none: for none",
    )
    serve.add_argument("--max-n", type=int, default=16, metavar="N", help="the most of `n` in a request (default: 16)")
    serve.add_argument("--max-body", type=int, default=4_000_000, metavar="BYTES", help="default: 4000000")
    serve.add_argument("--max-connections", type=int, default=512, metavar="N", help="default: 512")
    serve.add_argument("--max-time", type=float, default=600, metavar="S", help="seconds per request (default: 600)")
    serve.add_argument(
        "--records",
        type=int,
        default=1_000_000,
        metavar="N",
        help="keep the last answers, of so many tokens, so that they can be recorded (default: 1000000; 0: none)",
    )
    serve.add_argument(
        "--closing-time", type=float, default=30, metavar="S", help="seconds to finish after a signal (default: 30)"
    )
    _add_compile_cache(serve)


def _add_convert(commands: Any) -> None:
    convert = commands.add_parser(
        "convert",
        help="write a checkpoint with int4 weights",
        description="Write a checkpoint with int4 weights, in compressed-tensors' format. Interrupted, it "
        "goes on where it was when it is started again.",
    )
    convert.add_argument("model", metavar="SRC", help="checkpoint directory or hub id, not quantised")
    convert.add_argument("target", metavar="DST", type=Path, help="new directory")
    _add_revision(convert)
    convert.add_argument("--bits", type=int, default=4, help="4 (default)")
    convert.add_argument(
        "--group-size", type=int, default=128, metavar="N", help="32, 64, 128 (default); -1: whole rows"
    )
    convert.add_argument("--method", default="rtn", help="rtn (default), gptq or autoround")
    convert.add_argument("--calibration", type=Path, metavar="FILE", help="text for gptq and autoround")
    convert.add_argument("--lm-head", action="store_true", help="quantise the output head too")
    _add_compile_cache(convert)


def _add_generating(parser: argparse.ArgumentParser) -> None:
    """The options of every command that generates: the model, and how to choose tokens."""
    _add_loading(parser)
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="default: the model's, or 20; 256 in a chat")
    parser.add_argument("--do-sample", action=argparse.BooleanOptionalAction, help="sample, or search greedily")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-k", type=int)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--min-p", type=float)
    parser.add_argument("--repetition-penalty", type=float)
    parser.add_argument("--num-beams", type=int, metavar="N", help="search with this many beams")
    parser.add_argument(
        "--stop", action="append", dest="stop_strings", metavar="TEXT", help="end a text with this; may be repeated"
    )
    shape = parser.add_mutually_exclusive_group()
    shape.add_argument("--regex", metavar="PATTERN", help="every text matches this, from its beginning to its end")
    shape.add_argument("--choice", action="append", metavar="TEXT", help="every text is one of these; repeat it")
    shape.add_argument("--json-schema", type=Path, metavar="FILE", help="every text is JSON, valid by this schema")
    shape.add_argument("--grammar", type=Path, metavar="FILE", help="every text is one that this makes: .lark or .gbnf")
    parser.add_argument("--seed", type=int, help="any int; the same seed gives the same text")
    _add_set(parser, "any other option of generate, such as no_repeat_ngram_size=3")
    _add_compile_cache(parser)


def _add_loading(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--model", metavar="DIR_OR_ID", help="checkpoint directory or hub id (default: the demo)")
    _add_kind(parser)


def _add_kind(parser: argparse.ArgumentParser) -> None:
    _add_revision(parser)
    parser.add_argument("--dtype", default="auto", help="auto, float32, bfloat16 or float16 (default: auto)")
    parser.add_argument("--load-in-4bit", action="store_true", help="quantise the linear layers while loading")


def _add_set(parser: argparse.ArgumentParser, what: str) -> None:
    parser.add_argument(
        "--set",
        action="append",
        type=_assignment,
        default=[],
        metavar="NAME=VALUE",
        help=f"{what}; values as in JSON; may be repeated",
    )


def _add_revision(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--revision", metavar="REV", help="branch, tag or commit of a hub id (default: main)")


def _add_compile_cache(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--no-compile-cache",
        action="store_true",
        help="compile anew, and keep nothing of it (otherwise in ~/.cache/jaxgen/compiled)",
    )


def _room(text: str) -> tuple[int, int] | None:
    """Two numbers, or none."""
    if text == "none":
        return None
    numbers = text.split(",")
    if len(numbers) != 2 or not all(number.isascii() and number.isdigit() for number in numbers):
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not STATES,CLASSES, such as 1024,384, and not none")
    return int(numbers[0]), int(numbers[1])


def _assignment(text: str) -> tuple[str, Any]:
    """The name and the value of NAME=VALUE: JSON, Python's True, False and None, or else the text as it stands."""
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text[:80]!r} is not NAME=VALUE")
    words = {"True": True, "False": False, "None": None}
    if value in words:
        return name, words[value]
    try:
        return name, json.loads(value)
    except (ValueError, RecursionError):
        return name, value


def settings_of(options: argparse.Namespace) -> dict[str, Any]:
    """The options of `generate` that were given; raises `JaxgenError` for one that `--set` cannot give."""
    from jaxgen.generation.options.refused import REFUSED
    from jaxgen.generation.options.table import OPTIONS

    settings = {name: value for name in NAMED if (value := getattr(options, name)) is not None}
    if (constraint := _constraint_of(options)) is not None:
        settings["constraint"] = constraint
    known = {*OPTIONS, *REFUSED, "strict"}
    for name, value in options.set:
        if name not in known:
            nearest = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {nearest[0]}?" if nearest else ""
            raise JaxgenError(f"--set {name}=...: generate has no such option{hint}")
        if name in _RETURNED or name.startswith("output_"):
            raise JaxgenError(f"--set {name}=...: this command prints one text per prompt; use it in Python")
        if name in settings:
            raise JaxgenError(f"--set {name}=...: {name} is given twice")
        settings[name] = value
    return settings


def _constraint_of(options: argparse.Namespace) -> Any:
    """What the texts must look like, if anything was said of it."""
    from jaxgen.constraints.patterns import choice, json_schema, regex
    from jaxgen.files import read_json

    if options.regex is not None:
        return regex(options.regex)
    if options.choice is not None:
        return choice(options.choice)
    if options.json_schema is not None:
        return json_schema(read_json(options.json_schema, any_names=True))
    return None if options.grammar is None else _grammar_in(options.grammar)


def _grammar_in(path: Path) -> Any:
    from jaxgen.constraints.grammars import grammar
    from jaxgen.files import read_bytes

    syntax = path.suffix[1:]
    if syntax not in ("lark", "gbnf"):
        raise JaxgenError(f"--grammar {path!s:.200}: the name must end with .lark or .gbnf, which says what it holds")
    try:
        return grammar(read_bytes(path).decode(), syntax)
    except (OSError, UnicodeDecodeError) as error:
        raise JaxgenError(f"--grammar {path!s:.200}: it cannot be read: {error}") from error
