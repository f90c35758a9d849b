"""`JaxgenLM` against lm-eval's own `hf` model on the same checkpoint: the same number for every request."""

import copy
import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import processors

import jaxgen
from jaxgen import JaxgenError, Strict
from jaxgen.cli import main
from tests.lm_eval_tasks import datasets_in, responses, same, write_tasks
from tests.pages import DOCS, run_blocks
from tests.reference.cases import CASES
from tests.reference.weights import write_checkpoint
from tests.tokenizers import VOCAB, byte_fallback

pytest.importorskip("lm_eval", reason="needs the extra `eval`")

from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM

import jaxgen.integrations.lm_eval as ours
from jaxgen.integrations.lm_eval import JaxgenLM

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # of the libraries that lm-eval brings along
]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tasks(tmp_path_factory.mktemp("tasks"))


@pytest.fixture(scope="module")
def quiet(tmp_path_factory: pytest.TempPathFactory):
    with datasets_in(tmp_path_factory.mktemp("datasets")):
        yield


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model with a tokenizer of Llama's kind, which writes BOS and spaces before a text."""
    config = {**CASES["window_8"].config, "vocab_size": VOCAB, "max_position_embeddings": 64}
    path = write_checkpoint(tmp_path_factory.mktemp("llama") / "model", config, 5)
    tokenizer = copy.deepcopy(byte_fallback())
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.add_special_tokens({"bos_token": "<s>", "eos_token": "</s>"})
    tokenizer.save_pretrained(path)
    return path


def pair(path: Path, **options: Any) -> tuple[JaxgenLM, HFLM]:
    both = {"batch_size": 3, "dtype": "float32", "device": "cpu", **options}
    return JaxgenLM(str(path), **both), HFLM(str(path), **both)


def requests(kind: str, *arguments: Any) -> list[Instance]:
    return [Instance(kind, {}, args, index, ("task", index, 1)) for index, args in enumerate(arguments)]


@pytest.mark.parametrize("options", [{}, {"apply_chat_template": True, "system_instruction": "Be short."}])
def test_tasks_have_the_responses_of_hf(options: dict[str, Any], tasks: Path, quiet: None):
    mine, theirs = pair(jaxgen.demo.path(), max_length=160)
    expected = responses(theirs, tasks, **options)
    same(responses(mine, tasks, **options), expected)
    assert len({text for [[text]] in expected["until"]}) >= 3


@pytest.fixture(scope="module")
def pairs(llama: Path):
    made: dict[str, tuple[JaxgenLM, HFLM]] = {}

    def get(**options: Any) -> tuple[JaxgenLM, HFLM]:
        key = str(options)
        if key not in made:
            made[key] = pair(llama, **options)
        return made[key]

    return get


PAIRS = [
    ("", "a stop"),  # no context
    ("", "<s>a stop"),  # the prefix token is there already
    ("she ", " stopped at"),  # spaces at the end of a context belong to what follows
    ("she\n", "opera"),
    ("<s>she", " stopped"),  # the text says BOS itself
    ("she", "pped"),  # the two together are other tokens
    ("日本 she " * 20, " hers at last"),  # the context is cut
    ("", "stop " * 12),  # nearly as long as the context
    ("she", " a"), ("she", " st"), ("she", " b"), ("she", " 日"),  # one token each, after the same
]  # fmt: skip


@pytest.mark.parametrize("options", [{}, {"add_bos_token": False}, {"prefix_token_id": 5, "max_length": 20}], ids=str)
def test_quirks_of_the_tokenizer(options: dict[str, Any], pairs: Any):
    mine, theirs = pairs(**options)
    asked = requests("loglikelihood", *PAIRS[: 7 if "max_length" in options else None])
    same(mine.loglikelihood(asked), theirs.loglikelihood(asked))
    texts = requests("loglikelihood_rolling", ("she stopped at the opera " * 12,), ("",), ("<s>a",), ("é\n",))
    same(mine.loglikelihood_rolling(texts), theirs.loglikelihood_rolling(texts))
    options = {"until": ["st", "é", "\n"], "max_gen_toks": 10}
    for texts in (["she", "a s", "日本 she " * 20, "b "], ["<s>her"]):  # `hf` gives texts beside these no BOS either
        begun = requests("generate_until", *[(text, options) for text in texts])
        assert mine.generate_until(begun) == theirs.generate_until(begun)


def sampled(lm: JaxgenLM, order: list[int]) -> dict[int, str]:
    """What is sampled for some requests, two of which are the same one repeated."""
    options = {"until": ["\n"], "max_gen_toks": 12, "do_sample": True, "temperature": 20.0}
    asked = requests("generate_until", *[(text, options) for text in ("she", "a s", "1, 2, 3", "b ")])
    asked = [asked[0], *asked]
    return dict(zip(order, lm.generate_until([asked[place] for place in order]), strict=True))


def test_what_is_sampled_does_not_depend_on_the_order(llama: Path):
    lm = JaxgenLM(str(llama), batch_size=2, seed=1)
    first = sampled(lm, [0, 1, 2, 3, 4])
    assert first[0] != first[1]  # repetitions of a request
    assert sampled(lm, [0, 1, 4, 3, 2]) == first
    assert sampled(JaxgenLM(lm.model, batch_size=2, seed=2), [0, 1, 2, 3, 4]) != first


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_strict_gives_the_same_bits_at_every_batch_size(dtype: str, llama: Path):
    model = jaxgen.AutoModelForCausalLM.from_pretrained(llama, dtype=dtype)
    asked = requests("loglikelihood", *PAIRS)
    texts = requests("generate_until", *[(text, {"until": ["st"], "max_gen_toks": 8}) for text, _ in PAIRS[2:6]])
    found = []
    for size, order in ((1, 1), (3, -1), (8, 1)):
        lm = JaxgenLM(model, tokenizer=str(llama), batch_size=size, strict=Strict(rows=8, tokens=64))
        found.append((lm.loglikelihood(asked[::order])[::order], lm.generate_until(texts[::order])[::order]))
    assert found[1] == found[0] and found[2] == found[0]


def test_the_order_of_requests_changes_no_bit(pairs: Any):
    lm, _ = pairs()
    asked = requests("loglikelihood", *PAIRS)
    assert lm.loglikelihood(asked[::-1])[::-1] == lm.loglikelihood(asked)


def test_auto_halves_the_batch_where_memory_is_short(pairs: Any, monkeypatch: pytest.MonkeyPatch):
    lm = JaxgenLM(pairs()[0].model, batch_size="auto:4", max_batch_size=16)
    asked, sizes = requests("loglikelihood", *PAIRS), []
    expected = lm.loglikelihood(asked)
    scores_of = ours.scores_of

    def short_of_memory(model: Any, rows: Any) -> Any:
        sizes.append(len(rows))
        if len(rows) > 2:
            raise RuntimeError("RESOURCE_EXHAUSTED: out of memory")
        return scores_of(model, rows)

    monkeypatch.setattr(ours, "scores_of", short_of_memory)
    same(lm.loglikelihood(asked), expected)
    assert 2 < max(sizes) <= 16
    with pytest.raises(RuntimeError, match="RESOURCE_EXHAUSTED"):
        JaxgenLM(lm.model, batch_size=4).loglikelihood(asked)


def test_thoughts_are_left_out(pairs: Any):
    lm, _ = pairs()
    tokens = lm.tokenizer("she</s>her hers")["input_ids"]
    for end in (2, "2"):
        assert JaxgenLM(lm.model, think_end_token=end)._text(tokens, []) == "her hers"
    assert JaxgenLM(lm.model, think_end_token="her")._text(lm.tokenizer("she her hers")["input_ids"], []) == "s"


BAD: dict[str, dict[str, Any]] = {
    "batch_size='many' must be an int": {"batch_size": "many"},
    "batch_size=9 is more than the 8 rows of strict": {"batch_size": 9, "strict": True},
    "max_length=65 is more than the model's context of 64": {"max_length": 65},
    "max_gen_toks=0 must be an int of at least 1": {"max_gen_toks": 0},
    "dtype='float32' is for loading a model": {"dtype": "float32"},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_arguments(message: str, pairs: Any):
    with pytest.raises(JaxgenError, match=message):
        JaxgenLM(pairs()[0].model, **BAD[message])


def test_bad_requests(pairs: Any):
    lm, _ = pairs()
    with pytest.raises(JaxgenError, match="request 1: an empty continuation"):
        lm.loglikelihood(requests("loglikelihood", ("a", "b"), ("a", "")))
    with pytest.raises(JaxgenError, match=r"request 0: a continuation of \d+ tokens"):
        lm.loglikelihood(requests("loglikelihood", ("", "stop " * 50)))
    for options, message in [({"max_gen_toks": 64}, "leaves no room"), ({"n_gram": 3, "max_gen_toks": 8}, "n_gram")]:
        with pytest.raises(JaxgenError, match=message):
            lm.generate_until(requests("generate_until", ("she", options)))


def test_the_page_shows_what_happens(
    quiet: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """Here, since the tests of all pages run without lm-eval."""
    monkeypatch.chdir(tmp_path)
    assert run_blocks(DOCS / "howto" / "evaluation.md", capsys)


def test_the_command_prints_the_table_and_writes_the_results(
    tasks: Path, quiet: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    command = ["eval", "--include-path", str(tasks), "--no-compile-cache", "--set", "bootstrap_iters=0"]
    output = tmp_path / "results.json"
    assert main([*command, "--tasks", "choices", "--limit", "2", "--output", str(output)]) == 0
    assert "|acc_norm|" in capsys.readouterr().out
    written = json.loads(output.read_text())
    assert written["results"]["choices"]["acc,none"] == 0.5 and written["config"]["limit"] == 2
    for arguments, message in [
        (["--tasks", "nowhere"], "--tasks nowhere: lm-eval has no such task"),
        (["--tasks", "choices", "--set", "n=1"], "--set n=...: simple_evaluate of lm-eval has no such option"),
        (["--tasks", "choices", "--limit", "0"], "--limit 0 must be more than 0"),
        (["--tasks", "choices", "--output", str(tmp_path / "no" / "where")], "there is no directory"),
        (["--tasks", "choices", "--batch-size", "x"], "batch_size='x' must be an int"),
    ]:
        assert main([*command, *arguments]) == 2
        assert message in capsys.readouterr().err
