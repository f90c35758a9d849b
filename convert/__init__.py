"""Everything that touches checkpoint files; imported as `jaxgen.convert`."""

from .convert import convert_checkpoint
from .export import save_pretrained
from .load import AutoModelForCausalLM

__all__ = ["AutoModelForCausalLM", "convert_checkpoint", "save_pretrained"]
