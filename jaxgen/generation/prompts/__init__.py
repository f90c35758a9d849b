"""Prompts on the way to the device: packed rows, their limits, prefixes that are there already."""
