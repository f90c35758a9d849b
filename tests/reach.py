"""Whether the default tests reach every module: of each, at least one function has run. Otherwise they do not pass.

Checked where Python can watch for nothing, from 3.12 on, and in runs of all default tests.
"""

import ast
import inspect
import sys
from pathlib import Path
from types import CodeType
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
# What runs in processes of its own, which tests start: nobody watches there. And protocols, whose methods never run.
ELSEWHERE = {
    "jaxgen/__main__.py", "jaxgen/convert/wheel.py", "jaxgen/generation/options/typed.py", "jaxgen/models/protocol.py",
    "jaxgen/text/template_process.py",
}  # fmt: skip


def modules() -> set[str]:
    """The files of the library in which a function is defined."""
    files = [*ROOT.glob("jaxgen/**/*.py"), *ROOT.glob("convert/**/*.py")]
    functions = ast.FunctionDef | ast.AsyncFunctionDef
    defining = [file for file in files if any(isinstance(n, functions) for n in ast.walk(ast.parse(file.read_bytes())))]
    return {file.relative_to(ROOT).as_posix() for file in defining}


class Reach:
    """Notes the files whose functions run, over all workers."""

    def __init__(self):
        self.files: set[str] = set()
        self.missing: set[str] = set()
        watch: Any = sys.monitoring  # pyright: ignore[reportAttributeAccessIssue]
        tool = next(tool for tool in range(6) if watch.get_tool(tool) is None)
        watch.use_tool_id(tool, "reach")

        def started(code: CodeType, offset: int) -> Any:
            if code.co_flags & inspect.CO_OPTIMIZED:  # a function, not the body of a module or a class
                self.files.add(code.co_filename)
            return watch.DISABLE  # once is enough

        watch.register_callback(tool, watch.events.PY_START, started)
        watch.set_events(tool, watch.events.PY_START)

    def pytest_configure_node(self, node: Any) -> None:
        node.workerinput["reach"] = True

    def pytest_testnodedown(self, node: Any) -> None:
        self.files |= set(getattr(node, "workeroutput", {}).get("reach", ()))

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session: pytest.Session) -> None:
        config: Any = session.config
        if hasattr(config, "workeroutput"):
            config.workeroutput["reach"] = sorted(file for file in self.files if file.startswith(str(ROOT)))
        elif session.exitstatus == 0:
            reached = {Path(file).relative_to(ROOT).as_posix() for file in self.files if file.startswith(str(ROOT))}
            self.missing = modules() - reached - ELSEWHERE
            session.exitstatus = pytest.ExitCode.TESTS_FAILED if self.missing else session.exitstatus

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        if self.missing:
            terminalreporter.section("reach")
            terminalreporter.line("No default test runs a function of: " + ", ".join(sorted(self.missing)))


def watched(config: Any) -> bool:
    """Whether all default tests are to run, and in a Python that can watch."""
    if hasattr(config, "workerinput"):
        return "reach" in config.workerinput
    everything = config.args_source is pytest.Config.ArgsSource.TESTPATHS and not config.option.keyword
    return sys.version_info >= (3, 12) and everything and config.option.markexpr == "not slow"
