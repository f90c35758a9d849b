"""What a call needs of the device's memory, and what is free."""

import dataclasses
from typing import Any

from jaxgen.attention import query_block
from jaxgen.cache import Slots, of_layers
from jaxgen.errors import JaxgenError
from jaxgen.generation.programs.inputs import BatchLayout
from jaxgen.generation.prompts.layout import largest_bucket
from jaxgen.models.protocol import ModelConfig

_SHOWN = 1_000_000_000


def check_memory(
    model: Any,
    shape: tuple[int, int],
    layout: BatchLayout,
    assistant: Any = None,
    *,
    guided: bool = False,
    past: bool = False,
    reserved: int = 0,
) -> None:
    """Raise `JaxgenError`, saying how many new tokens fit, if caches, prefill and what is recorded outgrow the device.

    `shape` is that of the padded prompts; with `guided` there are as many negative ones; `past` is one of an earlier
    call; `reserved` are the bytes of an engine's room for constraints. What the prefill needs besides the cache is an
    estimate of its largest arrays.
    """
    free = free_bytes(model.device)
    if free is None:
        return
    needs = _needs(model, shape, layout, assistant, guided, past, reserved)
    if needs.cache + needs.working > free:
        raise _too_much(needs, free, model, shape, layout)


@dataclasses.dataclass(frozen=True)
class _Needs:
    """Bytes that a call takes."""

    rows: int  # with those of negative prompts
    parts: int  # into which a mesh divides the cache
    cache: int
    recorded: int  # scores and logits, which are returned
    drafting: int
    reserved: int
    processing: int  # prompts, an assistant, a past

    @property
    def working(self) -> int:
        """All that is beside the cache."""
        return self.recorded + self.drafting + self.reserved + self.processing


def _needs(
    model: Any, shape: tuple[int, int], layout: BatchLayout, assistant: Any, guided: bool, past: bool, reserved: int
) -> _Needs:
    config, itemsize, static = model.config, model.dtype.itemsize, layout.static
    prompts, length = shape
    batch = 2 * prompts if guided else prompts
    rows = batch * layout.samples
    mesh, parts = getattr(model, "layout", None), 1
    if mesh is not None and model.device.platform != "cpu":  # CPUs share a host
        parts = mesh.parts("rows") * mesh.parts("heads")
    cache = rows * cache_bytes(config, itemsize, layout.slots, layout.int8_cache) // parts
    tables = static.record_scores + static.record_logits
    piece = layout.chunk or layout.fresh  # a piece at a time, against every slot
    processing = (
        prefill_bytes(config, itemsize, batch, piece, piece, _most(config, layout.slots))
        if piece
        else prefill_bytes(config, itemsize, batch, length, query_block(length), length)
    )
    if past:  # in the rows and slots of this call, on the way
        processing += cache
    if assistant is not None:
        slots = assistant_slots(assistant.config, layout)
        own = cache_bytes(assistant.config, assistant.dtype.itemsize, slots, layout.int8_cache)
        processing += prompts * layout.samples * own
    return _Needs(
        rows,
        parts,
        cache,
        recorded=4 * prompts * layout.samples * static.recorded * config.vocab_size * tables,
        drafting=_drafting_bytes(config, itemsize, rows, layout),
        reserved=reserved,
        processing=processing,
    )


def _too_much(needs: _Needs, free: int, model: Any, shape: tuple[int, int], layout: BatchLayout) -> JaxgenError:
    """What takes most of it, and what to do."""
    config, static, rows, device = model.config, layout.static, needs.rows, model.device
    if needs.reserved > free // 2:
        return JaxgenError(
            f"constraints of {rows} rows reserve {needs.reserved / _SHOWN:.2f} GB, and {free / _SHOWN:.2f} GB are free "
            f"on {device}; lower Engine(constraints=(states, classes)), or None"
        )
    if needs.recorded > free // 2:
        return JaxgenError(
            f"output_scores and output_logits of {static.recorded} steps need {needs.recorded / _SHOWN:.2f} GB, and "
            f"{free / _SHOWN:.2f} GB are free on {device}; top_logprobs=n keeps the n best tokens of every step"
        )
    if static.drafts and needs.drafting > free // 2:
        name = "prompt_lookup_num_tokens" if static.prompt_lookup else "num_assistant_tokens"
        return JaxgenError(
            f"{rows} rows that process {static.drafts} drafts at a time need {needs.drafting / _SHOWN:.2f} GB, and "
            f"{free / _SHOWN:.2f} GB are free on {device}; lower {name}"
        )
    # Layers with the most slots grow with the rows; beside them, those with a window stay as they are.
    counts = of_layers(layout.slots, config.num_hidden_layers)
    growing = [count for count in counts if count == max(counts)]
    slot = cache_bytes(config, model.dtype.itemsize, 1, layout.int8_cache)
    per_layer = rows * slot // len(counts) // needs.parts or 1
    others = per_layer * (sum(counts) - sum(growing))
    room = largest_bucket(max(free - needs.working - others, 0) // (per_layer * len(growing))) - shape[1]
    advice = f"at most {room} new tokens fit" if room > 0 else "use fewer rows or a shorter prompt"
    needed = needs.cache + needs.working
    return JaxgenError(
        f"{rows} rows of {layout.total} tokens (prompt and new tokens, rounded up) need {needed / _SHOWN:.2f} GB for "
        f"the key-value cache and the prefill, and {free / _SHOWN:.2f} GB are free on {device}; {advice}"
    )


def _drafting_bytes(config: ModelConfig, itemsize: int, rows: int, layout: BatchLayout) -> int:
    """About what a decode step takes beside the cache: the logits, and with drafts what processing them all takes."""
    tokens = layout.static.drafts + 1
    logits = 4 * rows * tokens * config.vocab_size
    return logits + (
        prefill_bytes(config, itemsize, rows, tokens, tokens, _most(config, layout.slots)) if tokens > 1 else 0
    )


def assistant_slots(config: Any, layout: BatchLayout) -> Slots:
    """Cache slots of an assistant: it takes two tokens at a time, after having written up to T that were rejected."""
    return config.cache_slots(layout.total, ahead=max(layout.chunk, layout.static.drafts + 2))


def prefill_bytes(config: ModelConfig, itemsize: int, prompts: int, length: int, queries: int, slots: int) -> int:
    """About what processing the prompts takes beside weights and cache: attention scores, activations and logits.

    `length` tokens at a time, of which `queries` look at `slots` others at a time.
    """
    scores = 2 * 4 * config.num_attention_heads * queries * slots
    activations = itemsize * length * (2 * config.intermediate_size + 4 * config.hidden_size)
    logits = 3 * 4 * config.vocab_size
    return prompts * (scores + activations + logits)


def kv_bytes_per_token(config: ModelConfig, itemsize: int, int8: bool = False) -> int:
    """Bytes of keys and values that one token of one row takes in all layers."""
    per_head = config.head_size + 4 if int8 else config.head_size * itemsize
    return 2 * config.num_hidden_layers * config.num_key_value_heads * per_head


def cache_bytes(config: ModelConfig, itemsize: int, slots: Slots, int8: bool = False) -> int:
    """Bytes of the cache of one row, with so many slots in every layer, or in each."""
    counts = of_layers(slots, config.num_hidden_layers)
    return kv_bytes_per_token(config, itemsize, int8) // len(counts) * sum(counts)


def usual_length(config: Any) -> int:
    """A length to speak of: the context, but not the 131,072 tokens that configs claim by default."""
    return min(config.max_position_embeddings, 4096)


def _most(config: ModelConfig, slots: Slots) -> int:
    """The slots of the largest layer."""
    return max(of_layers(slots, config.num_hidden_layers))


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
