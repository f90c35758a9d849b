"""Kernels for GPUs, one to a file, each beside the plain JAX that it computes the same as."""
