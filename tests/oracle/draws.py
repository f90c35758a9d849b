"""Random small models and ragged batches, from a seed."""

import numpy as np

from tests.reference.cases import Case, v4_rope, v5_rope


def draw(seed: int) -> Case:
    """A random configuration, its weights' seed, and prompt lengths."""
    rng = np.random.default_rng([seed, 2026])
    kv_heads, groups = int(rng.integers(1, 4)), int(rng.integers(1, 5))
    head_dim = int(rng.choice([4, 8, 10, 16]))
    rope = (v4_rope, v5_rope)[rng.integers(2)](float(10 ** rng.uniform(3, 8)))
    config = {
        "model_type": "mistral",
        "vocab_size": int(rng.integers(50, 300)),
        "hidden_size": int(rng.integers(20, 70)),
        "intermediate_size": int(rng.integers(30, 90)),
        "num_hidden_layers": int(rng.integers(1, 4)),
        "num_attention_heads": kv_heads * groups,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "rms_norm_eps": float(10 ** rng.uniform(-6, -2)),
        "sliding_window": [None, 1, int(rng.integers(2, 12)), int(rng.integers(12, 60))][rng.integers(4)],
        "tie_word_embeddings": bool(rng.integers(2)),
        "max_position_embeddings": 256,
        "bos_token_id": 1,
        "eos_token_id": 2,
        **rope,
    }
    lengths = tuple(int(n) for n in rng.integers(1, 21, rng.integers(1, 6)))
    return Case(config, 1000 + seed, lengths)
