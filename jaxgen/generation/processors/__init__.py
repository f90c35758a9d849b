"""Logits processors: pure functions of float32 logits and the rows that they belong to."""
