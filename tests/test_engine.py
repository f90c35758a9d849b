"""The engine: a request's tokens and log-probabilities are those of `generate`, whatever else it does meanwhile."""

import contextlib
import re
import subprocess
import sys
import threading
import time
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import jaxgen
from jaxgen import EngineClosedError, EngineFullError, JaxgenError, NonFiniteLogitsError, UnsupportedError, demo
from jaxgen.generation.prompts import memory
from tests.engines import KINDS, alone, found, prompt_of, tiny
from tests.helpers import counted, some_slow
from tests.tokenizers import characters

# Few sets of options, since `generate` compiles each; their numbers are of each request.
OPTIONS = [
    {"do_sample": False},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "top_k": 5, "top_p": 0.9, "temperature": 0.8, "repetition_penalty": 1.2, "min_new_tokens": 3},
    {"do_sample": True, "top_k": 90, "min_p": 0.02, "temperature": 1.7, "no_repeat_ngram_size": 2},
    {"do_sample": True, "top_k": 0, "frequency_penalty": 0.7, "presence_penalty": 0.4},
]
# With and without an end within the new tokens; one has many states, one that the end token alone ends.
CONSTRAINED = [
    {"do_sample": False, "constraint": jaxgen.regex("(s|st|op)*")},
    {"do_sample": False, "constraint": jaxgen.choice(["stopper", "opera", "at"])},
    {**OPTIONS[2], "constraint": jaxgen.regex("(he|she)( (to|st|a)+){1,9}")},
    {**OPTIONS[2], "constraint": jaxgen.regex("(a|b|é)+(日本)?")},
]


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def engine(model):
    with jaxgen.Engine(model, characters(), rows=4, slots=64, chunk=8, steps=3, constraints=(48, 24)) as engine:
        yield engine


requests = st.tuples(
    st.integers(1, 40),  # tokens of the prompt
    st.sampled_from([0, 8, 16, 19]),  # of which so many are those of all
    st.integers(3, 24),  # new tokens
    st.sampled_from(OPTIONS + CONSTRAINED),
    st.integers(0, 3),  # seed
    st.sampled_from(["", "", "", "cancel", "wait"]),  # what happens after it
)


def carried_out(model, engine, plan):
    """Submit a plan, and compare each request with what `generate` gives."""
    handles = []
    for length, shared, new, kind, seed, then in plan:
        prompt, sampled = prompt_of(length, shared), kind["do_sample"]
        options = {**kind, "max_new_tokens": new, **({"seed": seed} if sampled else {})}
        handles.append((prompt, options, engine.submit(prompt, **options), then))
        if then == "wait":
            handles[-1][2].result(timeout=300)
        if then == "cancel":
            handles[-1][2].cancel()
    for prompt, options, handle, then in handles:
        got, wanted = found(handle), alone(model, engine, prompt, **options)
        if then == "cancel" and got[3] == "cancelled":
            assert got[0] == wanted[0][: len(got[0])]
            assert wanted[1].startswith(got[1])
        else:
            assert got == wanted


@pytest.mark.parametrize("kind", some_slow(KINDS, lambda kind: kind != "window", lambda kind: kind == "float32"))
def test_any_schedule_gives_the_bits_of_generate(kind):
    """Any order of arrival, crowd and cancellations; prompts that share a beginning; and once more after a restart."""
    model, tokenizer = tiny(**KINDS[kind]), characters()
    plans = []

    with jaxgen.Engine(model, tokenizer, rows=4, slots=64, chunk=8, steps=3, constraints=(64, 24)) as engine:

        @settings(max_examples=12, deadline=None, derandomize=True)
        @given(st.lists(requests, min_size=1, max_size=8))
        def check(plan):
            plans.append(plan)
            carried_out(model, engine, plan)

        check()
        # Whether the plans above share anything is a matter of time: these arrive while the first one is read.
        carried_out(model, engine, [(30, 24, 3, OPTIONS[0], seed, "go on") for seed in range(6)])
        assert engine.stats()["prefix_tokens"] > 0
    with jaxgen.Engine(model, tokenizer, rows=4, slots=64, chunk=8, steps=5) as again:
        carried_out(model, again, plans[-1])


def mixed(engine, number):
    handles = []
    for index in range(number):
        options = {**OPTIONS[index % 5], "max_new_tokens": 3 + index % 7, "temperature": 0.5 + index % 5 / 4}
        options = options if options["do_sample"] else {"max_new_tokens": 1 + index % 7}
        options |= {"sequence_bias": {(3, 4): 2.0, (index % 97,): -1.0}} if index % 6 == 5 else {}
        options |= {"constraint": jaxgen.regex(f"(st|op|a){{1,{1 + index % 9}}}")} if index % 4 == 3 else {}
        handles.append(engine.submit(prompt_of(1 + index % 40, 8 * (index % 3)), **options))
    return [handle.result(timeout=600) for handle in handles]


@pytest.mark.parametrize("number", some_slow([60, 1000], lambda number: number > 100))
def test_nothing_compiles_after_the_warmup(engine, number):
    engine.wait_until_ready()
    with counted() as compilations:
        assert all(done.token_ids for done in mixed(engine, number))
    assert not compilations


def test_a_shared_beginning_is_read_once(model):
    """Rows that arrive together wait for the one that reads it; one that comes later copies it."""
    shared = prompt_of(40, 40)
    with jaxgen.Engine(model, rows=4, slots=64, chunk=8) as engine:
        handles = [engine.submit([*shared, token], max_new_tokens=3) for token in (5, 6, 7, 8)]
        handles.append(engine.submit([*shared, 9], max_new_tokens=3))
        for token, handle in zip((5, 6, 7, 8, 9), handles, strict=True):
            assert found(handle) == alone(model, engine, [*shared, token], max_new_tokens=3)
        assert engine.stats()["prefix_tokens"] == 4 * 40


def test_rows_end_as_in_generate(model, engine):
    """By the end token, by the limit, without an end token; and by a stop string, of each row its own."""
    ids = prompt_of(5, 0)
    first = alone(model, engine, ids, max_new_tokens=12)[0]
    for end in (first[2], [first[4], 96], None):
        options = {"max_new_tokens": 12, "eos_token_id": end}
        assert found(engine.submit(ids, **options)) == alone(model, engine, ids, **options)


def test_stop_strings_of_each_row():
    model = jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    text, stops = "1, 2, 3, 4", (["7", "9, 1"], ["8"], None)
    with jaxgen.Engine(model, rows=4, slots=64, chunk=16) as engine:
        ids = engine.tokenizer(text)["input_ids"]
        handles = [engine.submit(text, max_new_tokens=20, stop_strings=stop) for stop in stops]
        for stop, handle in zip(stops, handles, strict=True):
            wanted = alone(model, engine, ids, max_new_tokens=20, stop_strings=stop, tokenizer=engine.tokenizer)
            assert found(handle) == wanted
        without = engine.submit(text, max_new_tokens=20, stop_strings=stops[0], include_stop_str_in_output=False)
        assert "".join(without) == without.result().text == ", 5, 6, "
        chat = engine.submit([{"role": "user", "content": "Hi"}], max_new_tokens=4)
        assert "".join(chat) == chat.result().text


def test_the_best_tokens_of_each_step(model):
    ids = prompt_of(9, 0)
    with jaxgen.Engine(model, rows=2, slots=64, chunk=8, top_logprobs=5) as engine:
        tokens = engine.submit(ids, max_new_tokens=10, top_logprobs=3).result().tokens
        assert engine.submit(ids, max_new_tokens=3).result().tokens.top_ids is None
        with pytest.raises(JaxgenError, match="top_logprobs=6 is more than the 5"):
            engine.submit(ids, top_logprobs=6)
        out = model.generate(
            [ids], max_new_tokens=10, strict=engine.strict, return_dict_in_generate=True, top_logprobs=3
        )
    assert tokens.top_ids is not None and tokens.top_logprobs is not None
    assert tokens.top_ids.tolist() == out.top_ids[0].tolist()
    assert tokens.top_logprobs.tobytes() == out.top_logprobs[0].tobytes()


def test_samples_and_row_ids_are_those_of_a_call(model, engine):
    ids = prompt_of(7, 0)
    options = {"do_sample": True, "seed": 9, "max_new_tokens": 6}
    samples = model.generate([ids], num_return_sequences=3, **options)[:, 7:]
    assert [engine.submit(ids, sample=i, **options).result().token_ids for i in range(3)] == samples.tolist()
    rows = model.generate([ids, ids], row_ids=["a", 5], **options)[:, 7:]
    assert [engine.submit(ids, row_id=i, **options).result().token_ids for i in ("a", 5)] == rows.tolist()
    outputs = model.generate_batch([ids, ids[:3]], num_return_sequences=2, **options)
    both = model.generate([ids, [0] * 4 + ids[:3]], [[1] * 7, [0] * 4 + [1] * 3], num_return_sequences=2, **options)
    assert [output.generated_tokens for output in outputs.values()] == both[:, 7:].tolist()
    assert [*outputs] == ["req_0", "req_1", "req_2", "req_3"]
    assert model.generate_batch([]) == {}


def test_a_constraint_holds_and_ends_a_row(engine):
    """The text is one of those that match, and the reason to end says whether it is whole."""
    said = {}
    for name, constraint, new in (
        ("whole", jaxgen.choice(["stopper", "opera"]), 12),
        ("whole at the limit", jaxgen.regex("a+"), 5),
        ("not whole before the limit", jaxgen.regex("(a|b)*c"), 6),
    ):
        options = {"max_new_tokens": new, "constraint": constraint, "do_sample": True, "seed": 3, "eos_token_id": None}
        said[name] = engine.submit([5, 6, 7], **options).result(60)
    assert [done.finish_reason for done in said.values()] == ["complete"] * 3
    assert said["whole"].text in ("stopper", "opera")
    assert re.fullmatch("a{5,10}", said["whole at the limit"].text)
    assert re.fullmatch("[ab]*c", said["not whole before the limit"].text)
    ended = engine.submit([5, 6, 7], constraint=jaxgen.regex("a*"), max_new_tokens=5, sequence_bias={(2,): 99.0})
    assert ended.result(60).finish_reason == "eos"


def test_constraints_that_cannot_be_are_refused(model, engine):
    with pytest.raises(UnsupportedError, match="a grammar, which the host reads"):
        engine.submit([5], constraint=jaxgen.grammar('start: "(" start ")" | "a"'))
    with pytest.raises(JaxgenError, match=r"has 51 states and \d+ classes of tokens, and a row has room for 48 and 24"):
        engine.submit([5], constraint=jaxgen.regex("a{50}"))
    with pytest.raises(JaxgenError, match="the shortest text takes 4 tokens, and there is room for 3"):
        engine.submit([5], constraint=jaxgen.regex("e{4}"), max_new_tokens=3)
    with pytest.raises(JaxgenError, match="a list of 2, and there are 1 prompts"):
        engine.submit([5], constraint=[jaxgen.regex("a")] * 2)
    with jaxgen.Engine(model, characters(), rows=1, slots=64, constraints=None) as without:
        with pytest.raises(UnsupportedError, match="no room for any"):
            without.submit([5], constraint=jaxgen.regex("a"))
        assert without.submit([5], max_new_tokens=1).result(60).token_ids
    with pytest.raises(JaxgenError, match=r"constraints\[1\]=0"):
        jaxgen.Engine(model, constraints=(64, 0))


def test_room_for_constraints_counts_as_memory(model, engine, monkeypatch: pytest.MonkeyPatch):
    assert engine.room is not None
    arrays = jax.tree.leaves(engine.room.automata)
    assert engine.room.bytes == sum(x.nbytes for x in arrays)
    monkeypatch.setattr(memory, "free_bytes", lambda device: 50_000_000)
    with pytest.raises(JaxgenError, match=r"constraints of 4 rows reserve 0.10 GB, and 0.05 GB are free .*lower"):
        jaxgen.Engine(model, rows=4, slots=64, constraints=(12288, 512))
    monkeypatch.setattr(memory, "free_bytes", lambda device: 11_000_000)
    large: dict[str, Any] = {"rows": 4, "slots": 1024, "chunk": 64, "steps": 0}
    with pytest.raises(JaxgenError, match="steps=0"):  # which is looked at later: there is enough memory
        jaxgen.Engine(model, **large, constraints=None)
    with pytest.raises(JaxgenError, match=r"0.01 GB for the key-value cache"):  # but not for both
        jaxgen.Engine(model, **large, constraints=(512, 512))


REFUSED = {
    "beams": ({"num_beams": 2}, "num_beams=2: not in this engine"),
    "an option that rows cannot have": ({"top_h": 0.5, "do_sample": True}, "top_h=0.5"),
    "one that this engine has not": ({"min_p": 0.5, "do_sample": True}, "processors="),
    "a prompt that never fits": ({"max_new_tokens": 60}, "5 tokens and 60 new ones are more than the 64 slots"),
    "two seeds": ({"seed": [1, 2], "do_sample": True}, "a request is one row"),
    "samples": ({"num_return_sequences": 2, "do_sample": True}, "once for each sample="),
    "a processor": ({"logits_processor": [lambda *x: x[2]]}, "logits_processor: not in an engine"),
    "a wrong name": ({"temprature": 1.0}, "did you mean 'temperature'"),
    "a token outside": ({"sequence_bias": {(97,): 1.0}}, "token 97 is outside"),
    "too long a bias": ({"sequence_bias": {(*range(9),): 1.0}}, "up to 9 tokens"),
    "many ends": ({"eos_token_id": [1, 2, 3, 4, 5]}, "5 ids"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_be_is_refused_at_once(model, what):
    options, says = REFUSED[what]
    with (
        jaxgen.Engine(model, rows=2, slots=64, chunk=8, processors=("temperature", "sequence_bias")) as engine,
        pytest.raises(JaxgenError, match=says),
    ):
        engine.submit(prompt_of(5, 0), **options)


def test_a_full_queue_refuses_and_goes_on(model):
    with jaxgen.Engine(model, rows=1, slots=64, chunk=8, queue=2) as engine:
        engine.wait_until_ready()
        real, go_on = engine._batch._programs, threading.Event()
        engine._batch._programs = real._replace(decode=lambda *given: go_on.wait(60) and real.decode(*given))
        first = engine.submit([5], max_new_tokens=60, eos_token_id=None)
        while engine.stats()["busy"] == 0:
            time.sleep(0.01)
        more = [engine.submit([5], max_new_tokens=2) for _ in range(2)]
        with pytest.raises(EngineFullError, match="2 requests wait already"):
            engine.submit([5])
        more[0].cancel()
        first.cancel()
        go_on.set()
        assert first.result(60).finish_reason == more[0].result(60).finish_reason == "cancelled"
        assert len(more[1].result(60).token_ids) == 2
        with pytest.raises(JaxgenError, match="no tokenizer"):
            engine.submit("text")


def test_closing_finishes_or_cancels(model):
    engine = jaxgen.Engine(model, rows=1, slots=64, chunk=8)
    handles = [engine.submit([5, number], max_new_tokens=5, eos_token_id=None) for number in range(3)]
    engine.close()
    assert [len(handle.result(0).token_ids) for handle in handles] == [5, 5, 5]
    with pytest.raises(EngineClosedError, match="closed"):
        engine.submit([5])

    engine = jaxgen.Engine(model, rows=1, slots=64, chunk=8)
    handles = [engine.submit([5, number], max_new_tokens=50, eos_token_id=None) for number in range(30)]
    engine.close(timeout=0)
    assert handles[-1].result(0).finish_reason == "cancelled"
    assert jaxgen.Engine(model, rows=1, slots=64).close() is None


@pytest.mark.parametrize("during", ["decode", "read"])
def test_a_cancelled_row_is_free_within_two_chunks_of_steps(model, during):
    """Cancelled in the middle of a chunk, or while its prompt is read; and who waits has the row next."""
    with jaxgen.Engine(model, rows=1, slots=64, chunk=8, steps=2) as engine:
        engine.wait_until_ready()
        wanted = engine.submit([7, 9], max_new_tokens=3, eos_token_id=None).result(60).token_ids
        batch, real, calls, busy = engine._batch, engine._batch._programs, [], []

        def cancels(name):
            def program(*given):
                calls.append(name)
                if calls.count(during) == 2:
                    row.cancel()
                return getattr(real, name)(*given)

            return program

        def tell():
            if row.done and not busy:
                busy.append(len(calls))  # when it ended

        batch._programs = real._replace(decode=cancels("decode"), read=cancels("read"))
        row = engine.submit([5] * 40, max_new_tokens=20, eos_token_id=None)
        row.listen(tell)
        behind = engine.submit([7, 9], max_new_tokens=3, eos_token_id=None)
        assert row.result(60).finish_reason == "cancelled"
        at = [place for place, name in enumerate(calls) if name == during][1] + 1
        assert len(row.result(60).token_ids) == (4 if during == "decode" else 0)
        assert "read" not in calls[at : busy[0]] and calls[at : busy[0]].count("decode") < 2
        assert behind.result(60).token_ids == wanted
        engine.close()
        assert engine.stats()["busy"] == engine.stats()["queue"] == 0


def test_a_time_limit_ends_a_row_wherever_it_is(model):
    with jaxgen.Engine(model, rows=1, slots=64, chunk=8) as engine:
        engine.wait_until_ready()
        assert engine.submit([5], max_time=1e-9).result(60).finish_reason == "time"
        assert len(engine.submit([5], max_new_tokens=2, max_time=60).result(60).token_ids) == 2


def test_nan_in_one_row_ends_that_row_alone(model):
    """A token whose embedding is NaN: who holds it fails, and its neighbours have the tokens that they have alone."""
    broken = tiny()
    weight = broken.model.embed_tokens.weight
    weight[...] = weight[...].at[42].set(jnp.nan)
    with jaxgen.Engine(broken, rows=4, slots=64, chunk=8) as engine:
        options = {"max_new_tokens": 20, "eos_token_id": None, "sequence_bias": {(42,): -100.0}}
        clean = [[number, 9, 11] for number in (5, 6, 7)]
        handles = [engine.submit(ids, **options) for ids in clean]
        with pytest.raises(NonFiniteLogitsError):
            engine.submit([5, 42, 9], **options).result(60)
        for ids, handle in zip(clean, handles, strict=True):
            assert handle.result(60).token_ids == engine.submit(ids, **options).result(60).token_ids
            assert len(handle.result(60).token_ids) == 20


def test_a_failed_step_ends_its_requests_and_the_engine_goes_on(model, monkeypatch):
    with jaxgen.Engine(model, rows=2, slots=64, chunk=8) as engine:
        wanted = engine.submit([5, 6], max_new_tokens=4).result(60).token_ids
        batch, real = engine._batch, engine._batch._programs

        def fails(*_):
            raise RuntimeError("the device is on fire")

        batch._programs = real._replace(decode=fails)
        with pytest.raises(RuntimeError, match="on fire"):
            engine.submit([5, 6], max_new_tokens=4).result(60)
        batch._programs = real
        assert engine.submit([5, 6], max_new_tokens=4).result(60).token_ids == wanted

        batch._programs = real._replace(decode=fails)  # twice in a row: it ends, and nobody waits for ever
        with pytest.raises(EngineClosedError, match="on fire"):
            for _ in range(9):
                with contextlib.suppress(RuntimeError):
                    engine.submit([5, 6], max_new_tokens=4).result(60)


def test_a_script_that_forgets_to_close_it_ends():
    script = """
import jaxgen
engine = jaxgen.Engine(jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path()), rows=2, slots=512, chunk=16)
handle = engine.submit("1, 2, 3", max_new_tokens=500)
print(len(next(handle.parts()).ids) > 0)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True\n", "")


def test_from_many_threads(model, engine):
    results = {}

    def client(number):
        ids = prompt_of(3 + number, 0)
        results[number] = [engine.submit(ids, max_new_tokens=4).result(60).token_ids for _ in range(3)]

    threads = [threading.Thread(target=client, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, found_ids in results.items():
        assert found_ids == [alone(model, engine, prompt_of(3 + number, 0), max_new_tokens=4)[0]] * 3


def test_unknown_names_of_processors(model):
    with pytest.raises(JaxgenError, match="'top_h' is none that an engine has"):
        jaxgen.Engine(model, processors=("top_h",))


def test_what_decides_nothing_here_may_stay_in_a_configuration(engine):
    """Checkpoints have fields for beams and drafts, and a name for the cache that there is."""
    kept = {"early_stopping": True, "length_penalty": 2.0, "num_assistant_tokens": 5, "cache_implementation": "static"}
    config = jaxgen.GenerationConfig(**kept, max_new_tokens=3)
    assert (
        engine.submit([5], generation_config=config).result(60).token_ids
        == engine.submit([5], max_new_tokens=3).result(60).token_ids
    )


def test_unsupported_says_so(engine):
    with pytest.raises(UnsupportedError, match=r"use model\.generate"):
        engine.submit([5], suppress_tokens=[7])
