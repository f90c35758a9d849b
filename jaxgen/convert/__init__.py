"""`jaxgen.convert` in a source tree: the folder `convert` beside `jaxgen`, which a wheel has in this place."""

import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from convert import AutoModelForCausalLM as AutoModelForCausalLM
    from convert import convert_checkpoint as convert_checkpoint
    from convert import save_pretrained as save_pretrained

    def __getattr__(name: str) -> Any: ...


_source = Path(__file__).parents[2] / "convert" / "__init__.py"
_spec = importlib.util.spec_from_file_location(__name__, _source)
assert _spec is not None and _spec.loader is not None
# Python hands out what stands here after this file has run: the folder's own package, not a copy of its names.
sys.modules[__name__] = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(sys.modules[__name__])
