"""Shapes of models that the benchmarks fill with random weights."""

import jaxgen

SHAPE_125M = jaxgen.MistralConfig(
    vocab_size=32000,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=12,
    num_key_value_heads=4,
    max_position_embeddings=4096,
    sliding_window=None,
)
