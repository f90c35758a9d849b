"""A conversation with a model: the turns, and the terminal around them."""

import itertools
import json
import os
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import jax

from jaxgen.errors import JaxgenError
from jaxgen.generation.choosing.sample import random_key
from jaxgen.generation.prompts.contexts import context_of
from jaxgen.generation.prompts.past_key_values import PastKeyValues
from jaxgen.text.inputs import Messages, encode
from jaxgen.text.stream import TextStream
from jaxgen.text.utf8 import decode_utf8

DEFAULT_NEW_TOKENS = 256  # 20, as generate has it, is no answer
HELP = """\
/reset      forget the conversation
/seed N     draw from seed N from now on
/save FILE  write the conversation as JSON
/help       say this
/exit       end (or Ctrl-D); Ctrl-C stops an answer
"""


class Session:
    """The state of a chat: its messages, its seed, and what the model has read already.

    `options` are those of `model.generate`. A turn's draws depend on the seed and on which turn it is, so the same
    seed and the same questions give the same conversation again.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, system: str | None = None, seed: int | None = None, **options: Any
    ):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.seed = random_key(None, None)[1] if seed is None else seed
        self._system: Messages = [] if system is None else [{"role": "system", "content": system}]
        self.messages: Messages = []
        self._past: PastKeyValues | None = None
        self.reset()

    def reset(self) -> None:
        """Forget everything but the system prompt and the seed."""
        self.messages, self._past = list(self._system), None

    def ask(self, question: str) -> Generator[str, None, None]:
        """Yield the answer piece by piece. The question and what was yielded of the answer become messages.

        That holds if the caller stops in the middle, too. A turn without any answer leaves no trace. Raises
        `JaxgenError` as `generate` does, and where the conversation fills the model's context.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        stream, answer = self._start(messages), ""
        try:
            for piece in stream:
                answer += piece
                yield piece
        finally:
            stream.close()
            self._past = stream.past_key_values  # None where the device was interrupted: then all is read again
            if answer:
                self.messages = [*messages, {"role": "assistant", "content": answer}]

    def _start(self, messages: Messages) -> TextStream:
        ids = encode(self.tokenizer, messages)["input_ids"]
        context = context_of(self.model.config, len(ids))
        room = context - len(ids)
        if room < 1:
            raise JaxgenError(
                f"the conversation has {len(ids)} tokens, the model's context {context}; /reset starts anew"
            )
        settings = {"num_return_sequences": 1, **self.options}
        asked = settings.get("max_new_tokens") or self.model.generation_config.max_new_tokens or DEFAULT_NEW_TOKENS
        # The last turns get what is left of the context, rather than nothing.
        settings["max_new_tokens"] = min(asked, room)
        return TextStream(
            self.model,
            self.tokenizer,
            [ids],
            single=True,
            keep_past=True,
            past_key_values=self._past,
            seed=self.seed,
            row_ids=[len(messages)],
            **settings,
        )

    def save(self, path: str | Path) -> None:
        """Write the messages as JSON; a file of that name is replaced as a whole, or not at all.

        Raises `JaxgenError` for a name that cannot be one of a file, and where nothing can be written.
        """
        text = json.dumps(self.messages, indent=2, ensure_ascii=False) + "\n"
        try:
            path = Path(path).expanduser()
            aside = path.with_name(f".{path.name}.{os.getpid()}")
            try:
                aside.write_text(text, encoding="utf-8")
                aside.replace(path)
            except OSError:
                aside.unlink(missing_ok=True)
                raise
        except (OSError, ValueError, RuntimeError) as error:  # the last: no such user's home
            raise JaxgenError(f"{path} cannot be written: {error}") from error


# Where questions come from: shows a prompt, returns a line; EOFError at the end, KeyboardInterrupt for Ctrl-C.
Reader = Callable[[str], str]


def lines_of(source: Any) -> Reader:
    """Questions from a stream of bytes or text that is no terminal: nothing is shown before them."""
    number = itertools.count(1)

    def read(_prompt: str) -> str:
        line = source.readline()
        if not line:
            raise EOFError
        return line if isinstance(line, str) else decode_utf8(line, "the input", next(number))

    return read


def converse(session: Session, read: Reader, output: Any) -> None:
    """Ask and answer until /exit or the end of the input; errors are told in a line, and the chat goes on."""
    while True:
        try:
            line = read("> ").strip()
        except EOFError:
            return
        except UnicodeDecodeError as error:
            raise JaxgenError(f"the input is not UTF-8 text: {error}") from error
        except KeyboardInterrupt:
            output.write("\n(/exit or Ctrl-D ends)\n")
            continue
        if line == "/exit":
            return
        try:
            if line.startswith("/"):
                output.write(_command(session, line))
            elif line:
                _answer(session, line, output)
        except (JaxgenError, jax.errors.JaxRuntimeError) as error:
            output.write(f"({' '.join(str(error).split())})\n")
        output.flush()


def _answer(session: Session, question: str, output: Any) -> None:
    pieces = session.ask(question)
    try:
        for piece in pieces:
            output.write(piece)
            output.flush()
        output.write("\n")
    except KeyboardInterrupt:  # the answer, not the program
        output.write(" (stopped)\n")
    finally:
        pieces.close()  # what there is of the answer becomes a message now


def _command(session: Session, line: str) -> str:
    """Do what a line that begins with a slash asks for; what to say about it."""
    name, _, argument = line.partition(" ")
    argument = argument.strip()
    if name == "/help" and not argument:
        return HELP
    if name == "/reset" and not argument:
        session.reset()
        return "(forgotten)\n"
    if name == "/seed" and argument:
        try:
            session.seed = int(argument)
        except ValueError as error:
            raise JaxgenError(f"/seed {argument:.80}: not an int") from error
        return f"(seed {session.seed})\n"
    if name == "/save" and argument:
        session.save(argument)
        return f"({len(session.messages)} messages in {argument})\n"
    if usage := next((help for help in HELP.splitlines() if help.split()[0] == name), None):
        raise JaxgenError(f"{line:.80}: usage: {usage.split('  ')[0]}")
    raise JaxgenError(f"{line:.80}: no such command; /help lists them")
