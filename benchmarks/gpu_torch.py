"""transformers and torch on the GPU, for `gpu.py`, which runs this and collects its rows: one JSON object per line."""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch
import transformers

SHAPES = {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
GROUP, COPIES, STEPS = 128, 8, 64


def emit(**row: Any) -> None:
    print(json.dumps(row), flush=True)


def attempt(what: dict[str, Any], deadline: float, seconds: float, measure: Callable[[], dict[str, Any]]) -> None:
    left = deadline - time.monotonic()
    if left < seconds:
        emit(**what, skipped=f"{left:.0f} s left")
        return
    try:
        emit(**what, **measure())
    except Exception as error:
        emit(**what, error=f"{type(error).__name__}: {error}"[:300])


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def generate_row(model: Any, batch: int, prompt: int, **options: Any) -> dict[str, Any]:
    """Tokens per second of `generate` after the prompt: the difference between a long and a short call."""
    ids = torch.randint(0, model.config.vocab_size, (batch, prompt), device=model.device)

    def seconds(tokens: int) -> float:
        settings = {"max_new_tokens": tokens, "min_new_tokens": tokens, "do_sample": False, "pad_token_id": 0}
        synchronize()
        start = time.perf_counter()
        with torch.no_grad():
            model.generate(ids, attention_mask=torch.ones_like(ids), **settings, **options)
        synchronize()
        return time.perf_counter() - start

    start = time.perf_counter()
    seconds(8 + STEPS)
    warm = time.perf_counter() - start
    seconds(8 + STEPS)
    per_step = (min(seconds(8 + STEPS) for _ in range(2)) - min(seconds(8) for _ in range(2))) / STEPS
    return {
        "ms_per_step": round(1e3 * per_step, 3),
        "tokens_per_s": round(batch / per_step, 1),
        "warm_s": round(warm, 1),
    }


def int4_row(shape: tuple[int, int], rows: int) -> dict[str, Any]:
    """torch's own int4 product (tinygemm), in a CUDA graph over different weights."""
    columns, width = shape
    x = torch.randn(rows, width, dtype=torch.bfloat16, device="cuda")
    weights = []
    for _ in range(COPIES):
        codes = torch.randint(0, 255, (columns, width // 2), dtype=torch.uint8, device="cuda")
        scales = torch.full((width // GROUP, columns, 2), 0.01, dtype=torch.bfloat16, device="cuda")
        weights.append((torch._convert_weight_to_int4pack(codes, 8), scales))

    def chain() -> None:
        for packed, scales in weights:
            torch._weight_int4pack_mm(x, packed, GROUP, scales)

    chain()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        chain()
    graph.replay()
    synchronize()
    start = time.perf_counter()
    for _ in range(50):
        graph.replay()
    synchronize()
    seconds = (time.perf_counter() - start) / (50 * COPIES)
    read = columns * width // 2 + 2 * columns * width // GROUP * 2
    return {"us": round(1e6 * seconds, 2), "gb_s": round(read / seconds / 1e9, 1)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--until", type=float, default=time.monotonic() + 150, help="by time.monotonic()")
    options = parser.parse_args()
    deadline = options.until
    device = "cuda" if torch.cuda.is_available() else "cpu"
    sizes = {"sliding_window": None, "max_position_embeddings": 32768}
    if options.tiny:
        sizes |= {"vocab_size": 1024, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
                  "num_attention_heads": 4, "num_key_value_heads": 2}  # fmt: skip
    if device == "cuda":
        for layer, shape in SHAPES.items():
            for rows in (1, 8, 32):
                what = {"form": "torch._weight_int4pack_mm", "layer": layer, "rows": rows}
                attempt(what, deadline, 3, lambda s=shape, r=rows: int4_row(s, r))
    torch.set_default_dtype(torch.bfloat16 if device == "cuda" else torch.float32)
    with torch.device(device):
        model = transformers.MistralForCausalLM(transformers.MistralConfig(**sizes)).eval()
    prompt = 512 - STEPS // 2 if not options.tiny else 32
    for batch in (1, 8, 32):
        what = {"system": "transformers eager", "weights": "bf16", "batch": batch, "context": 512}
        attempt(what, deadline, 20, lambda b=batch: generate_row(model, b, prompt))
    if device == "cuda":
        for batch in (1, 8):
            what = {"system": "transformers static cache, compiled", "weights": "bf16", "batch": batch, "context": 512}
            attempt(what, deadline, 45, lambda b=batch: generate_row(model, b, prompt, cache_implementation="static"))


if __name__ == "__main__":
    main()
