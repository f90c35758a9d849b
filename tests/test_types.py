"""What type checkers are told of `generate`: the same options as the table has, with the types that are taken."""

import dataclasses
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np
import pytest
from beartype import BeartypeConf
from beartype.door import is_bearable

from jaxgen.errors import JaxgenError
from jaxgen.generation.options.config import GenerationConfig
from jaxgen.generation.options.table import ARGUMENTS, OPTIONS
from jaxgen.generation.options.typed import (
    BatchArguments,
    CallArguments,
    GenerateOptions,
    PipelineArguments,
    StreamArguments,
    WarmupOptions,
)
from jaxgen.text.pipeline import Options

TYPES = get_type_hints(GenerateOptions)
TOWER = BeartypeConf(is_pep484_tower=True)
SAMPLES: tuple[Any, ...] = (
    *(True, np.True_, 1, np.int64(1), 0.5, np.float32(0.5), "never", "static", "other", 1j, object()),
    *([1, 2], (1, 2), np.array([1, 2]), [[1, 2]], ((1,), (2,)), ["a"], [], {}, {(1, 2): 0.5}),
    *([[[1, 2], 0.5]], {"bias": 1.0}),
)


def fits(value: Any, name: str) -> bool:
    return is_bearable(value, TYPES[name], conf=TOWER)


def loose(value: Any, name: str) -> bool:
    return len(value) == 0 or name in ("sequence_bias", "exponential_decay_length_penalty", "watermarking_config")


def test_every_option_has_a_type():
    assert TYPES.keys() == OPTIONS.keys() | ARGUMENTS.keys() | {"cache", "use_cache"}


@pytest.mark.parametrize(
    ("taken", "written_out"),
    [
        (CallArguments, {"return_dict_in_generate"}),
        (StreamArguments, {"tokenizer"}),
        (PipelineArguments, {"tokenizer"}),
        (BatchArguments, {"tokenizer", "return_dict_in_generate"}),
        (WarmupOptions, {"max_new_tokens"}),
    ],
)
def test_every_function_has_every_option(taken: type, written_out: set[str]):
    own = get_type_hints(taken)
    assert not written_out & own.keys()  # or there would be two of one name
    assert TYPES.keys() <= own.keys() | written_out


def test_a_pipeline_has_every_option_of_its_own():
    assert {field.name for field in dataclasses.fields(Options)} <= get_type_hints(PipelineArguments).keys()


@pytest.mark.parametrize("name", OPTIONS)
def test_what_an_option_takes_is_what_its_type_says(name: str):
    assert fits(None, name) and fits(OPTIONS[name].default, name) and fits(OPTIONS[name].off, name)
    for value in SAMPLES:
        try:
            GenerationConfig(**{name: value})
        except JaxgenError:
            # To Python's types True is an int, an empty list as good as another, and a pair no different from a list.
            vague = value is True or (isinstance(value, list | tuple | dict | np.ndarray) and loose(value, name))
            assert vague or not fits(value, name), value
        else:
            assert fits(value, name), value


PROGRAM = """
import jax
import numpy as np
import jaxgen
from jaxgen.generation.options.typed import GenerateOptions

def right(model: jaxgen.LlamaForCausalLM, ids: np.ndarray, config: jaxgen.GenerationConfig, encoded: dict[str, object]):
    model.generate([[1, 5]], max_new_tokens=5).shape
    model.generate(ids, ids > 0, do_sample=True, seed=[1, 2], row_ids=["a", "b"], top_p=0.9, top_k=np.int64(5)).shape
    model.generate(jax.numpy.asarray(ids), key=jax.random.key(0), eos_token_id=[1, 2], temperature=1).astype(int)
    model.generate(encoded, stop_strings="a", tokenizer=object(), early_stopping="never", use_cache=True).tolist()
    model.generate(ids, logits_processor=[lambda tokens, lengths, logits: logits], top_k=None).shape
    model.generate(ids, prefix_allowed_tokens_fn=lambda row, tokens: [1]).shape
    model.generate(ids, assistant_model=model, strict=jaxgen.Strict(rows=4)).shape
    out = model.generate(ids, return_dict_in_generate=True, output_scores=True)
    model.generate(ids, past_key_values=out.past_key_values).shape
    print(out.sequences.shape, out.logprobs, out.finish_reason[0])
    model.generate(ids, generation_config=config, return_dict_in_generate=False).shape
    options: GenerateOptions = {"max_new_tokens": 5, "top_p": 0.9}
    either = model.generate(ids, **options)
    print(either.shape if isinstance(either, np.ndarray) else either.sequences)
    list(model.stream("A text", chunk_size=2, max_new_tokens=5, skip_special_tokens=False))
    list(model.stream([[{"role": "user", "content": "A chat"}]], seed=0))
    model.warmup(1, 10, 20, do_sample=True)
    generator = jaxgen.pipeline("text-generation", model=model)
    generator("A text", max_new_tokens=5, return_full_text=False)[0]["generated_text"]
    generator([[{"role": "user", "content": "A chat"}], "A text"], batch_size=2, seed=0).record
    next(generator((text for text in ["A text"]), do_sample=False))[0]["generated_text"]

def wrong(model: jaxgen.LlamaForCausalLM, ids: np.ndarray, config: jaxgen.GenerationConfig):
    model.generate(ids, max_new_token=5)  # no such option
    model.generate(ids, max_new_tokens=0.5)
    model.generate(ids, top_p="0.9")
    model.generate(ids, do_sample="yes")
    model.generate(ids, cache_implementation="dynamic")
    model.generate(ids, early_stopping="always")
    model.generate(ids, use_cache=False)
    model.generate(ids, stop_strings=5)
    model.generate(ids, streamer=print)
    model.generate(ids, logits_processor=[lambda tokens, logits: logits])
    model.generate("A text")
    model.generate(["A text"])
    model.generate([1, 5])
    model.generate(ids, seed="1")
    model.generate(ids, key=1)
    model.generate(ids, row_ids=1)
    model.generate(ids).sequences
    model.generate(ids, return_dict_in_generate=True).shape
    model.generate(ids, return_dict_in_generate=True).sequence
    model.generate(ids, generation_config=config).shape  # the config may say either
    model.stream(5)
    model.stream("A text", max_new_token=5)
    model.stream("A text", skip_special_tokens="no")
    model.warmup(1, 10, 20, do_samples=True)
    jaxgen.AutoModelForCausalLM.from_pretrained("a").generate(ids, max_new_token=5)
    jaxgen.AutoModelForCausalLM.from_config({}).generate(ids, max_new_token=5)
    jaxgen.pipeline(model=model)(5)
    jaxgen.pipeline(model=model)("A text", max_new_token=5)
    jaxgen.pipeline(model=model)("A text", return_full_text="no")
    options: GenerateOptions = {"max_new_tokens": "5"}
"""


def test_a_type_checker_knows_right_uses_from_wrong_ones(tmp_path: Path):
    pyright = shutil.which("pyright", path=str(Path(sys.executable).parent)) or shutil.which("pyright")
    if pyright is None:
        pytest.skip("pyright is in the extra `lint`, and not installed here")
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = (pyright, "--outputjson", "--pythonpath", sys.executable, str(program))
    ran = subprocess.run(command, check=False, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    found = json.loads(ran.stdout)
    errors = {told["range"]["start"]["line"]: told["message"] for told in found["generalDiagnostics"]}
    lines = PROGRAM.split("\n")
    first = next(i for i, line in enumerate(lines) if line.startswith("def wrong"))
    assert {i: message for i, message in errors.items() if i <= first} == {}
    missed = [line for i, line in enumerate(lines) if i > first and line and i not in errors]
    assert missed == []
