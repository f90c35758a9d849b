"""The commands and the Python of the pages, as they stand there, against a server; and what is answered."""

import json
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.clients.conftest import Expected
from tests.lm_eval_tasks import datasets_in
from tests.pages import ADDRESS, DOCS, README, run_blocks

pytestmark = pytest.mark.slow

SERVE = DOCS / "howto" / "serve.md"
# From `curl` to the end of the line on which its quotes are closed.
COMMAND = re.compile(r"^    (curl (?:'[^']*'|[^'\n])*)$", re.M)
HELICOPTERS = "How many helicopters can a human eat in one sitting?"


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # examples leave their connections open
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the libraries that lm-eval brings along
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("name", ["serve", "evaluation"])
def test_the_pages_show_what_happens(
    url: str, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.chdir(tmp_path)
    page = DOCS / "howto" / f"{name}.md"
    with datasets_in(tmp_path):
        assert run_blocks(page, capsys, url) == page.read_text().count("```python\n") >= 2


def streamed(text: str) -> list[dict[str, Any]]:
    *events, last = [line.removeprefix("data: ") for line in text.splitlines() if line]
    assert last == "[DONE]"
    return [json.loads(event) for event in events]


def test_curl_as_users_type_it(url: str, expected: Expected, tmp_path: Path):
    commands = [command for page in (README, SERVE) for command in COMMAND.findall(page.read_text())]
    answers: dict[str, str] = {}

    def run(command: str) -> None:
        assert ADDRESS in command
        command = command.replace(ADDRESS, url)
        if "/v1/records/" in command:  # of an answer that was given before
            command = command.replace("chatcmpl-...", streamed(answers["/v1/chat/completions"])[0]["id"])
        done = subprocess.run(["bash", "-ec", command], cwd=tmp_path, capture_output=True, text=True, check=True)
        answers[re.findall(re.escape(url) + r"(\S+?)(?:chatcmpl-\S*)?(?=\s|$)", command)[0]] = done.stdout

    for command in commands:
        run(command)
    counted = expected("1, 2, 3", max_new_tokens=8)[0][0]
    chat = expected([{"role": "user", "content": HELICOPTERS}], max_new_tokens=200, seed=7)[0][0]

    def said(answer: str) -> str:
        return "".join(event["choices"][0]["delta"].get("content", "") for event in streamed(answer))

    checks: dict[str, Callable[[str], bool]] = {
        "/ready": lambda answer: json.loads(answer) == {"status": "ready"},
        "/v1/models": lambda answer: json.loads(answer)["data"][0]["id"] == "demo",
        "/v1/completions": lambda answer: json.loads(answer)["choices"][0]["text"] == counted,
        "/v1/chat/completions": lambda answer: said(answer) == chat,
        "/tokenize": lambda answer: json.loads(answer)["count"] == 8,
        "/generate": lambda answer: json.loads(answer)["generated_text"] == counted,
        "/v1/records/": lambda answer: "generations" in json.loads((tmp_path / "run.json").read_text()),
    }
    assert answers.keys() == checks.keys()
    for path, check in checks.items():
        assert check(answers[path]), (path, answers[path])
