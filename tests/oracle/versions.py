"""What the oldest transformers that is supported (5.15) computes otherwise than 5.24, whose rules jaxgen follows."""

from typing import Any

import pytest
import transformers
from packaging.version import Version

OLD = Version(transformers.__version__) < Version("5.24")
# What 5.24 mended, each with what it was before:
#   repetition_penalty                  penalises the padding of a batch
#   exponential_decay_length_penalty    makes NaN of an eos that is ruled out
#   bad_words_ids                       refuses token 0
#   bad_words_ids, sequence_bias        a sequence is not looked for in a row that is shorter than it by its last token
#   encoder_repetition_penalty          reaches the first beam of a prompt alone
#   prefix_allowed_tokens_fn            an allowed set without a finite score is an error
#   the watermark's detector            counts repeated n-grams by the identity of tensors; approximate p-values
since_5_24 = pytest.mark.skipif(OLD, reason="transformers computes it since 5.24 (tests/oracle/versions.py)")


# Which of them random rows would come across.
OTHERWISE = {"exponential_decay_length_penalty", "bad_words_ids", "sequence_bias"} if OLD else set()
OTHERWISE_IN_BEAMS = {"encoder_repetition_penalty"} if OLD else set()


def comparable(options: dict[str, Any]) -> dict[str, Any]:
    """Options without those that the installed transformers carries out otherwise, for each row alone."""
    if not OLD:
        return options
    kept = {name: value for name, value in options.items() if name != "exponential_decay_length_penalty"}
    if "bad_words_ids" in kept:
        kept["bad_words_ids"] = [words for words in kept["bad_words_ids"] if 0 not in words] or [[1]]
    return kept
