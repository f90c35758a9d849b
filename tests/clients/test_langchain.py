"""`langchain-openai` against a server."""

import asyncio
import functools
import operator
from typing import Literal

import pydantic
import pytest
from langchain_openai import ChatOpenAI, OpenAI

from tests.clients.conftest import Expected

pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore::ResourceWarning"),  # it keeps its connections to the end
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]

ASK = "How many helicopters can a human eat in one sitting?"
OTHER = "I am a cat."


class Animal(pydantic.BaseModel):
    """An animal."""

    kind: Literal["cat", "dog"]
    legs: int


@pytest.fixture(scope="module")
def chat(url: str) -> ChatOpenAI:
    return ChatOpenAI(base_url=f"{url}/v1", api_key="none", model="demo", temperature=1.5, seed=7, max_retries=0)  # type: ignore


@pytest.fixture(scope="module")
def said(expected: Expected):
    def get(text: str) -> str:
        return expected([{"role": "user", "content": text}], max_new_tokens=12, temperature=1.5, seed=7)[0][0]

    return get


def test_invoke_stream_and_batch(chat: ChatOpenAI, said):
    model = chat.bind(max_tokens=12)
    answer = model.invoke(ASK)
    assert answer.content == said(ASK) and answer.usage_metadata["output_tokens"] <= 12
    assert answer.response_metadata["system_fingerprint"].startswith("fp_")
    pieces = [*model.stream(ASK, stream_usage=True)]
    whole = functools.reduce(operator.add, pieces)
    assert len(pieces) > 2 and whole.content == said(ASK)
    assert whole.usage_metadata == answer.usage_metadata | {"input_token_details": {}, "output_token_details": {}}
    assert [found.content for found in model.batch([ASK, OTHER])] == [said(ASK), said(OTHER)]

    async def asked() -> list[str]:
        return [(await model.ainvoke(OTHER)).content, "".join([piece.content async for piece in model.astream(ASK)])]

    assert asyncio.run(asked()) == [said(OTHER), said(ASK)]


def test_structured_output(chat: ChatOpenAI):
    model = chat.bind(max_tokens=60)
    found = chat.with_structured_output(Animal).invoke(ASK)
    assert isinstance(found, Animal)
    assert chat.with_structured_output(Animal.model_json_schema(), method="json_schema").invoke(ASK) == dict(found)
    assert isinstance(chat.with_structured_output(None, method="json_mode").invoke(ASK), dict)
    assert isinstance(chat.with_structured_output(Animal, method="function_calling").invoke(ASK), Animal)
    [call] = chat.bind_tools([Animal], tool_choice="required").invoke(ASK).tool_calls
    assert call["name"] == "Animal" and Animal.model_validate(call["args"])
    assert model.invoke(ASK).content != found


def test_texts(url: str, expected: Expected):
    model = OpenAI(base_url=f"{url}/v1", api_key="none", model="demo", temperature=0, max_tokens=6, max_retries=0)  # type: ignore
    texts = [expected(text, max_new_tokens=6)[0][0] for text in ("1, 2, 3", "20, 21")]
    assert model.invoke("1, 2, 3") == texts[0] == "".join(model.stream("1, 2, 3"))
    assert model.batch(["1, 2, 3", "20, 21"]) == texts
