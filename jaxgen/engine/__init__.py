"""Rows that come and go in one batch of fixed shape: continuous batching."""
