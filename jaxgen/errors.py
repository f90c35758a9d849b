"""What jaxgen raises: one base class, so that a caller can catch everything jaxgen says on purpose."""

_MOST_SHOWN, _LONGEST = 30, 600
_LONGEST_VALUE, _LONGEST_MESSAGE = 80, 20_000
NO_REMOTE_CODE = (
    "trust_remote_code=True: jaxgen never runs code of a repository, which could do anything on this machine; what it "
    "reads it implements itself, so leave the option out"
)


class JaxgenError(ValueError):
    """Something the caller can mend: the message names the field, the row, the value and the limit."""

    def __init__(self, message: str):
        # It may quote a file of others; nobody reads more.
        super().__init__(message if len(message) <= _LONGEST_MESSAGE else f"{message[:_LONGEST_MESSAGE]}...")


class UnsupportedError(JaxgenError):
    """A model, file or option that exists in transformers and that jaxgen does not support (yet)."""


class CheckpointError(JaxgenError):
    """A checkpoint on disk is damaged, incomplete or not what its config says.

    `problems` lists all of it, and the message as much as can be read.
    """

    def __init__(self, where: str, problems: list[str]):
        self.problems = list(problems)
        super().__init__(f"{where}: {listed(self.problems)}")


class EngineFullError(JaxgenError):
    """An engine's queue holds as many requests as it takes: come again later."""


class EngineClosedError(JaxgenError):
    """The engine has ended, or broke down, and carries out nothing any more."""


class NonFiniteLogitsError(JaxgenError):
    """The model produced logits that are not finite; `rows` and `steps` say where."""

    def __init__(self, rows: list[int], steps: list[int]):
        self.rows, self.steps = rows, steps
        places = ", ".join(f"row {row} at step {step}" for row, step in zip(rows, steps, strict=True))
        super().__init__(
            f"logits are not finite in {places}; something overflowed, in the model or by an extreme option. "
            "Load the model with dtype='float32' to see whether the dtype is the cause."
        )


def listed(problems: list[str]) -> str:
    """Problems of a file as one text, which is no longer than people read, whatever the file holds."""
    shown = [text if len(text) <= _LONGEST else f"{text[:_LONGEST]}..." for text in problems[:_MOST_SHOWN]]
    more = len(problems) - len(shown)
    return "; ".join(shown) + (f"; and {more} more" if more else "")


def shown(value: object) -> str:
    """A value of the caller's as a message can show it: on one line, cut short, whatever it is."""
    try:
        text = repr(value)
    except Exception:  # an int of more digits than Python prints, for one
        text = f"<{type(value).__name__} that cannot be printed>"
    text = " ".join(text.split("\n"))
    return text if len(text) <= _LONGEST_VALUE else f"{text[:_LONGEST_VALUE]}..."
