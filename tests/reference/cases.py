"""The models, prompts and options of the reference, shared by the script that makes it and by the tests."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from tests.reference.weights import integers

NEW_TOKENS = 64
PAD = 0  # also drawn as an ordinary prompt token: padding is what the mask says, not what the id says

_BASE = {
    "architectures": ["MistralForCausalLM"],
    "model_type": "mistral",
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-5,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def v4_rope(theta: float) -> dict[str, Any]:
    """How transformers 4 writes the RoPE base."""
    return {"rope_theta": theta, "rope_scaling": None, "torch_dtype": "bfloat16", "transformers_version": "4.36.0"}


def v5_rope(theta: float) -> dict[str, Any]:
    """How transformers 5 writes the RoPE base."""
    rope = {"rope_type": "default", "rope_theta": theta}
    return {"rope_parameters": rope, "dtype": "float32", "transformers_version": "5.23.0"}


@dataclass(frozen=True)
class Case:
    """One model: its config.json, the seed of weights and prompts, and the prompt lengths."""

    config: Mapping[str, Any]
    seed: int
    lengths: tuple[int, ...]

    def prompts(self) -> list[list[int]]:
        """One list of ids per row."""
        stream = np.random.PCG64(10_000 + self.seed)
        return [integers(stream, self.config["vocab_size"], n).tolist() for n in self.lengths]


def _case(seed: int, lengths: tuple[int, ...], **fields: Any) -> Case:
    return Case({**_BASE, **fields}, seed, lengths)


CASES: dict[str, Case] = {
    "one_layer": _case(31, (1, 5, 20), num_hidden_layers=1, **v4_rope(1e4)),
    "gqa_1": _case(2, (3, 1, 17, 9), num_key_value_heads=4, **v4_rope(1e4)),
    "gqa_4": _case(3, (20, 2, 11), num_key_value_heads=1, **v5_rope(1e4)),
    "gqa_8": _case(
        4,
        (7, 1, 12, 4, 19),
        hidden_size=64,
        num_attention_heads=8,
        num_key_value_heads=1,
        eos_token_id=14,
        **v5_rope(1e4),
    ),
    "wide_heads": _case(25, (6, 13, 2), head_dim=16, vocab_size=131, **v4_rope(1e6)),
    "narrow_heads": _case(6, (16, 8, 1), hidden_size=48, head_dim=6, num_hidden_layers=3, **v5_rope(1e6)),
    "tied": _case(7, (10, 1, 4, 18), tie_word_embeddings=True, vocab_size=257, **v5_rope(1e4)),
    "tied_wide": _case(8, (5, 14, 3), tie_word_embeddings=True, hidden_size=64, head_dim=32, **v4_rope(1e8)),
    "theta_1e6": _case(9, (2, 19, 7), num_hidden_layers=3, vocab_size=131, **v4_rope(1e6)),
    "theta_1e8": _case(10, (12, 1, 20), hidden_size=64, vocab_size=257, **v5_rope(1e8)),
    "window_8": _case(11, (20, 1, 8, 9), sliding_window=8, **v4_rope(1e4)),
    "window_8_deep": _case(12, (7, 16, 2), sliding_window=8, num_hidden_layers=3, head_dim=16, **v5_rope(1e6)),
    "window_32": _case(13, (18, 3, 1, 12, 20), sliding_window=32, num_key_value_heads=1, **v5_rope(1e4)),
    "large_eps": _case(14, (9, 15, 1), rms_norm_eps=0.1, intermediate_size=96, **v4_rope(1e4)),
}


@dataclass(frozen=True)
class Run:
    """One call of `generate` on a case; nobody stops unless `options` says so."""

    case: str
    options: Mapping[str, Any] = field(default_factory=dict)
    own_eos: bool = False  # stop at the eos_token_id of the checkpoint's config.json

    def arguments(self) -> dict[str, Any]:
        """What both libraries' `generate` is called with."""
        length = {} if "max_length" in self.options else {"max_new_tokens": NEW_TOKENS}
        eos = {} if self.own_eos else {"eos_token_id": None}
        return {"do_sample": False, "pad_token_id": PAD, **length, **eos, **self.options}

    def eos(self) -> list[int]:
        """The ids that end a row."""
        eos = CASES[self.case].config["eos_token_id"] if self.own_eos else self.arguments()["eos_token_id"]
        return [] if eos is None else eos if isinstance(eos, list) else [eos]


RUNS: dict[str, Run] = {
    **{name: Run(name) for name in CASES},
    # Rows that end at different steps (one at step 1, some never), so that finished rows pad and others go on.
    "gqa_8/eos": Run("gqa_8", {"eos_token_id": 66}),
    # All rows end early, one at its first token: the output is as wide as the longest row.
    "tied/eos_list": Run("tied", {"eos_token_id": [163, 250]}),
    # Without a generation_config.json, the eos of config.json counts.
    "gqa_8/own_eos": Run("gqa_8", own_eos=True),
    # The padding id ends a row, and occurs in prompts, where it must end nothing.
    "gqa_1/eos_is_pad": Run("gqa_1", {"eos_token_id": PAD}),
    "window_8/eos_in_prompt": Run("window_8", {"eos_token_id": 1}),
    "window_8/min_new_tokens": Run("window_8", {"eos_token_id": 81, "min_new_tokens": 10}),
    "gqa_8/repetition_penalty": Run("gqa_8", {"repetition_penalty": 1.3}),
    "window_8/repetition_reward": Run("window_8", {"repetition_penalty": 0.8}),
    "tied/repetition_penalty_min_new_tokens": Run(
        "tied", {"repetition_penalty": 1.3, "min_new_tokens": 20, "eos_token_id": [163, 250]}
    ),
    # Without a pad_token_id, finished rows are filled with the first eos.
    "gqa_8/no_pad": Run("gqa_8", {"eos_token_id": [66, 14], "pad_token_id": None}),
    # Without any length, 20 tokens follow the prompt.
    "gqa_1/no_length": Run("gqa_1", {"max_new_tokens": None}),
}

# Runs whose chosen tokens' log-probabilities (of the processed scores) are kept as well.
LOG_PROBS = ("gqa_8", "window_8", "gqa_8/repetition_penalty")


def left_padded(prompts: list[list[int]], width: int | None = None) -> tuple[np.ndarray, np.ndarray]:
    """`input_ids` and `attention_mask` as Hugging Face takes them: padding on the left."""
    width = width or max(map(len, prompts))
    ids, mask = np.full((2, len(prompts), width), PAD, np.int32)
    mask[:] = 0
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = prompt
        mask[row, width - len(prompt) :] = 1
    return ids, mask


def right_padded(prompts: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Padding on the right."""
    ids, mask = left_padded([prompt[::-1] for prompt in prompts])
    return ids[:, ::-1].copy(), mask[:, ::-1].copy()


def with_holes(prompts: list[list[int]], junk: int) -> tuple[np.ndarray, np.ndarray]:
    """Masked columns before, between and after the real ones, holding the id `junk`."""
    width = max(map(len, prompts)) + 5
    ids, mask = np.full((len(prompts), width), junk, np.int32), np.zeros((len(prompts), width), np.int32)
    for row, prompt in enumerate(prompts):
        spare = width - len(prompt)
        # Spread the real tokens evenly: column of token p, starting one or two columns in.
        columns = [1 + row % 2 + p + p * (spare - 3) // len(prompt) for p in range(len(prompt))]
        ids[row, columns], mask[row, columns] = prompt, 1
    return ids, mask
