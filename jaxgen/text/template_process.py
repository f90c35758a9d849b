"""The program that renders chat templates for `template.py`: a template is a program, and this one may be ended."""

from collections.abc import Callable
from typing import Any

from jaxgen.bounded import answer_all


def renderer() -> Callable[..., dict[str, Any]]:
    """What writes a chat as text, of so many characters at most."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def render(characters: int, **request: Any) -> dict[str, Any]:
        try:
            text = render_jinja_template(**request)[0][0]
        except MemoryError:
            raise
        except Exception as error:
            return {"error": _said(error)}
        if len(text) > characters:
            return {"error": f"it writes {len(text)} characters, more than {characters}"}
        return {"text": text}

    return render


def _said(error: Exception) -> str:
    import jinja2

    text = f"{error!s:.500}"
    return text if isinstance(error, jinja2.TemplateError | ValueError) and text else f"{type(error).__name__}: {text}"


if __name__ == "__main__":
    answer_all(renderer)
