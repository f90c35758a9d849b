"""Many prompts, offline: from a file into a directory (`jaxgen batch`), or as a step of a Ray Data pipeline."""

from jaxgen.batch.generator import Generator as Generator
