"""jaxgen: Hugging Face `generate` for JAX.

    model = jaxgen.AutoModelForCausalLM.from_pretrained(name_or_path)
    ids = model.generate(**tokenizer(texts, padding=True, return_tensors="np"))

Names are imported when first used, so `import jaxgen` costs next to nothing.
"""

import importlib
import logging
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jaxgen import demo as demo
    from jaxgen import plot as plot
    from jaxgen.causal_output import CausalLMOutput as CausalLMOutput
    from jaxgen.convert.load import AutoModelForCausalLM as AutoModelForCausalLM
    from jaxgen.errors import CheckpointError as CheckpointError
    from jaxgen.errors import JaxgenError as JaxgenError
    from jaxgen.errors import NonFiniteLogitsError as NonFiniteLogitsError
    from jaxgen.errors import UnsupportedError as UnsupportedError
    from jaxgen.generation.choosing.seed import set_seed as set_seed
    from jaxgen.generation.generate import generate as generate
    from jaxgen.generation.options.arguments import LogitsProcessorList as LogitsProcessorList
    from jaxgen.generation.options.arguments import StoppingCriteriaList as StoppingCriteriaList
    from jaxgen.generation.options.config import GenerationConfig as GenerationConfig
    from jaxgen.generation.processors.constraint import AllowedTokens as AllowedTokens
    from jaxgen.generation.processors.watermark import WatermarkDetector as WatermarkDetector
    from jaxgen.generation.processors.watermark import WatermarkingConfig as WatermarkingConfig
    from jaxgen.generation.programs.compiled import enable_compile_cache as enable_compile_cache
    from jaxgen.generation.programs.strict import Strict as Strict
    from jaxgen.generation.prompts.past_key_values import PastKeyValues as PastKeyValues
    from jaxgen.generation.results.output import GenerateOutput as GenerateOutput
    from jaxgen.models.families import AutoConfig as AutoConfig
    from jaxgen.models.llama import LlamaConfig as LlamaConfig
    from jaxgen.models.llama import LlamaForCausalLM as LlamaForCausalLM
    from jaxgen.models.ministral import MinistralConfig as MinistralConfig
    from jaxgen.models.ministral import MinistralForCausalLM as MinistralForCausalLM
    from jaxgen.models.ministral3 import Ministral3Config as Ministral3Config
    from jaxgen.models.ministral3 import Ministral3ForCausalLM as Ministral3ForCausalLM
    from jaxgen.models.mistral import MistralConfig as MistralConfig
    from jaxgen.models.mistral import MistralForCausalLM as MistralForCausalLM
    from jaxgen.models.mixtral import MixtralConfig as MixtralConfig
    from jaxgen.models.mixtral import MixtralForCausalLM as MixtralForCausalLM
    from jaxgen.models.qwen2 import Qwen2Config as Qwen2Config
    from jaxgen.models.qwen2 import Qwen2ForCausalLM as Qwen2ForCausalLM
    from jaxgen.models.qwen3 import Qwen3Config as Qwen3Config
    from jaxgen.models.qwen3 import Qwen3ForCausalLM as Qwen3ForCausalLM
    from jaxgen.models.qwen3_moe import Qwen3MoeConfig as Qwen3MoeConfig
    from jaxgen.models.qwen3_moe import Qwen3MoeForCausalLM as Qwen3MoeForCausalLM
    from jaxgen.quant.bitsandbytes import BitsAndBytesConfig as BitsAndBytesConfig
    from jaxgen.quant.config import Int4Config as Int4Config
    from jaxgen.records.record import Record as Record
    from jaxgen.records.replay import replay as replay
    from jaxgen.text.auto import AutoTokenizer as AutoTokenizer
    from jaxgen.text.pipeline import pipeline as pipeline

__version__ = "0.1.0"

_HOME = {
    "AllowedTokens": "jaxgen.generation.processors.constraint",
    "AutoConfig": "jaxgen.models.families",
    "AutoModelForCausalLM": "jaxgen.convert.load",
    "AutoTokenizer": "jaxgen.text.auto",
    "BitsAndBytesConfig": "jaxgen.quant.bitsandbytes",
    "CausalLMOutput": "jaxgen.causal_output",
    "CheckpointError": "jaxgen.errors",
    "GenerateOutput": "jaxgen.generation.results.output",
    "GenerationConfig": "jaxgen.generation.options.config",
    "Int4Config": "jaxgen.quant.config",
    "JaxgenError": "jaxgen.errors",
    "LlamaConfig": "jaxgen.models.llama",
    "LlamaForCausalLM": "jaxgen.models.llama",
    "LogitsProcessorList": "jaxgen.generation.options.arguments",
    "MistralConfig": "jaxgen.models.mistral",
    "MistralForCausalLM": "jaxgen.models.mistral",
    "MixtralConfig": "jaxgen.models.mixtral",
    "MixtralForCausalLM": "jaxgen.models.mixtral",
    "NonFiniteLogitsError": "jaxgen.errors",
    "PastKeyValues": "jaxgen.generation.prompts.past_key_values",
    "MinistralConfig": "jaxgen.models.ministral",
    "MinistralForCausalLM": "jaxgen.models.ministral",
    "Ministral3Config": "jaxgen.models.ministral3",
    "Ministral3ForCausalLM": "jaxgen.models.ministral3",
    "Qwen2Config": "jaxgen.models.qwen2",
    "Qwen2ForCausalLM": "jaxgen.models.qwen2",
    "Qwen3Config": "jaxgen.models.qwen3",
    "Qwen3ForCausalLM": "jaxgen.models.qwen3",
    "Qwen3MoeConfig": "jaxgen.models.qwen3_moe",
    "Qwen3MoeForCausalLM": "jaxgen.models.qwen3_moe",
    "Record": "jaxgen.records.record",
    "StoppingCriteriaList": "jaxgen.generation.options.arguments",
    "Strict": "jaxgen.generation.programs.strict",
    "UnsupportedError": "jaxgen.errors",
    "WatermarkDetector": "jaxgen.generation.processors.watermark",
    "WatermarkingConfig": "jaxgen.generation.processors.watermark",
    "enable_compile_cache": "jaxgen.generation.programs.compiled",
    "generate": "jaxgen.generation.generate",
    "pipeline": "jaxgen.text.pipeline",
    "replay": "jaxgen.records.replay",
    "set_seed": "jaxgen.generation.choosing.seed",
}
_MODULES = ("demo", "plot")
_OF_TRANSFORMERS = ("AsyncTextIteratorStreamer", "TextIteratorStreamer", "TextStreamer")  # as they are
_PUBLIC = [*_HOME, *_MODULES]
globals()["__all__"] = _PUBLIC  # type checkers, which want a list written out, have the imports above


def _says_something_else(record: logging.LogRecord) -> bool:
    """Whether a message is not transformers' that without PyTorch there are no models: here there are."""
    return not record.getMessage().startswith("PyTorch was not found")


# For good, since transformers runs its first lines more than once, and scripts import it themselves.
logging.getLogger("transformers").addFilter(_says_something_else)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return importlib.import_module(f"jaxgen.{name}")
    if name in _OF_TRANSFORMERS:
        return getattr(importlib.import_module("jaxgen.text.hf").transformers(), name)
    if name not in _HOME:
        raise AttributeError(f"module 'jaxgen' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PUBLIC, *_OF_TRANSFORMERS])
