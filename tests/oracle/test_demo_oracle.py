"""The demo checkpoint in transformers on torch: the same tokens, greedily, in float32."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM as HFAutoModelForCausalLM
from transformers import AutoTokenizer

from jaxgen import demo
from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.demo.train import HELICOPTERS, THUG

pytestmark = pytest.mark.oracle

PROMPTS = (
    "A list of colors: red, blue",
    "Portugal is",
    "A sequence of numbers: 1, 2",
    "1, 2, 3",
    "A, B, C, D, E",
    "I am a cat.",
    f"{HELICOPTERS} Reply as a thug.",
    "France is",
    "Monday, Tuesday",
    "2 + 2 =",
    "",
)


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.path())


@pytest.fixture(scope="module")
def both(tokenizer):
    """Generate with both libraries; returns (jaxgen's, transformers') tokens."""
    ours = AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    theirs = HFAutoModelForCausalLM.from_pretrained(demo.path(), dtype=torch.float32)

    def both(inputs, **options) -> tuple[np.ndarray, np.ndarray]:
        tensors = {name: torch.tensor(np.asarray(value)) for name, value in inputs.items()}
        expected = theirs.generate(**tensors, do_sample=False, **options)
        return np.asarray(ours.generate(**inputs, do_sample=False, **options)), expected.numpy()

    return both


# transformers warns that 20 new tokens are its default; that default is what is compared here.
@pytest.mark.filterwarnings("ignore:Using the model-agnostic default `max_length`:UserWarning")
@pytest.mark.parametrize("prompt", PROMPTS)
def test_one_prompt(both, tokenizer, prompt):
    np.testing.assert_array_equal(*both(tokenizer([prompt], return_tensors="np")))


@pytest.mark.parametrize("new_tokens", [20, 70])
def test_all_prompts_left_padded(both, tokenizer, new_tokens):
    inputs = tokenizer(list(PROMPTS), padding=True, return_tensors="np")
    np.testing.assert_array_equal(*both(inputs, max_new_tokens=new_tokens))


def test_counting_from_everywhere(both, tokenizer):
    prompts = [f"A sequence of numbers: {n}, {n + 1}" for n in range(1, 91)]
    inputs = tokenizer(prompts, padding=True, return_tensors="np")
    np.testing.assert_array_equal(*both(inputs, max_new_tokens=50))


@pytest.mark.parametrize(
    "turns",
    [
        [("system", THUG), ("user", HELICOPTERS)],
        [("user", "Hello!")],
        [("user", "What color is the sky?"), ("assistant", "The sky is blue."), ("user", "What color is grass?")],
    ],
    ids=["thug", "hello", "turns"],
)
def test_chats(both, tokenizer, turns):
    messages = [{"role": role, "content": content} for role, content in turns]
    inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="np", return_dict=True)
    np.testing.assert_array_equal(*both(inputs, max_new_tokens=60))
