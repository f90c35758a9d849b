"""An ordinary script for transformers where there is no torch: it runs, or one line says what to write instead."""

import json
import os
import re
import subprocess
import sys

import pytest

# transformers takes torch for absent, as `import torch` fails and nothing finds it.
HEAD = """
import sys
sys.modules["torch"] = None
"""

# The code of transformers' LLM tutorial; other than there: the first import's package, NAME, and return_tensors.
TUTORIAL = """
from jaxgen import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, demo, set_seed
NAME = str(demo.path())
quantization_config = BitsAndBytesConfig(load_in_4bit=True)
model = AutoModelForCausalLM.from_pretrained(NAME, device_map="auto", quantization_config=quantization_config)
tokenizer = AutoTokenizer.from_pretrained(NAME, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token
model_inputs = tokenizer(
    ["A list of colors: red, blue", "Portugal is"], return_tensors="jax", padding=True
).to(model.device)
generated_ids = model.generate(**model_inputs)
print(tokenizer.batch_decode(generated_ids, skip_special_tokens=True))

set_seed(0)
messages = [{"role": "user", "content": "Hello!"}]
model_inputs = tokenizer.apply_chat_template(
    messages, add_generation_prompt=True, return_tensors="jax", return_dict=True
).to(model.device)
input_length = model_inputs["input_ids"].shape[1]
generated_ids = model.generate(**model_inputs, do_sample=True, max_new_tokens=20)
print(tokenizer.batch_decode(generated_ids[:, input_length:], skip_special_tokens=True)[0])
"""

# Each line is an expression, or what raised.
LINES = """
import json
import jaxgen
import transformers
from transformers import pipeline  # which runs the package's first lines again

class Mine(transformers.LogitsProcessor):
    def __init__(self): pass
    def __call__(self, input_ids, scores): return scores

class Many(transformers.LogitsProcessor):
    def __init__(self): pass
    def __call__(self, *args): return args[-1]

class Stop(transformers.StoppingCriteria):
    def __init__(self): pass
    def __call__(self, input_ids, scores, **kwargs): return False

model = jaxgen.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path())
tokenizer = jaxgen.AutoTokenizer.from_pretrained(jaxgen.demo.path())
ids = [[1, 5, 9]]
said = {}
for line in json.load(sys.stdin):
    try:
        said[line] = str(eval(line))
    except jaxgen.JaxgenError as error:
        said[line] = f"error: {error}"
print(json.dumps(said))
"""

SAYS = {
    "model.generate(ids, logits_processor=[Mine()])": "error: logits_processor: .*two arguments.*f\\(tokens",
    "model.generate(ids, logits_processor=jaxgen.LogitsProcessorList([Many()]))": "error: .*two arguments.*f\\(tokens",
    "model.generate(ids, stopping_criteria=[Stop()])": "error: stopping_criteria: .*two arguments.*f\\(tokens",
    "model.generate(ids, logits_processor=[Mine])": "error: .*Mine is a class; pass an instance",
    "model.generate(ids, logits_processor=[transformers.LogitsProcessor])": "error: .*of transformers works on torch",
    "tokenizer('1, 2', return_tensors='pt')": "error: return_tensors='pt' needs torch; write return_tensors='np'",
    "tokenizer.encode('1, 2', return_tensors='pt')": "error: return_tensors='pt' needs torch",
    "tokenizer(['1', '1, 2'], return_tensors='jax')": "error: .*pass padding=True",
    "type(tokenizer.encode('1, 2', return_tensors='jax'))": "ArrayImpl",
    "type(tokenizer('1, 2').convert_to_tensors('jax', True)['input_ids'])": "ArrayImpl",
    "tokenizer(['1, 2'], return_tensors='jax').to(model.device)['input_ids'].shape": r"\(1, \d\)",
}


def run(code: str, given: str = "") -> subprocess.CompletedProcess:
    # Commands of jaxgen that other tests ran in this process have told transformers to be quiet.
    environment = {name: value for name, value in os.environ.items() if name != "TRANSFORMERS_VERBOSITY"}
    return subprocess.run(
        [sys.executable, "-c", code],
        check=False, input=given, capture_output=True, text=True, timeout=300, env=environment,
    )  # fmt: skip


@pytest.fixture(scope="module")
def said() -> dict[str, str]:
    done = run(HEAD + LINES, json.dumps(list(SAYS)))
    assert done.returncode == 0, done.stderr
    # "PyTorch was not found. Models won't be available" is what transformers would say
    assert done.stderr == ""
    return json.loads(done.stdout)


@pytest.mark.parametrize("line", SAYS)
def test_it_works_or_says_what_to_write(line: str, said: dict[str, str]):
    assert re.search(SAYS[line], said[line]), said[line]


@pytest.mark.slow
def test_the_tutorial_as_a_script():
    done = run(HEAD + TUTORIAL)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    batch, answer = done.stdout.splitlines()
    assert batch.startswith(
        "['A list of colors: red, blue, green, yellow, orange, purple, pink,', 'Portugal is a country"
    )
    assert answer


def test_what_transformers_says_otherwise_is_still_said():
    done = run(
        HEAD + "import jaxgen, logging, transformers; logging.getLogger('transformers').warning('something else')"
    )
    assert "something else" in done.stderr and "PyTorch" not in done.stderr
