"""What a method will take on this machine, said before it takes it."""

import logging
import time

import jax
import numpy as np

from jaxgen.models.config import DecoderConfig

from .forward import Hidden, Weights, batches, output

logger = logging.getLogger("jaxgen.convert")


def say_cost(
    config: DecoderConfig, weights: Weights, hidden: Hidden, *, method: str, passes: float, layers: int
) -> None:
    """Log how long `layers` layers like this one will take; `passes` is how often the text goes through each."""
    seconds = passes * layers * seconds_of_a_pass(config, weights, hidden)
    text = f"{len(hidden)} sequences of {hidden.shape[1]} tokens"
    logger.info(
        "%s looks at %s in each of %d layers: about %s, and some for compiling", method, text, layers, duration(seconds)
    )


def seconds_of_a_pass(config: DecoderConfig, weights: Weights, hidden: Hidden) -> float:
    """How long the text takes through a layer: the best of a few measurements on its first sequences, compiled."""
    few, seconds = next(batches(hidden))[0], []
    for _ in range(4):
        start = time.perf_counter()
        jax.block_until_ready(output(config, weights, few))
        seconds.append(time.perf_counter() - start)
        if sum(seconds) > 60 and len(seconds) > 1:  # a large model on a slow machine
            break
    return min(seconds) * len(hidden) / len(few)


def duration(seconds: float) -> str:
    """In the unit that one would say it in.

    >>> duration(0.3), duration(70), duration(1000), duration(20_000)
    ('1 s', '70 s', '17 minutes', '6 hours')
    """
    for unit, size in (("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.0f} {unit}"
    return f"{max(1, np.ceil(seconds)):.0f} s"
