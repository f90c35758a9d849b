"""The program that renders chat templates for `template.py`: a JSON line in, a JSON line out, until the input ends.

It runs alone, because a template is a program, and this one may be killed.
"""

import json
import os
import signal
import sys
from typing import Any

_MEMORY = 1 << 30  # bytes that a template may take, beyond what this program has to begin with


def main() -> None:
    """Answer until standard input ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C in a terminal means an answer, and reaches every program
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what is printed is no answer
    from transformers.utils.chat_template_utils import render_jinja_template

    _limit_memory()
    for line in sys.stdin.buffer:
        request = json.loads(line)
        seconds, characters = request.pop("seconds"), request.pop("characters")
        _end_after(seconds)
        try:
            text = render_jinja_template(**request)[0][0]
            if len(text) > characters:
                raise ValueError(f"it writes {len(text)} characters, more than {characters}")
            answer = {"text": text}
        except MemoryError:
            answer = {"error": f"it takes more than {_MEMORY >> 20} MB of memory"}
        except Exception as error:
            answer = {"error": _said(error)}
        _end_after(0)
        answers.write(json.dumps(answer).encode() + b"\n")
        answers.flush()


def _said(error: Exception) -> str:
    import jinja2

    text = f"{error!s:.500}"
    return text if isinstance(error, jinja2.TemplateError | ValueError) and text else f"{type(error).__name__}: {text}"


def _limit_memory() -> None:
    try:
        import resource

        with open("/proc/self/statm", encoding="ascii") as file:
            now = int(file.read().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (now + _MEMORY, now + _MEMORY))
    except (ImportError, OSError, ValueError):  # not Linux: the time is limited all the same
        pass


def _end_after(seconds: Any) -> None:
    """Let the system end this program after so much time of its processor; 0: never."""
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


if __name__ == "__main__":
    main()
