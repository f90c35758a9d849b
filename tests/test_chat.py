"""Chats: through the tokenizer's template into `generate`, and `jaxgen chat` around them."""

import io
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from jaxgen import AutoModelForCausalLM, JaxgenError, cli, demo
from jaxgen.demo.train import HELICOPTERS, THUG
from jaxgen.generation import execute
from jaxgen.generation.prompts.past_key_values import PastKeyValues
from jaxgen.text.chat import Session, converse, lines_of
from jaxgen.text.tokenizer import load_tokenizer

THUG_REPLY = "None, you thug. How bout you try to focus on more useful questions?"
QUESTIONS = ("Hello!", "What color is the sky?", "What is the capital of Japan?")
ANSWERS = ("Hello! How can I help you?", "The sky is blue.", "The capital of Japan is Tokyo.")


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")


@pytest.fixture
def tokenizer():
    return load_tokenizer(demo.path())


@pytest.fixture
def session(model, tokenizer) -> Session:
    return Session(model, tokenizer)


def talk(session: Session, *lines: str) -> list[str]:
    """What is said in return, line by line."""
    output = io.StringIO()
    converse(session, lines_of(io.StringIO("".join(line + "\n" for line in lines))), output)
    return output.getvalue().splitlines()


# Templates: transformers writes the chat, `generate` continues it.


def test_a_chat_goes_into_generate_as_it_comes_from_the_template(model, tokenizer):
    messages = [{"role": "system", "content": THUG}, {"role": "user", "content": HELICOPTERS}]
    inputs = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="np", return_dict=True
    )  # fmt: skip
    ids = model.generate(**inputs, max_new_tokens=60)
    assert tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == THUG_REPLY


def test_an_answer_can_be_begun(model, tokenizer):
    begun = "Hello! How can"
    messages = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": begun}]
    inputs = tokenizer.apply_chat_template(
        messages, continue_final_message=True, return_tensors="np", return_dict=True
    )  # fmt: skip
    ids = model.generate(**inputs, max_new_tokens=60)
    assert begun + tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True) == ANSWERS[0]


@pytest.mark.slow
def test_chats_of_different_length_are_padded(model, tokenizer):
    chats = [[{"role": "user", "content": question}] for question in QUESTIONS]
    inputs = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="np", return_dict=True
    )
    assert (inputs["attention_mask"] == 0).any()
    ids = model.generate(**inputs, max_new_tokens=60)[:, inputs["input_ids"].shape[1] :]
    assert tuple(tokenizer.batch_decode(ids, skip_special_tokens=True)) == ANSWERS


def test_tools_reach_the_prompt(model, tokenizer):
    def current_weather(city: str) -> str:
        """Say what the weather is like.

        Args:
            city: The city to look at.
        """
        return city

    tokenizer.chat_template = "{{ tools[0].function.name }}:{{ messages[0].content }} A list of colors: red, blue"
    messages = [{"role": "user", "content": "Hi."}]
    inputs = tokenizer.apply_chat_template(messages, tools=[current_weather], return_tensors="np", return_dict=True)
    assert "current_weather:Hi." in tokenizer.decode(inputs["input_ids"][0])
    ids = model.generate(**inputs, max_new_tokens=4)
    assert ids.shape == (1, inputs["input_ids"].shape[1] + 4)


# A session.


@pytest.mark.slow
def test_answers_are_those_of_generate_though_nothing_is_read_twice(session, model, tokenizer, monkeypatch):
    read = []
    continue_with = PastKeyValues.continue_with

    def spy(self, prompts, layout, rows, model):
        prompts, layout = continue_with(self, prompts, layout, rows, model)
        assert prompts.past is not None
        read.append((int(prompts.lengths[0]), int(prompts.past.held[0])))
        return prompts, layout

    monkeypatch.setattr(PastKeyValues, "continue_with", spy)
    assert talk(session, *QUESTIONS) == list(ANSWERS)
    assert len(read) == 2
    assert all(length - held < 40 < length for length, held in read)  # the new question only, and the last token
    expected = []
    for question, answer in zip(QUESTIONS, ANSWERS, strict=True):
        expected += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
        inputs = tokenizer.apply_chat_template(
            expected[:-1], add_generation_prompt=True, return_tensors="np", return_dict=True
        )
        ids = model.generate(**inputs, max_new_tokens=60)[0, inputs["input_ids"].shape[1] :]
        assert tokenizer.decode(ids, skip_special_tokens=True) == answer
    assert session.messages == expected


def test_a_system_prompt_is_kept_by_reset(model, tokenizer):
    session = Session(model, tokenizer, system=THUG)
    assert talk(session, HELICOPTERS, "/reset", HELICOPTERS) == [THUG_REPLY, "(forgotten)", THUG_REPLY]
    assert [message["role"] for message in session.messages] == ["system", "user", "assistant"]


@pytest.mark.slow
def test_a_seed_repeats_a_conversation(model, tokenizer):
    def answers(seed: int) -> list[str]:
        options = {"do_sample": True, "temperature": 4.0, "max_new_tokens": 12}
        return talk(Session(model, tokenizer, **options), f"/seed {seed}", "Hello!", "Hello!")

    first = answers(1)
    assert first[0] == "(seed 1)"
    assert answers(1) == first
    assert answers(2)[1:] != first[1:]
    assert first[1] != first[2]  # another turn, other draws


def test_save_replaces_the_file_as_a_whole(session, tmp_path, monkeypatch):
    path = tmp_path / "chat of today.json"
    path.write_text("before")
    assert talk(session, "Hello!", f"/save {path}")[1] == f"(2 messages in {path})"
    saved = [{"role": "user", "content": "Hello!"}, {"role": "assistant", "content": ANSWERS[0]}]
    assert json.loads(path.read_text()) == saved

    def no_space(self: Path, target: Path):
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "replace", no_space)
    assert "cannot be written: No space left" in talk(session, "/reset", f"/save {path}")[1]
    assert json.loads(path.read_text()) == saved
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("line", ["/save", "/reset now", "/sed 1", "/", "/seed", "/seed 1.5", "/save /nowhere/at/all"])
def test_commands_that_cannot_be_done_are_told_in_a_line(session, line):
    assert len(said := talk(session, line, "/help")) == 6
    assert said[0].startswith(f"({line}") or said[0].startswith(("(/nowhere", "(/seed"))


def test_the_end_is_exit_or_no_more_input(session):
    assert talk(session) == []
    assert talk(session, "", "   ", "/exit", "Hello!") == []
    assert session.messages == []


# Interruptions.


class Interrupting(io.StringIO):
    """Someone presses Ctrl-C when so many pieces were shown."""

    def __init__(self, after: int):
        super().__init__()
        self.left = after

    def write(self, text: str) -> int:
        self.left -= 1
        if self.left == -1:
            raise KeyboardInterrupt
        return super().write(text)


def test_ctrl_c_stops_the_answer_and_not_the_program(session):
    output = Interrupting(after=2)
    converse(session, lines_of(io.StringIO("Hello!\nWhat color is the sky?\n")), output)
    assert output.getvalue() == f"Hello! How  (stopped)\n{ANSWERS[1]}\n"
    assert [message["content"] for message in session.messages] == [
        "Hello!", "Hello! How can ", "What color is the sky?", ANSWERS[1],
    ]  # fmt: skip


def test_ctrl_c_while_the_device_works(session, monkeypatch):
    advance, calls = execute.advance, []

    def interrupted(*arguments):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return advance(*arguments)

    monkeypatch.setattr(execute, "advance", interrupted)
    said = talk(session, "Hello!", "What color is the sky?")
    assert said == ["Hello! How  (stopped)", ANSWERS[1]]
    assert session.messages[1] == {"role": "assistant", "content": "Hello! How "}


def test_ctrl_c_before_any_answer_leaves_no_trace(session):
    output = Interrupting(after=0)
    converse(session, reader(iter(["Hello!"])), output)
    assert [message["content"] for message in session.messages] == ["Hello!", "Hello! "]
    session.reset()

    def never(*_: object):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(execute, "advance", never)
        assert talk(session, "Hello!") == [" (stopped)"]
    assert session.messages == []


def reader(lines: Iterator[str | type[BaseException]]) -> Callable[[str], str]:
    def read(prompt: str) -> str:
        assert prompt == "> "
        line = next(lines, EOFError)
        if isinstance(line, str):
            return line
        raise line

    return read


def test_ctrl_c_at_the_prompt_says_how_to_end(session):
    output = io.StringIO()
    converse(session, reader(iter([KeyboardInterrupt, "Hello!"])), output)
    assert output.getvalue() == f"\n(/exit or Ctrl-D ends)\n{ANSWERS[0]}\n"


# Errors.


def test_a_full_context_is_told_and_the_chat_goes_on(session):
    said = talk(session, "Hello! " * 600, "What color is the sky?")
    assert "model's context 512; /reset starts anew" in said[0]
    assert said[1] == ANSWERS[1]
    assert len(session.messages) == 2


@pytest.mark.slow
def test_the_last_answer_gets_what_is_left_of_the_context(session, tokenizer):
    question = "Hello! " * 80
    room = 512 - len(tokenizer.apply_chat_template(
        [{"role": "user", "content": question.strip()}], add_generation_prompt=True, return_dict=True
    )["input_ids"])  # fmt: skip
    assert 0 < room < 256
    [said] = talk(session, question)
    assert not said.startswith("(")


def test_commands_that_cannot_be_done_are_told_and_the_chat_goes_on(session):
    lines = {
        "/save": "/save: usage: /save FILE", "/save  ": "/save: usage: /save FILE", "/seed": "/seed: usage: /seed N",
        "/seed x": "not an int", "/reset all": "usage: /reset", "/exit now": "usage: /exit", "/quit": "no such command",
        "/save ~nouser/x": "~nouser/x cannot be written", "/save .": "cannot be written",
        "/save a\0b": "cannot be written", "/save /nowhere/at/all": "cannot be written",
    }  # fmt: skip
    said = talk(session, *lines)
    assert len(said) == len(lines)
    for answer, expected in zip(said, lines.values(), strict=True):
        assert expected in answer


def test_a_tokenizer_without_a_template(model, tokenizer):
    tokenizer.chat_template = None
    said = talk(Session(model, tokenizer), "Hello!")
    assert "the tokenizer's chat template cannot write this chat: " in said[0]
    with pytest.raises(JaxgenError, match="chat template"):
        next(iter(Session(model, tokenizer).ask("Hello!")))


# The command.


def test_the_command(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{HELICOPTERS}\n/exit\n"))
    assert cli.main(["chat", "--system", THUG, "--no-do-sample"]) == 0
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == (THUG_REPLY + "\n", "")


def test_the_command_tells_a_fresh_seed_which_repeats(capsys, monkeypatch):
    arguments = ["chat", "--do-sample", "--temperature", "3", "--max-new-tokens", "9"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\n"))
    assert cli.main(arguments) == 0
    first = capsys.readouterr()
    seed = first.err.split("--seed ")[1].split()[0]
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\n"))
    assert cli.main([*arguments, "--seed", seed]) == 0
    assert capsys.readouterr() == (first.out, "")


def test_bad_options_of_the_command_are_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Hello!\n"))
    for arguments, message in ((["--top-p", "2"], "top_p=2.0"), (["--system", "\udcff"], "not UTF-8")):
        cli.main(["chat", "--do-sample", "--seed", "1", *arguments])
        captured = capsys.readouterr()
        assert message in captured.out + captured.err
        assert (captured.out + captured.err).count("\n") == 1


def test_input_that_is_no_text(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"/help\nsecret \xff\n"), encoding="utf-8"))
    assert cli.main(["chat"]) == 2
    assert capsys.readouterr().err == "jaxgen: the input: line 2, byte 8 (0xff) is not UTF-8 text\n"
