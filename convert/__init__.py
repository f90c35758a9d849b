"""Everything that touches checkpoint files; imported as `jaxgen.convert`."""

from .export import save_pretrained
from .load import AutoModelForCausalLM

__all__ = ["AutoModelForCausalLM", "save_pretrained"]
