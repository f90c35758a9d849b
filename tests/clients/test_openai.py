"""The package `openai` against a server: its answers are what `generate` gives with the same seed."""

import asyncio
from typing import Any, Literal

import openai
import pydantic
import pytest

from tests.clients.conftest import Expected
from tests.serving import serving

pytestmark = pytest.mark.slow

ASK: Any = [{"role": "user", "content": "How many helicopters can a human eat in one sitting?"}]
TEXT = "1, 2, 3"
SAMPLED = {"temperature": 1.5, "seed": 7}


class Animal(pydantic.BaseModel):
    """An animal."""

    kind: Literal["cat", "dog"]
    legs: int


class Zoo(pydantic.BaseModel):
    animals: list[Animal]
    open: bool | None


@pytest.fixture(scope="module")
def client(url: str):
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        yield client


def about(logprobs: list[float]) -> Any:
    """Those of the engine and those of `generate` may differ in rounding; the tokens do not."""
    return pytest.approx(logprobs, abs=1e-5)


def text_of(expected: Expected, prompt: Any, new: int, **options: Any) -> str:
    return expected(prompt, max_new_tokens=new, **options)[0][0]


def test_models(client: openai.OpenAI):
    assert [model.id for model in client.models.list()] == ["demo"]
    assert client.models.retrieve("demo").owned_by == "jaxgen"
    with pytest.raises(openai.NotFoundError, match="'demo' is"):
        client.models.retrieve("mistralai/Mistral-7B-v0.1")


def test_a_chat(client: openai.OpenAI, expected: Expected):
    options: Any = {"logprobs": True, "top_logprobs": 2, "max_completion_tokens": 9, **SAMPLED}
    answer = client.chat.completions.create(model="demo", messages=ASK, n=2, **options)
    samples = expected(ASK, max_new_tokens=9, num_return_sequences=2, **SAMPLED)
    assert samples[0] != samples[1]
    for choice, (said, logprobs) in zip(answer.choices, samples, strict=True):
        assert choice.logprobs and choice.logprobs.content
        assert (choice.message.role, choice.message.content) == ("assistant", said)
        assert [entry.logprob for entry in choice.logprobs.content] == about(logprobs)
        for entry in choice.logprobs.content:
            best, second = (other.logprob for other in entry.top_logprobs)
            assert best >= second
            assert [other.logprob for other in entry.top_logprobs if other.token == entry.token] in (
                [],
                [entry.logprob],
            )
    assert answer.usage and answer.usage.completion_tokens == sum(len(logprobs) for _, logprobs in samples)
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens
    assert answer.system_fingerprint == client.models.retrieve("demo").model_extra["system_fingerprint"]  # type: ignore


def test_a_chat_that_is_streamed(client: openai.OpenAI, expected: Expected):
    said, logprobs = expected(ASK, max_new_tokens=20, **SAMPLED)[0]
    options: Any = {"max_tokens": 20, "logprobs": True, "stream_options": {"include_usage": True}, **SAMPLED}
    events = [*client.chat.completions.create(model="demo", messages=ASK, stream=True, **options)]
    *pieces, usage = events
    assert len(pieces) > 3 and len({event.id for event in events}) == 1
    assert usage.choices == [] and usage.usage and usage.usage.completion_tokens == len(logprobs)
    choices = [event.choices[0] for event in pieces]
    assert "".join(choice.delta.content or "" for choice in choices) == said
    told = [entry.logprob for choice in choices if choice.logprobs for entry in choice.logprobs.content or []]
    assert told == about(logprobs)
    assert [choice.finish_reason for choice in choices if choice.finish_reason] in (["stop"], ["length"])
    with client.chat.completions.stream(model="demo", messages=ASK, temperature=0) as stream:
        assert stream.get_final_completion().choices[0].message.content == text_of(expected, ASK, 40)


def test_many_at_a_time(url: str, expected: Expected):
    async def asked() -> tuple[list[str | None], str]:
        async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
            own: Any = {"model": "demo", "messages": ASK, "temperature": 1.5, "max_tokens": 9}
            whole = [client.chat.completions.create(**own, seed=seed) for seed in (1, 2, 3, 1, 2, 3)]
            stream = await client.chat.completions.create(**own, seed=4, stream=True)
            answers = await asyncio.gather(*whole)
            return [answer.choices[0].message.content for answer in answers], "".join(
                [event.choices[0].delta.content or "" async for event in stream]
            )

    texts, streamed = asyncio.run(asked())
    alone = [text_of(expected, ASK, 9, temperature=1.5, seed=seed) for seed in (1, 2, 3, 4)]
    assert texts == alone[:3] * 2 and streamed == alone[3] and len({*alone}) > 1


def test_completions(client: openai.OpenAI, expected: Expected):
    own: Any = {"model": "demo", "prompt": TEXT, "temperature": 0, "max_tokens": 6}
    [(said, logprobs)] = expected(TEXT, max_new_tokens=6)
    answer = client.completions.create(**own, logprobs=2, echo=True)
    [choice] = answer.choices
    assert answer.usage and choice.logprobs and choice.logprobs.token_logprobs and choice.logprobs.top_logprobs
    known = answer.usage.prompt_tokens
    assert choice.text == TEXT + said and choice.finish_reason == "length"
    assert choice.logprobs.token_logprobs[known:] == about(logprobs)
    assert [max(top.values()) for top in choice.logprobs.top_logprobs[known:]] == choice.logprobs.token_logprobs[known:]
    assert "".join(choice.logprobs.tokens or []) == f"<s>{TEXT}{said}"
    texts = [choice.text for choice in client.completions.create(**{**own, "prompt": [TEXT, "20, 21"]}).choices]
    assert texts == [said, text_of(expected, "20, 21", 6)]
    assert "".join(event.choices[0].text for event in client.completions.create(**own, stream=True)) == said


def test_what_else_is_asked(client: openai.OpenAI, expected: Expected):
    def text(**fields: Any) -> str:
        own: Any = {"model": "demo", "prompt": TEXT, "temperature": 0, "max_tokens": 6, **fields}
        return client.completions.create(**own).choices[0].text

    said = text_of(expected, TEXT, 6)
    assert said == ", 4, 5" == text(user="me", best_of=1) and text(stop=["5", "x"]) == ", 4, "
    assert "," not in text(logit_bias={"14": -100}) and text(logit_bias={"5": -100}) == said  # 14 is a comma
    assert text(temperature=1.5, seed=7, extra_body={"top_k": 1}) == said
    chat: Any = {"model": "demo", "messages": ASK, "max_tokens": 6, "temperature": 0}
    plain = client.chat.completions.create(**chat).choices[0].message.content
    ignored: Any = {"store": True, "metadata": {"a": "b"}, "prediction": {"type": "content", "content": "A human"}}
    assert plain == client.chat.completions.create(**chat, **ignored).choices[0].message.content
    assert plain == text_of(expected, ASK, 6)


def test_a_pydantic_model(client: openai.OpenAI):
    own: Any = {"model": "demo", "messages": ASK, "max_tokens": 200, **SAMPLED}
    message = client.chat.completions.parse(**own, response_format=Zoo).choices[0].message
    assert isinstance(message.parsed, Zoo) and Zoo.model_validate_json(message.content or "") == message.parsed
    with client.chat.completions.stream(**own, response_format=Zoo) as stream:
        final = stream.get_final_completion()
    assert final.choices[0].message.parsed == message.parsed
    found = client.chat.completions.create(**own, response_format={"type": "json_object"}).choices[0].message.content
    assert pydantic.TypeAdapter(dict[str, Any]).validate_json(found or "") is not None
    with pytest.raises(openai.LengthFinishReasonError):  # where nothing is wrong with the format
        client.chat.completions.parse(**{**own, "max_tokens": 2}, tools=[openai.pydantic_function_tool(Animal)])


@pytest.mark.parametrize("named", [True, False])
def test_a_call_that_is_forced(client: openai.OpenAI, named: bool):
    own: Any = {"model": "demo", "messages": ASK, "max_tokens": 100, "tools": [openai.pydantic_function_tool(Animal)]}
    own |= {"tool_choice": {"type": "function", "function": {"name": "Animal"}} if named else "required", **SAMPLED}
    choice = client.chat.completions.parse(**own).choices[0]
    [call] = choice.message.tool_calls or []
    assert choice.message.content is None and choice.finish_reason == ("stop" if named else "tool_calls")
    assert call.type == "function" and call.function.name == "Animal" and call.id.startswith("call_")
    assert call.function.parsed_arguments == Animal.model_validate_json(call.function.arguments)
    with client.chat.completions.stream(**own) as stream:
        pieces = [event.arguments_delta for event in stream if event.type == "tool_calls.function.arguments.delta"]
        final = stream.get_final_completion().choices[0]
    [streamed] = final.message.tool_calls or []
    assert streamed.function == call.function and "".join(pieces) == call.function.arguments and len(pieces) > 2
    assert final.finish_reason == choice.finish_reason and not final.message.content
    again = [*ASK, choice.message.model_dump(exclude={"parsed"}, exclude_none=True)]  # and its answer is a message
    again.append({"role": "tool", "tool_call_id": call.id, "content": "done"})
    with pytest.raises(openai.BadRequestError, match="role 'tool' is none of"):  # says the demo's template
        client.chat.completions.create(model="demo", messages=again)


ERRORS: dict[str, tuple[type[openai.APIStatusError], int, dict[str, Any], str | None, str]] = {
    "a value": (openai.BadRequestError, 400, {"temperature": -1}, "temperature", "temperature=-1"),
    "too long": (openai.BadRequestError, 400, {"max_tokens": 1000}, "max_tokens", "at most"),
    "a field": (openai.BadRequestError, 400, {"extra_body": {"temprature": 1}}, "temprature", "'temperature'"),
    "a tool": (openai.BadRequestError, 400, {"tool_choice": "required"}, "tool_choice", "0 of the tools"),
    "a model": (openai.NotFoundError, 404, {"model": "gpt-4"}, "model", "'demo' is"),
}


@pytest.mark.parametrize("what", ERRORS)
def test_errors(client: openai.OpenAI, what: str):
    kind, status, fields, param, said = ERRORS[what]
    with pytest.raises(kind, match=said) as raised:
        client.chat.completions.create(**{"model": "demo", "messages": ASK, **fields})
    error = raised.value
    assert (error.status_code, error.param) == (status, param)
    assert isinstance(error.body, dict) and error.body["type"] == "invalid_request_error"


def test_a_key_and_a_full_queue():
    """Both are answered while the server compiles."""
    with serving("--rows", "1", "--slots", "64", "--queue", "2", JAXGEN_API_KEY="k") as url:
        with openai.OpenAI(base_url=f"{url}/v1", api_key="wrong", max_retries=0) as client:
            with pytest.raises(openai.AuthenticationError, match="API key") as refused:
                client.models.list()
            assert (refused.value.status_code, refused.value.code) == (401, "invalid_api_key")
        with openai.OpenAI(base_url=f"{url}/v1", api_key="k", max_retries=0) as client:
            with pytest.raises(openai.RateLimitError) as full:
                client.completions.create(model="demo", prompt=TEXT, n=8, max_tokens=50)
            assert (full.value.status_code, full.value.code) == (429, "queue_full")
            assert full.value.response.headers["retry-after"] == "1"
