"""Fields of requests: each does to a server's answer what the option of `generate` does, with the same seed."""

import json
import re
import threading
import time

import pydantic
import pytest
from starlette.testclient import TestClient

import jaxgen
from jaxgen import demo
from jaxgen.serve import shapes
from jaxgen.serve.app import application
from jaxgen.serve.service import Service
from jaxgen.text.tokenizer import tokenizer_for

TEXT = "1, 2, 3"
END = 2  # the demo's end token
PROCESSORS = (
    "sequence_bias",
    "frequency_penalty",
    "presence_penalty",
    "min_new_tokens",
    "temperature",
    "top_k",
    "min_p",
)
CHAT = [{"role": "user", "content": "Name a color."}]
# A template that shows all that it is told.
TEMPLATE = """{{ bos_token }}{% for message in messages %}{{ message.role + ": " + message.content }}
{%- for call in message.tool_calls or [] %}{{ "calls " + call.function.name + " at " + call.function.arguments.city }}
{%- endfor %}{{ "" if loop.last else "\\n" }}{% endfor %}
{%- if add_generation_prompt %}{{ "\\nassistant:" + (" LOUD" if loud else "") }}{% endif %}"""
PLACE = {
    "properties": {"city": {"enum": ["Rome", "Oslo"]}, "days": {"type": "integer", "minimum": 1, "maximum": 9}},
    **{"type": "object", "required": ["city", "days"], "additionalProperties": False},
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": PLACE}}
TOOL_CALL = {"id": "1", "type": "function", "function": {"name": "weather", "arguments": '{"city": "Rome"}'}}
CALLED = [
    *CHAT,
    {"role": "assistant", "content": None, "tool_calls": [TOOL_CALL]},
    {"role": "tool", "tool_call_id": "1", "content": "rain"},
]
# What openai 2's `chat.completions.parse(response_format=Zoo)` sends for a pydantic model.
ANIMAL = {
    "description": "An animal.",
    "properties": {"kind": {"$ref": "#/$defs/Kind"}, "legs": {"title": "Legs", "type": "integer"}},
    "required": ["kind", "legs"],
    "title": "Animal",
    "type": "object",
    "additionalProperties": False,
}
ZOO = {
    "$defs": {"Animal": ANIMAL, "Kind": {"enum": ["cat", "dog"], "title": "Kind", "type": "string"}},
    "properties": {
        "animals": {"items": {"$ref": "#/$defs/Animal"}, "title": "Animals", "type": "array"},
        "name": {"anyOf": [{"type": "string"}, {"type": "null"}], "description": "its name", "title": "Name"},
        "main": {**ANIMAL, "description": "the best"},
        "open": {"title": "Open", "type": "boolean"},
    },
    "required": ["animals", "name", "main", "open"],
    "title": "Zoo",
    "type": "object",
    "additionalProperties": False,
}


class Animal(pydantic.BaseModel):
    kind: str
    legs: int


class Zoo(pydantic.BaseModel):
    animals: list[Animal]
    name: str | None
    main: Animal
    open: bool


@pytest.fixture(scope="module")
def service():
    model = jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    tokenizer = tokenizer_for(model)
    tokenizer.chat_template = TEMPLATE
    return Service(jaxgen.Engine(model, tokenizer, rows=4, slots=192, chunk=16, processors=PROCESSORS), "demo")


@pytest.fixture(scope="module")
def client(service):
    with TestClient(application(service), base_url="http://localhost") as client:
        while client.get("/ready").status_code != 200:
            time.sleep(0.05)
        yield client


def generated(service, ids, **options):
    """The new tokens of `generate` in the engine's shape, with their own log-probabilities and the reason to end."""
    options = {"do_sample": True, "temperature": 2.6, "top_k": 0, "seed": 4, "max_new_tokens": 24, **options}
    told = {"strict": service.engine.strict, "tokenizer": service.tokenizer, "return_dict_in_generate": True}
    out = service.model.generate([ids], **told, **options)
    count = int(out.lengths[0])
    new = out.sequences[0, len(ids) : len(ids) + count].tolist()
    return new, out.model_logprobs[0, :count].tolist(), out.finish_reason[0]


def posted(client, path, body):
    answer = client.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def plain(service):
    return service.tokenizer(TEXT)["input_ids"]


FIELDS = {
    "top_k": ({"top_k": 3}, {"top_k": 3}),
    "min_p": ({"min_p": 0.3}, {"min_p": 0.3}),
    "min_tokens": ({"min_tokens": 18}, {"min_new_tokens": 18}),
    "ignore_eos": ({"ignore_eos": True}, {"eos_token_id": None}),
    "stop_token_ids": ({"stop_token_ids": [391, 539]}, {"eos_token_id": (END, 391, 539)}),
    "stop_token_ids alone": ({"stop_token_ids": [391], "ignore_eos": True}, {"eos_token_id": (391,)}),
    "frequency_penalty": ({"frequency_penalty": 1.5}, {"frequency_penalty": 1.5}),
    "presence_penalty": ({"presence_penalty": -1.5}, {"presence_penalty": -1.5}),
    "both": ({"frequency_penalty": -0.5, "presence_penalty": 2}, {"frequency_penalty": -0.5, "presence_penalty": 2.0}),
}


@pytest.mark.parametrize("what", FIELDS)
def test_a_field_is_an_option_of_generate(client, service, what):
    fields, options = FIELDS[what]
    biases = {"logit_bias": {str(END): 9}}  # the end comes early, so that what forbids it is seen
    body = {"prompt": TEXT, "seed": 4, "temperature": 2.6, "max_tokens": 24, "logprobs": 0, **biases, **fields}
    answer = posted(client, "/v1/completions", body)
    without = generated(service, plain(service), sequence_bias={(END,): 9.0})
    tokens, logprobs, reason = generated(service, plain(service), sequence_bias={(END,): 9.0}, **options)
    [choice] = answer["choices"]
    assert choice["logprobs"]["token_logprobs"] == logprobs != without[1]
    assert choice["text"] == service.tokenizer.decode(tokens, skip_special_tokens=True)
    assert choice["finish_reason"] == ("stop" if reason == "eos" else "length")
    assert answer["usage"]["completion_tokens"] == len(tokens)


def test_a_stop_is_looked_for_in_the_new_text_only(client, service):
    """As at OpenAI. `generate` finds one that begins in the prompt too: such an answer has no record."""
    body = {"prompt": f"{TEXT},", "temperature": 0, "max_tokens": 12}
    whole = posted(client, "/v1/completions", body)["choices"][0]["text"]
    assert whole.startswith(" 4, 5, 6")
    for stops, expected in (([", 4"], whole), ([", 4", "6"], " 4, 5, "), (["4"], " ")):
        answer = posted(client, "/v1/completions", {**body, "stop": stops})
        assert answer["choices"][0]["text"] == expected, stops
        recorded = client.get(f"/v1/records/{answer['id']}")
        assert recorded.status_code == (400 if ", 4" in stops else 200)
        assert ", 4" not in stops or "begins in its prompt" in recorded.json()["error"]["message"]
    lines = client.post("/v1/completions", json={**body, "stop": [", 4", "6"], "stream": True}).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    assert "".join(event["choices"][0]["text"] for event in events) == " 4, 5, "
    told = posted(client, "/generate", {"inputs": f"{TEXT},", "parameters": {"max_new_tokens": 12, "stop": [", 4"]}})
    assert told["generated_text"] == whole


def test_special_tokens_are_left_out_unless_asked_for(client, service):
    biases = {"logit_bias": {str(END): 100}}
    body = {"prompt": TEXT, "max_tokens": 3, "temperature": 0, **biases}
    for fields, expected in (({}, ""), ({"skip_special_tokens": True}, ""), ({"skip_special_tokens": False}, "</s>")):
        assert posted(client, "/v1/completions", {**body, **fields})["choices"][0]["text"] == expected
        chat = posted(client, "/v1/chat/completions", {"messages": CHAT, **biases, **fields})
        assert chat["choices"][0]["message"]["content"] == expected


PROMPTS = {
    "add_generation_prompt": (CHAT, {"add_generation_prompt": False}, "<s>user: Name a color."),
    "continue_final_message": (
        [*CHAT, {"role": "assistant", "content": "It is"}],
        {"continue_final_message": True},
        "<s>user: Name a color.\nassistant: It is",
    ),
    "chat_template_kwargs": (
        CHAT,
        {"chat_template_kwargs": {"loud": True}},
        "<s>user: Name a color.\nassistant: LOUD",
    ),
    "tool calls": (
        CALLED,
        {},
        "<s>user: Name a color.\nassistant: calls weather at Rome\ntool: rain\nassistant:",
    ),
}


@pytest.mark.parametrize("what", PROMPTS)
def test_a_chat_is_read_by_its_template(client, service, what):
    messages, fields, prompt = PROMPTS[what]
    body = {"messages": messages, "seed": 4, "temperature": 2.6, "max_tokens": 24, "logprobs": True, **fields}
    ids = service.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    answer = posted(client, "/v1/chat/completions", body)
    tokens, logprobs, _ = generated(service, ids)
    assert answer["usage"]["prompt_tokens"] == len(ids)
    assert answer["choices"][0]["message"]["content"] == service.tokenizer.decode(tokens, skip_special_tokens=True)
    assert [entry["logprob"] for entry in answer["choices"][0]["logprobs"]["content"]] == logprobs


def test_usage_in_every_event(client, service):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {"prompt": TEXT, "seed": 4, "temperature": 2.6, "max_tokens": 20, "ignore_eos": True}
    body |= {"stream": True, "stream_options": options, "logprobs": 0}
    lines = client.post("/v1/completions", json=body).text.splitlines()
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line and "[DONE]" not in line]
    tokens, _, _ = generated(service, plain(service), max_new_tokens=20, eos_token_id=None)
    assert (
        events[-1]["usage"] == {"prompt_tokens": 8, "completion_tokens": 20, "total_tokens": 28} and len(tokens) == 20
    )
    so_far = 0
    for event in events[:-1]:
        logprobs = event["choices"][0]["logprobs"]
        so_far += len(logprobs["tokens"]) if logprobs else 0
        assert event["usage"]["completion_tokens"] == so_far
    assert len({event["usage"]["completion_tokens"] for event in events}) > 2


SHAPES = {
    "a pydantic model": (
        "/v1/chat/completions",
        {"response_format": {"type": "json_schema", "json_schema": {"schema": ZOO, "name": "Zoo", "strict": True}}},
        lambda: jaxgen.json_schema(ZOO),
        Zoo.model_validate_json,
    ),
    "json_object": (
        "/v1/completions",
        {"response_format": {"type": "json_object"}},
        shapes.any_object,
        lambda text: isinstance(json.loads(text), dict),
    ),
    "TGI's regex": (
        "/generate",
        {"grammar": {"type": "regex", "value": "(red|blue)( [a-f]{2}){3}"}},
        lambda: jaxgen.regex("(red|blue)( [a-f]{2}){3}"),
        lambda text: re.fullmatch("(red|blue)( [a-f]{2}){3}", text),
    ),
    "TGI's json": (
        "/generate",
        {"grammar": {"type": "json", "value": ANIMAL | {"$defs": ZOO["$defs"]}}},
        lambda: jaxgen.json_schema(ANIMAL | {"$defs": ZOO["$defs"]}),
        Animal.model_validate_json,
    ),
    "vLLM's choice": (
        "/v1/completions",
        {"structured_outputs": {"choice": ["red", "light blue"]}},
        lambda: jaxgen.choice(["red", "light blue"]),
        lambda text: text in ("red", "light blue"),
    ),
}


@pytest.mark.parametrize("what", SHAPES)
def test_a_text_of_a_shape(client, service, what):
    """It is what `generate` gives with the constraint, and what an own reader of that shape takes."""
    path, fields, constraint, read = SHAPES[what]
    own = {"seed": 4, "temperature": 2.6}
    ids = plain(service)
    if path == "/generate":
        body = {"inputs": TEXT, "parameters": {**own, "max_new_tokens": 80, "details": True, **fields}}
        said = posted(client, path, body)
        text, reason = said["generated_text"], said["details"]["finish_reason"]
    else:
        prompt = {"messages": CHAT} if "chat" in path else {"prompt": TEXT}
        [choice] = posted(client, path, {**prompt, **own, "max_tokens": 80, **fields})["choices"]
        text, reason = choice["message"]["content"] if "chat" in path else choice["text"], choice["finish_reason"]
        if "chat" in path:
            chat = "<s>user: Name a color.\nassistant:"
            ids = service.tokenizer(chat, add_special_tokens=False)["input_ids"]
    assert read(text) and reason in ("stop", "eos_token")
    tokens, _, _ = generated(service, ids, max_new_tokens=80, constraint=constraint())
    assert text == service.tokenizer.decode(tokens, skip_special_tokens=True)


CHOICES = {"stop": {"type": "function", "function": {"name": "weather"}}, "tool_calls": "required"}


@pytest.mark.parametrize("reason", CHOICES)
def test_a_call_that_is_forced(client, service, reason):
    """Its arguments are what `generate` gives under the schema; streamed they are the same."""
    body = {"messages": CHAT, "tools": [TOOL], "tool_choice": CHOICES[reason], "seed": 4, "temperature": 2.6}
    [choice] = posted(client, "/v1/chat/completions", body)["choices"]
    ids = service.tokenizer("<s>user: Name a color.\nassistant:", add_special_tokens=False)["input_ids"]
    tokens, _, _ = generated(service, ids, max_new_tokens=80, constraint=jaxgen.json_schema(PLACE))
    arguments = service.tokenizer.decode(tokens, skip_special_tokens=True)
    assert json.loads(arguments)["city"] in ("Rome", "Oslo")
    [call] = choice["message"]["tool_calls"]
    assert call["function"] == {"name": "weather", "arguments": arguments} and choice["message"]["content"] is None
    assert choice["finish_reason"] == reason
    said = client.post("/v1/chat/completions", json=body | {"stream": True}).text.split("\n\n")[:-2]
    events = [json.loads(line.removeprefix("data: "))["choices"][0] for line in said]
    [first, *_], calls = events, [each for event in events for each in event["delta"].get("tool_calls", ())]
    assert first["delta"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": ""}
    assert "".join(each["function"]["arguments"] for each in calls) == arguments and len(calls) > 2
    assert events[-1]["finish_reason"] == reason
    short = posted(client, "/v1/chat/completions", body | {"stop": ["ity"]})["choices"][0]
    assert short["message"]["tool_calls"][0]["function"]["arguments"] == arguments.partition("ity")[0]


def test_text_is_no_shape(client):
    body = {"prompt": TEXT, "seed": 4, "max_tokens": 8}
    with_it = posted(client, "/v1/completions", body | {"response_format": {"type": "text"}})
    assert with_it["choices"] == posted(client, "/v1/completions", body)["choices"]


def schema(value):
    return {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": value}}}


WHERE = "response_format.json_schema.schema"
LONG = {"type": "string", "pattern": "a{1100}"}
ITSELF = {"type": "object", "properties": {"a": {"$ref": "#"}}, "additionalProperties": False, "required": []}
DEEP = json.loads('{"type": "array", "items": ' * 300 + '{"type": "null"}' + "}" * 300)
REFUSED = {
    "no such type": ({"response_format": {"type": "xml"}}, "response_format.type", "json_object"),
    "no type": ({"response_format": {}}, "response_format.type", "missing"),
    "no schema": ({"response_format": {"type": "json_schema", "json_schema": {"name": "x"}}}, WHERE, "missing"),
    "a keyword": (schema({"type": "array", "items": {"type": "null"}, "uniqueItems": True}), WHERE, "uniqueItems"),
    "no JSON": (schema("{"), WHERE, "JSON"),
    "too large": (schema(LONG), WHERE, "states and"),
    "leads back": (schema(ITSELF), WHERE, "grammar"),
    "deep": (schema(DEEP), WHERE, "nested too deeply"),
    "no room": (schema({"enum": ["a long word, longer than 3"]}) | {"max_tokens": 3}, "max_tokens", "room for 3"),
    "no such end": (
        {"structured_outputs": {"regex": "a"}, "stop_token_ids": [5000]},
        "stop_token_ids",
        "no id of the 640",
    ),
    "a pattern": ({"structured_outputs": {"regex": "("}}, "structured_outputs.regex", ""),
    "two": ({"structured_outputs": {"regex": "a", "choice": ["a"]}}, "structured_outputs", "2 were given"),
    "both": (
        {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
        "structured_outputs",
        "exclude",
    ),
    "a temperature": ({"temperature": 1e-45}, "temperature", "1e-45 must be at least 1.175e-38 in size or 0"),
    "no such tool": (
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "x"}}},
        "tool_choice",
        "'x': 0 of the tools",
    ),
    "one of several tools": ({"tools": [TOOL, TOOL], "tool_choice": "required"}, "tool_choice", "2 of the tools"),
    "a call and a shape": (
        {"tools": [TOOL], "tool_choice": "required", "structured_outputs": {"regex": "a"}},
        "tool_choice",
        "exclude each other",
    ),
    "a tool's schema": (
        {
            "tools": [{"type": "function", "function": {"name": "x", "parameters": {"type": "x"}}}],
            "tool_choice": "required",
        },
        "tools[0].function.parameters",
        "type",
    ),
    "a penalty": ({"presence_penalty": 2.5}, "presence_penalty", r"\[-2, 2\]"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_is_refused_is_named(client, what):
    fields, param, said = REFUSED[what]
    answer = client.post("/v1/chat/completions", json={"messages": CHAT, **fields})
    error = answer.json()["error"]
    assert answer.status_code == 400 and error["param"] == param, error
    assert re.search(said, error["message"]), error


def test_a_grammar_of_tgi_is_named_too(client):
    for value, param in (({"type": "regex"}, "parameters.grammar.value"), ({"type": "x"}, "parameters.grammar.type")):
        answer = client.post("/generate", json={"inputs": TEXT, "parameters": {"grammar": value}})
        assert answer.status_code == 400 and answer.json()["error"]["param"] == param


def test_shapes_are_worked_out_beside_the_others(client, service, monkeypatch):
    """One that takes long holds up nobody else; those that wait for it are bounded, and told after a time."""
    begun, go_on = threading.Event(), threading.Event()
    real = service.shapes._checked

    def slow(*given):
        begun.set()
        assert go_on.wait(60)
        return real(*given)

    monkeypatch.setattr(service.shapes, "_checked", slow)
    monkeypatch.setattr(shapes, "MOST_WAITING", 1)
    body = {"prompt": TEXT, "structured_outputs": {"regex": "x{3}"}, "temperature": 0}
    answers = []
    asking = threading.Thread(target=lambda: answers.append(client.post("/v1/completions", json=body)))
    asking.start()
    assert begun.wait(60)
    assert posted(client, "/v1/completions", {"prompt": TEXT, "max_tokens": 2})["choices"]
    refused = client.post("/v1/completions", json=body)
    assert refused.status_code == 429 and refused.json()["error"]["code"] == "queue_full"
    go_on.set()
    asking.join()
    assert answers[0].json()["choices"][0]["text"] == "xxx"
    go_on.clear()
    monkeypatch.setattr(shapes, "SECONDS", 1)  # it has begun by then
    late = client.post("/v1/completions", json=body)
    go_on.set()
    assert late.status_code == 400 and late.json()["error"]["code"] == "timeout"


def test_a_shape_that_never_began_is_forgotten(client, service, monkeypatch):
    """Behind one that takes long: its client may come again, and what it asked for holds up nobody later."""
    begun, go_on, made = threading.Event(), threading.Event(), []
    real = service.shapes._checked

    def slow(make, options):
        made.append(make().pattern)
        begun.set()
        assert go_on.wait(60)
        return real(make, options)

    def ask(pattern):
        return client.post("/v1/completions", json={"prompt": TEXT, "structured_outputs": {"regex": pattern}})

    monkeypatch.setattr(service.shapes, "_checked", slow)
    answers = []
    asking = threading.Thread(target=lambda: answers.append(ask("x{3}")))
    asking.start()
    assert begun.wait(60)
    monkeypatch.setattr(shapes, "SECONDS", 0.05)
    for late in (ask("y{3}"), ask("z{3}")):
        assert late.status_code == 429 and late.json()["error"]["code"] == "queue_full"
        assert late.headers["retry-after"] == "1"
    monkeypatch.undo()  # the first one goes on
    go_on.set()
    asking.join()
    assert answers[0].json()["choices"][0]["text"] == "xxx"
    monkeypatch.setattr(service.shapes, "_checked", slow)
    assert ask("z{3}").json()["choices"][0]["text"] == "zzz"
    assert made == ["x{3}", "z{3}"] and service.shapes._waiting == 0


def test_an_engine_without_room_and_one_that_fails_to_start(service, monkeypatch):
    model = service.model
    with jaxgen.Engine(model, service.tokenizer, rows=1, slots=64, constraints=None) as engine:
        client = TestClient(application(Service(engine, "demo")), base_url="http://localhost")
        asked = {"prompt": TEXT, "response_format": {"type": "json_object"}}
        error = client.post("/v1/completions", json=asked).json()["error"]
        assert error["param"] == "response_format.type" and "no room" in error["message"]

    def broken(_):
        raise RuntimeError("no such kernel")

    monkeypatch.setattr("jaxgen.engine.batch.Batch.warmup", broken)
    engine = jaxgen.Engine(model, service.tokenizer, rows=1, slots=64)
    with TestClient(application(Service(engine, "demo")), base_url="http://localhost") as client:
        with pytest.raises(jaxgen.EngineClosedError, match="no such kernel"):
            engine.wait_until_ready()
        answer = client.get("/ready")
        assert answer.status_code == 503 and answer.json() == {"status": "failed"}
