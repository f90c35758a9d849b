"""Where the seeds of calls come from that name none: the operating system, or one number for a whole script."""

import numpy as np

from jaxgen.errors import JaxgenError

_of_script: list[np.random.SeedSequence] = []  # one, once `set_seed` was called


def set_seed(seed: object) -> None:
    """Decide the randomness of every later call that samples without `key` and `seed`, as HF's function does.

    The first such call, the second, and so on each have a seed of their own, the same in every run of a script (and
    `out.seed` says which). Raises `JaxgenError` for what is no int of at least 0.

    >>> model, _ = getfixture("demo")
    >>> runs = []
    >>> for _ in range(2):
    ...     set_seed(42)
    ...     runs.append(model.generate([[1, 5]], do_sample=True, max_new_tokens=4).tolist())
    >>> runs[0] == runs[1]
    True
    """
    if not isinstance(seed, int | np.integer) or isinstance(seed, bool) or seed < 0:
        raise JaxgenError(f"set_seed: seed={seed!r:.60} must be an int of at least 0")
    _of_script[:] = [np.random.SeedSequence(int(seed))]


def next_seed() -> int:
    """The seed of a call that was given none: 32 bits."""
    source = _of_script[0].spawn(1)[0] if _of_script else np.random.SeedSequence()
    return int(source.generate_state(1)[0])
