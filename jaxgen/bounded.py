"""Work that may take all the time and memory there is, done by a program beside this one, which may be ended.

A JSON line in, a JSON line out, until the input ends.
"""

import atexit
import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jaxgen.errors import JaxgenError

MEMORY = 1 << 30  # bytes that an answer may take, beyond what the program has to begin with
_WAIT = 60  # seconds by the clock, on a busy machine
_TOO_LARGE = {"error": f"it takes more than {MEMORY >> 20} MB of memory"}


class Program:
    """A program of ours that answers requests, started with the first, and anew where it has ended."""

    def __init__(self, file: Path):
        self._file, self._lock = file, threading.Lock()
        self._running: _Process | None = None
        atexit.register(self.end)

    def ask(self, request: Mapping[str, Any], seconds: float, default: Callable[[Any], Any] | None = None) -> Any:
        """The answer to a request, which may take so many seconds of a processor: a dict, with an `error` if it failed.

        `default` is that of `json.dumps`. Raises `JaxgenError` if the program cannot be started.
        """
        line = json.dumps({**request, "seconds": seconds}, default=default).encode() + b"\n"
        with self._lock:
            if self._running is None or not self._running.lives:
                self.end()
                self._running = _Process(self._file)
            return self._running.ask(line, seconds)

    def end(self) -> None:
        """End it; the next request starts another."""
        process, self._running = self._running, None
        if process is not None and process.pid == os.getpid():
            process.end()


class _Process:
    def __init__(self, file: Path):
        environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error"}
        environment["PYTHONPATH"] = os.pathsep.join(path for path in sys.path if path)
        self.pid = os.getpid()  # a forked child must not talk to its parent's
        try:
            self._popen = subprocess.Popen(
                [sys.executable, "-P", str(file)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                env=environment,
            )
        except OSError as error:
            raise JaxgenError(f"the program {file.name} cannot be started: {error}") from error

    @property
    def lives(self) -> bool:
        return self.pid == os.getpid() and self._popen.poll() is None

    def ask(self, line: bytes, seconds: float) -> Any:
        """The answer, also where the program is ended by the request."""
        assert self._popen.stdin is not None and self._popen.stdout is not None
        timer = threading.Timer(_WAIT, self._popen.kill)
        timer.start()
        try:
            self._popen.stdin.write(line)
            self._popen.stdin.flush()
            answer = self._popen.stdout.readline()
        except BrokenPipeError:
            answer = b""
        except BaseException:  # Ctrl-C: its answer would be taken for the next one's
            self._popen.kill()
            self.end()
            raise
        finally:
            timer.cancel()
        if answer.endswith(b"\n"):
            return json.loads(answer)
        status = self.end()
        if status == -getattr(signal, "SIGPROF", 0):
            return {"error": f"it takes more than {seconds} seconds"}
        if status == -signal.SIGABRT:  # of a library that was given no more
            return _TOO_LARGE
        return {"error": f"it ends the program that reads it, with exit status {status}"}

    def end(self) -> int:
        """End the program, and say how it ended."""
        with contextlib.suppress(OSError):
            self._popen.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]  (a pipe)
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._popen.wait(1)
        self._popen.kill()
        with self._popen:  # closes the pipes, and waits
            pass
        return self._popen.returncode


def answer_all(prepare: Callable[[], Callable[..., dict[str, Any]]]) -> None:
    """The other side: answer requests until standard input ends, by what `prepare` imports and returns.

    What that raises, `MemoryError` apart, is none of its answers: it ends the program.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal means an answer, and reaches every program
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    work = prepare()
    _limit_memory()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        _end_after(request.pop("seconds"))
        try:
            answer = work(**request)
        except MemoryError:
            answer = _TOO_LARGE
        _end_after(0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _limit_memory() -> None:
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, now + MEMORY))
    except (ImportError, OSError, ValueError):  # not Linux: the time is limited all the same
        pass


def _end_after(seconds: float) -> None:
    """Let the system end this program after so much time of its processor; 0: never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)
