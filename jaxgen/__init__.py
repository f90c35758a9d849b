"""jaxgen: Hugging Face `generate` for JAX."""
