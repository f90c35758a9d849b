"""Tables of a dataclass's fields, from its source: each has its comment behind it, on its line."""

import ast
import dataclasses
import inspect
import io
import textwrap
import tokenize

_TO_TOOLS = ("pyright:", "type:", "noqa")


def fields(kind: type) -> list[tuple[str, str, str]]:
    """A dataclass's fields, with those that it inherits: name, annotation, and the comment behind them.

    >>> from jaxgen.generation.results.output import GenerateOutput
    >>> fields(GenerateOutput)[3]
    ('lengths', "Int[np.ndarray, ' R']", 'new tokens per row')
    """
    found = {}
    for base in reversed(kind.__mro__):
        if dataclasses.is_dataclass(base):
            found |= {name: (name, annotation, said) for name, annotation, said in _own(base)}
    return list(found.values())


def _own(kind: type) -> list[tuple[str, str, str]]:
    source = textwrap.dedent(inspect.getsource(kind))
    behind = {
        token.start[0]: token.string.lstrip("# ")
        for token in tokenize.generate_tokens(io.StringIO(source).readline)
        if token.type == tokenize.COMMENT and token.line[: token.start[1]].strip()
    }
    body = ast.parse(source).body[0].body  # pyright: ignore[reportAttributeAccessIssue]  # a class
    found = []
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            if ast.unparse(node.annotation).startswith("ClassVar"):
                continue
            said = behind.get(node.end_lineno or 0, "")
            said = "" if said.startswith(_TO_TOOLS) else said
            found.append((node.target.id, ast.unparse(node.annotation), said))
    return found
