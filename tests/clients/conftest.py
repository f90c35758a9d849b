"""One server for all clients, and the model that it serves, which says what they must get."""

from collections.abc import Callable
from typing import Any

import httpx2 as httpx
import pytest

import jaxgen
from jaxgen import demo
from jaxgen.text.inputs import encode
from jaxgen.text.tokenizer import load_tokenizer
from tests.serving import serving, wait_until_ready

Expected = Callable[..., list[tuple[str, list[float]]]]


@pytest.fixture(scope="session")
def url():
    with serving("--rows", "4", "--slots", "256") as url:
        wait_until_ready(url)
        yield url


@pytest.fixture(scope="session")
def expected(url: str) -> Expected:
    """What `generate` gives in the server's shape, as texts with the model's log-probabilities: of a text or a chat."""
    model = jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")
    tokenizer = load_tokenizer(demo.path())
    [entry] = httpx.get(f"{url}/v1/models", timeout=60).json()["data"]
    strict = jaxgen.Strict(**entry["fingerprint_of"]["engine"])

    def get(prompt: Any, **options: Any) -> list[tuple[str, list[float]]]:
        ids = encode(tokenizer, prompt)["input_ids"]
        options = {"do_sample": "seed" in options, "top_k": 0, "strict": strict, "tokenizer": tokenizer, **options}
        out = model.generate([ids], return_dict_in_generate=True, **options)
        found = []
        for row, count in enumerate(out.lengths):
            new = out.sequences[row, len(ids) : len(ids) + count]
            said = tokenizer.decode(new, skip_special_tokens=True)
            found.append((said, out.model_logprobs[row, :count].tolist()))
        return found

    return get
