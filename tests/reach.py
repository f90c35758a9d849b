"""Whether the default tests reach every module: of each, at least one function has run. Otherwise they do not pass.

The default tests check every annotated call (`addopts` in pyproject.toml), so that the check itself sees which modules
are called. Only a run of all default tests is judged.
"""

import ast
import functools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# What runs in processes of its own, which tests start: nobody watches there.
ELSEWHERE = {"jaxgen.__main__", "jaxgen.convert.wheel", "jaxgen.constraints.automaton_process"}
ELSEWHERE |= {"jaxgen.text.template_process"}
# What needs a library that the default tests do without: tests/oracle runs it.
ELSEWHERE |= {"jaxgen.integrations.harness", "jaxgen.integrations.lm_eval", "jaxgen.integrations.tunix"}
ELSEWHERE |= {"jaxgen.batch.on_ray"}  # as tests/replicas does

reached: set[str] = set()  # modules, in this process


def checked(function: Callable[..., Any]) -> Callable[..., Any]:
    """beartype, as jaxtyping applies it to every function of the library; and the module is noted at each call."""
    from beartype import BeartypeConf, beartype

    check: Any = beartype(conf=BeartypeConf(is_pep484_tower=True))(function)
    module = function.__module__

    @functools.wraps(check)
    def noted(*args: Any, **kwargs: Any) -> Any:
        __tracebackhide__ = True
        reached.add(module)
        return check(*args, **kwargs)

    return noted


def modules() -> set[str]:
    """The modules of the library in which a function is defined that is checked."""
    named = {file: file.relative_to(ROOT).with_suffix("") for file in ROOT.glob("jaxgen/**/*.py")}
    named |= {file: "jaxgen" / file.relative_to(ROOT).with_suffix("") for file in ROOT.glob("convert/**/*.py")}
    return {
        ".".join(name.parts).removesuffix(".__init__")
        for file, name in named.items()
        if any(isinstance(node, ast.FunctionDef) for node in _checked_in(ast.parse(file.read_bytes())))
    }


def _checked_in(node: ast.AST) -> Iterator[ast.AST]:
    """What is below a node, but for what is marked `@no_type_check`, and what is there for type checkers only."""
    for child in ast.iter_child_nodes(node):
        said = [*getattr(child, "decorator_list", ()), *(child.bases if isinstance(child, ast.ClassDef) else ())]
        said += [child.test] if isinstance(child, ast.If) else []
        words = " ".join(map(ast.unparse, said))
        if not any(word in words for word in ("no_type_check", "Protocol", "TYPE_CHECKING")):
            yield child
            yield from _checked_in(child)


class Reach:
    """Brings together what all workers reached."""

    def __init__(self):
        self.missing: set[str] = set()

    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["reach"] = True

    def pytest_testnodedown(self, node: Any) -> None:
        reached.update(getattr(node, "workeroutput", {}).get("reach", ()))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        config: Any = session.config
        if hasattr(config, "workeroutput"):
            config.workeroutput["reach"] = sorted(reached)
        elif session.exitstatus == 0:
            self.missing = modules() - reached - ELSEWHERE
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if self.missing else session.exitstatus

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.missing:
            terminalreporter.section("reach")
            terminalreporter.line("No default test runs a function of: " + ", ".join(sorted(self.missing)))


def watched(config: Any) -> bool:
    """Whether all default tests are to run."""
    if hasattr(config, "workerinput"):
        return "reach" in config.workerinput
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    return everything and config.option.markexpr == "not slow" and bool(config.option.jaxtyping_packages)
