"""Everything that touches checkpoint files; imported as `jaxgen.convert`."""
