"""An ordinary script for transformers, run there and here: what README says is different is all that is."""

import io
from contextlib import redirect_stdout

import pytest

import jaxgen

pytestmark = pytest.mark.oracle

SCRIPT = """
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(NAME, device_map="auto", dtype="float32")
model.eval()
tokenizer = AutoTokenizer.from_pretrained(NAME, padding_side="left")
tokenizer.pad_token = tokenizer.eos_token

inputs = tokenizer(["A list of colors: red, blue", "Portugal is"], padding=True, return_tensors="pt").to(model.device)
model.generation_config.pad_token_id = tokenizer.pad_token_id
ids = model.generate(**inputs, max_new_tokens=12)
print(tokenizer.batch_decode(ids, skip_special_tokens=True))
print(tokenizer.batch_decode(ids[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
print(tokenizer.decode(ids[1], skip_special_tokens=True), inputs.input_ids.shape[0])

inputs = tokenizer("1, 2, 3", return_tensors="pt").to(model.device)
outputs = model(**inputs, labels=inputs["input_ids"])
print(outputs.logits[:, -1].argmax(-1).tolist(), outputs["logits"][0, -1].argmax().item(), f"{outputs.loss.item():.4f}")
logits, next_token = model(**inputs).logits, model(**inputs)[0][:, -1, :].argmax(-1)
print(tuple(logits.shape), tokenizer.decode(next_token))

chat = [{"role": "user", "content": "Hello!"}]
inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
out = model.generate(**inputs.to(model.device), max_new_tokens=10, return_dict_in_generate=True, output_scores=True)
print(tokenizer.decode(out.sequences[0]), len(out.scores), model.num_parameters(), model.config.num_hidden_layers)
"""


@pytest.mark.parametrize("tensors", ["np", "jax"])
def test_an_ordinary_script_differs_as_the_readme_says(tensors: str):
    # The import line and return_tensors; with jaxgen's AutoTokenizer `.to` stays.
    ours = SCRIPT.replace("from transformers import", "from jaxgen import").replace('"pt"', repr(tensors))
    said = []
    for script in (SCRIPT, ours):
        with redirect_stdout(io.StringIO()) as out:
            exec(script, {"NAME": str(jaxgen.demo.path())})
        said.append(out.getvalue())
    assert said[0] == said[1]
    assert "red, blue, green" in said[0]
