"""transformers' StopStringCriteria, live: for random rows, the same decision after every token."""

import numpy as np
import pytest
import torch
from transformers import StopStringCriteria

from jaxgen.generation.choosing.stop_strings import StopStrings
from tests.helpers import SLOTS, decisions
from tests.tokenizers import TOKENIZERS, VOCAB, byte_level, ids_of

pytestmark = pytest.mark.oracle


def of_hf(criterion: StopStringCriteria, ids: list[int], prompt: int) -> list[bool]:
    """What transformers decides after each token behind the prompt, the row alone."""
    rows = (torch.tensor([ids[: count + 1]]) for count in range(prompt, len(ids)))
    return [bool(criterion(row, None)) for row in rows]


def random_row(rng: np.random.Generator, tokenizer, silent: set[int]) -> tuple[list[str], list[int]]:
    """Stop strings, and tokens that are likely to say one: few different ones, special and unknown ones among them."""
    every = [index for index in sorted(tokenizer.get_vocab().values()) if index not in silent]
    some = [
        *rng.choice(every, rng.integers(1, 5)).tolist(),
        *rng.choice(list(tokenizer.added_tokens_decoder), 1).tolist(),
    ]
    if rng.random() < 0.3:
        some.append(VOCAB - 1)  # the model's, not the tokenizer's
    ids = rng.choice(some, rng.integers(2, SLOTS)).tolist()
    known = [index for index in ids if index != VOCAB - 1]
    text, strings = tokenizer.decode(known), []
    for _ in range(rng.integers(1, 4)):
        begin = rng.integers(0, len(text) + 1)
        strings.append(text[begin : begin + rng.integers(1, 9)].replace("\ufffd", "é") or "a")
    return strings, ids


@pytest.mark.parametrize("name", TOKENIZERS)
def test_decisions_equal_hf(name: str):
    tokenizer, rng, stopped, asked = TOKENIZERS[name](), np.random.default_rng(0), 0, 0
    silent = {index for token, index in tokenizer.get_vocab().items() if not token}
    for _ in range(120):
        strings, ids = random_row(rng, tokenizer, silent)
        try:
            criterion = StopStringCriteria(tokenizer, strings)
        except ValueError:  # no token ends any of them
            with pytest.raises(ValueError, match="no token ends any of them"):
                StopStrings.of(tokenizer, strings, VOCAB)
            continue
        prompt = int(rng.integers(0, len(ids)))
        expected = of_hf(criterion, ids, prompt)
        assert decisions(StopStrings.of(tokenizer, strings, VOCAB), ids, prompt) == expected, (strings, ids, prompt)
        stopped, asked = stopped + sum(expected), asked + len(expected)
    assert 0.1 * asked < stopped < 0.9 * asked


@pytest.mark.parametrize("name", TOKENIZERS)
def test_every_token_equals_hf(name: str):
    """Each token of the vocabulary, after three beginnings of a stop string."""
    tokenizer = TOKENIZERS[name]()
    strings = ["stop", " a", "s>", "é", "\nQ:", "</s>a"]
    criterion, stop = StopStringCriteria(tokenizer, strings), StopStrings.of(tokenizer, strings, VOCAB)
    tokens = np.arange(VOCAB)
    for before in ([], ids_of(tokenizer, "s", "t"), ids_of(tokenizer, "</s>")):
        rows = np.column_stack([*(np.full(VOCAB, index) for index in before), tokens]).astype(np.int32)
        state = stop.start(rows[:, :-1] if before else np.zeros((VOCAB, 1), np.int32), np.full(VOCAB, len(before)))
        expected = criterion(torch.from_numpy(rows).long(), None).numpy()
        np.testing.assert_array_equal(stop.advance(state, tokens)[1], expected)
        assert 0 < expected.sum() < VOCAB


def test_tokens_that_say_nothing_differ():
    """transformers looks at no more tokens than the stop string has bytes, the ones that say nothing included."""
    strings, ids = ["stop"], ids_of(byte_level(), b"st", b"", b"", b"", b"op")
    assert byte_level().decode(ids) == "stop"
    assert not of_hf(StopStringCriteria(byte_level(), strings), ids, 4)[0]
    assert decisions(StopStrings.of(byte_level(), strings, VOCAB), ids, 4) == [True]
    assert decisions(StopStrings.of(byte_level(), strings, VOCAB), ids, 0) == [False] * 4 + [True]


def test_the_empty_string_differs():
    """It stops every row at its first token in transformers; here it is refused."""
    assert of_hf(StopStringCriteria(byte_level(), [""]), ids_of(byte_level(), b"a"), 0) == [True]
    with pytest.raises(ValueError, match="is empty"):
        StopStrings.of(byte_level(), [""], VOCAB)
