"""Families of models: one file each, over the shared block of `decoder.py`."""
