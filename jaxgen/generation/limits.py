"""How long a generation may be: what was asked for, what the model was made for, what fits into memory."""

from typing import Any

from jaxgen.attention import query_block
from jaxgen.config import MistralConfig
from jaxgen.errors import JaxgenError
from jaxgen.generation.config import DEFAULT_NEW_TOKENS, GenerationConfig
from jaxgen.generation.prompt import largest_bucket

_SHOWN = 1_000_000_000


def new_token_budget(config: GenerationConfig, width: int, longest: int, context: int) -> int:
    """How many new tokens each row may get.

    `max_new_tokens` wins over `max_length`, which counts the prompt's `width` with its padding, as in HF; with
    neither, DEFAULT_NEW_TOKENS within the context. `longest` is the longest prompt in real tokens. Raises
    `JaxgenError` where nothing would be left to generate, and where prompt and new tokens exceed the model's
    `context` (max_position_embeddings). Source: transformers `GenerationMixin._prepare_generated_length`.
    """
    if longest >= context:
        raise JaxgenError(f"the prompt has {longest} tokens; the model's context of {context} leaves no room for more")
    if config.max_new_tokens is not None:
        budget = config.max_new_tokens
        asked = f"max_new_tokens={budget}"
    elif config.max_length is not None:
        budget = config.max_length - width
        asked = f"max_length={config.max_length}"
        if budget <= 0:
            raise JaxgenError(
                f"{asked} leaves nothing to generate after a prompt of width {width}; set max_new_tokens instead"
            )
    else:
        budget = min(DEFAULT_NEW_TOKENS, context - longest)
        asked = f"the default of {budget} new tokens"
    if longest + budget > context:
        raise JaxgenError(
            f"a prompt of {longest} tokens and {asked} exceed the model's context of {context} tokens; "
            f"at most {context - longest} new tokens fit"
        )
    if config.min_new_tokens and config.min_new_tokens > budget:
        raise JaxgenError(
            f"min_new_tokens={config.min_new_tokens} is more than the {budget} tokens that {asked} allows"
        )
    return budget


def check_memory(
    config: MistralConfig, itemsize: int, prompts: int, samples: int, length: int, total: int, device: Any
) -> None:
    """Raise `JaxgenError`, saying how many new tokens fit, if the key-value cache or the prefill outgrow the device.

    `length` and `total` are the (bucketed) sizes of the prompt and of prompt and new tokens together. What the
    prefill needs besides the cache is an estimate of its largest arrays.
    """
    free = free_bytes(device)
    if free is None:
        return
    rows = prompts * samples
    per_slot = rows * kv_bytes_per_token(config, itemsize)
    working = prefill_bytes(config, itemsize, prompts, length)
    needed = per_slot * config.cache_slots(total) + working
    if needed <= free:
        return
    room = largest_bucket(max(free - working, 0) // per_slot) - length
    advice = f"at most {room} new tokens fit" if room > 0 else "use fewer rows or a shorter prompt"
    raise JaxgenError(
        f"{rows} rows of {total} tokens (prompt and new tokens, rounded up) need {needed / _SHOWN:.2f} GB for "
        f"the key-value cache and the prefill, and {free / _SHOWN:.2f} GB are free on {device}; {advice}"
    )


def prefill_bytes(config: MistralConfig, itemsize: int, prompts: int, length: int) -> int:
    """About what reading the prompts takes beside weights and cache: attention scores, activations and logits."""
    scores = 2 * 4 * config.num_attention_heads * query_block(length) * length
    activations = itemsize * length * (2 * config.intermediate_size + 4 * config.hidden_size)
    logits = 3 * 4 * config.vocab_size
    return prompts * (scores + activations + logits)


def kv_bytes_per_token(config: MistralConfig, itemsize: int) -> int:
    """Bytes of keys and values that one token of one row takes in all layers."""
    return 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_size * itemsize


def free_bytes(device: Any) -> int | None:
    """Memory that can still be allocated on a jax device, or None where nobody says."""
    if device.platform == "cpu":
        return _available_host_bytes()
    try:
        stats = device.memory_stats()
    except RuntimeError:  # a backend that does not keep count
        return None
    if not stats or "bytes_limit" not in stats:
        return None
    return stats["bytes_limit"] - stats.get("bytes_in_use", 0)


def _available_host_bytes() -> int | None:
    try:
        with open("/proc/meminfo", encoding="ascii") as lines:
            sizes = dict(line.split(":", 1) for line in lines)
        return int(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        return None  # not Linux
