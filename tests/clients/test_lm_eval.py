"""lm-eval through a server: the same number for every request as `JaxgenLM`, and so as lm-eval's own `hf` model.

That `JaxgenLM` has the numbers of `hf` on these tasks is in `tests/oracle/test_lm_eval_oracle.py`.
"""

from pathlib import Path
from typing import Any

import pytest
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI

import jaxgen
from jaxgen.integrations.lm_eval import JaxgenLM
from tests.lm_eval_tasks import datasets_in, responses, same, write_tasks

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries that lm-eval brings along
]
LONGEST = 160


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory):
    with datasets_in(tmp_path_factory.mktemp("datasets")):
        yield write_tasks(tmp_path_factory.mktemp("tasks"))


def ours(**options: Any) -> JaxgenLM:
    return JaxgenLM(str(jaxgen.demo.path()), dtype="float32", max_length=LONGEST, batch_size=3, **options)


@pytest.fixture(scope="module")
def expected(tasks: Path) -> dict[str, list[Any]]:
    return responses(ours(), tasks)


@pytest.mark.parametrize("options", [{}, {"batch_size": 4}, {"num_concurrent": 3}], ids=str)
def test_completions(url: str, tasks: Path, expected: dict[str, list[Any]], options: dict[str, Any]):
    lm = LocalCompletionsAPI(
        f"{url}/v1/completions",
        tokenizer_backend="huggingface",
        model="demo",
        tokenizer=str(jaxgen.demo.path()),
        add_bos_token=True,  # as `hf` does
        max_length=LONGEST + 2,  # it takes off one for what is generated, and one of its windows
        **options,
    )
    same(responses(lm, tasks), expected)
    assert len({text for [[text]] in expected["until"]}) >= 3


def test_chats(url: str, tasks: Path):
    """The template's text alone is the prompt, as everywhere but in `hf`, which writes BOS before it."""
    lm = LocalChatCompletion(f"{url}/v1/chat/completions", model="demo")
    own = {"names": ["until"], "apply_chat_template": True, "system_instruction": "Be short."}
    found = responses(lm, tasks, **own)
    assert found == responses(ours(add_bos_token=False), tasks, **own)
    assert len({text for [[text]] in found["until"]}) >= 3
