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
    from jaxgen import distributed as distributed
    from jaxgen import plot as plot
    from jaxgen.causal_output import CausalLMOutput as CausalLMOutput
    from jaxgen.constraints.grammars import Grammar as Grammar
    from jaxgen.constraints.grammars import grammar as grammar
    from jaxgen.constraints.patterns import Constraint as Constraint
    from jaxgen.constraints.patterns import choice as choice
    from jaxgen.constraints.patterns import json_schema as json_schema
    from jaxgen.constraints.patterns import regex as regex
    from jaxgen.convert import AutoModelForCausalLM as AutoModelForCausalLM
    from jaxgen.engine.engine import Engine as Engine
    from jaxgen.errors import CheckpointError as CheckpointError
    from jaxgen.errors import EngineClosedError as EngineClosedError
    from jaxgen.errors import EngineFullError as EngineFullError
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
    from jaxgen.generation.programs.stages import enable_compile_cache as enable_compile_cache
    from jaxgen.generation.programs.strict import Strict as Strict
    from jaxgen.generation.prompts.past_key_values import PastKeyValues as PastKeyValues
    from jaxgen.generation.results.logprobs import logprobs as logprobs
    from jaxgen.generation.results.output import GenerateOutput as GenerateOutput
    from jaxgen.generation.results.score_tokens import TokenScores as TokenScores
    from jaxgen.generation.results.score_tokens import score_tokens as score_tokens
    from jaxgen.models.families import AutoConfig as AutoConfig
    from jaxgen.models.gemma2 import Gemma2Config as Gemma2Config
    from jaxgen.models.gemma2 import Gemma2ForCausalLM as Gemma2ForCausalLM
    from jaxgen.models.gemma3 import Gemma3ForCausalLM as Gemma3ForCausalLM
    from jaxgen.models.gemma3 import Gemma3TextConfig as Gemma3TextConfig
    from jaxgen.models.granite import GraniteConfig as GraniteConfig
    from jaxgen.models.granite import GraniteForCausalLM as GraniteForCausalLM
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
    from jaxgen.models.olmo2 import Olmo2Config as Olmo2Config
    from jaxgen.models.olmo2 import Olmo2ForCausalLM as Olmo2ForCausalLM
    from jaxgen.models.olmo3 import Olmo3Config as Olmo3Config
    from jaxgen.models.olmo3 import Olmo3ForCausalLM as Olmo3ForCausalLM
    from jaxgen.models.phi3 import Phi3Config as Phi3Config
    from jaxgen.models.phi3 import Phi3ForCausalLM as Phi3ForCausalLM
    from jaxgen.models.qwen2 import Qwen2Config as Qwen2Config
    from jaxgen.models.qwen2 import Qwen2ForCausalLM as Qwen2ForCausalLM
    from jaxgen.models.qwen3 import Qwen3Config as Qwen3Config
    from jaxgen.models.qwen3 import Qwen3ForCausalLM as Qwen3ForCausalLM
    from jaxgen.models.qwen3_moe import Qwen3MoeConfig as Qwen3MoeConfig
    from jaxgen.models.qwen3_moe import Qwen3MoeForCausalLM as Qwen3MoeForCausalLM
    from jaxgen.models.smollm3 import SmolLM3Config as SmolLM3Config
    from jaxgen.models.smollm3 import SmolLM3ForCausalLM as SmolLM3ForCausalLM
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
    "Constraint": "jaxgen.constraints.patterns",
    "Engine": "jaxgen.engine.engine",
    "EngineClosedError": "jaxgen.errors",
    "EngineFullError": "jaxgen.errors",
    "Gemma2Config": "jaxgen.models.gemma2",
    "Gemma2ForCausalLM": "jaxgen.models.gemma2",
    "Gemma3ForCausalLM": "jaxgen.models.gemma3",
    "Gemma3TextConfig": "jaxgen.models.gemma3",
    "GenerateOutput": "jaxgen.generation.results.output",
    "GenerationConfig": "jaxgen.generation.options.config",
    "Grammar": "jaxgen.constraints.grammars",
    "GraniteConfig": "jaxgen.models.granite",
    "GraniteForCausalLM": "jaxgen.models.granite",
    "Int4Config": "jaxgen.quant.config",
    "JaxgenError": "jaxgen.errors",
    "LlamaConfig": "jaxgen.models.llama",
    "LlamaForCausalLM": "jaxgen.models.llama",
    "LogitsProcessorList": "jaxgen.generation.options.arguments",
    "Ministral3Config": "jaxgen.models.ministral3",
    "Ministral3ForCausalLM": "jaxgen.models.ministral3",
    "MinistralConfig": "jaxgen.models.ministral",
    "MinistralForCausalLM": "jaxgen.models.ministral",
    "MistralConfig": "jaxgen.models.mistral",
    "MistralForCausalLM": "jaxgen.models.mistral",
    "MixtralConfig": "jaxgen.models.mixtral",
    "MixtralForCausalLM": "jaxgen.models.mixtral",
    "NonFiniteLogitsError": "jaxgen.errors",
    "Olmo2Config": "jaxgen.models.olmo2",
    "Olmo2ForCausalLM": "jaxgen.models.olmo2",
    "Olmo3Config": "jaxgen.models.olmo3",
    "Olmo3ForCausalLM": "jaxgen.models.olmo3",
    "PastKeyValues": "jaxgen.generation.prompts.past_key_values",
    "Phi3Config": "jaxgen.models.phi3",
    "Phi3ForCausalLM": "jaxgen.models.phi3",
    "Qwen2Config": "jaxgen.models.qwen2",
    "Qwen2ForCausalLM": "jaxgen.models.qwen2",
    "Qwen3Config": "jaxgen.models.qwen3",
    "Qwen3ForCausalLM": "jaxgen.models.qwen3",
    "Qwen3MoeConfig": "jaxgen.models.qwen3_moe",
    "Qwen3MoeForCausalLM": "jaxgen.models.qwen3_moe",
    "Record": "jaxgen.records.record",
    "SmolLM3Config": "jaxgen.models.smollm3",
    "SmolLM3ForCausalLM": "jaxgen.models.smollm3",
    "StoppingCriteriaList": "jaxgen.generation.options.arguments",
    "Strict": "jaxgen.generation.programs.strict",
    "TokenScores": "jaxgen.generation.results.score_tokens",
    "UnsupportedError": "jaxgen.errors",
    "WatermarkDetector": "jaxgen.generation.processors.watermark",
    "WatermarkingConfig": "jaxgen.generation.processors.watermark",
    "choice": "jaxgen.constraints.patterns",
    "enable_compile_cache": "jaxgen.generation.programs.stages",
    "generate": "jaxgen.generation.generate",
    "grammar": "jaxgen.constraints.grammars",
    "json_schema": "jaxgen.constraints.patterns",
    "logprobs": "jaxgen.generation.results.logprobs",
    "pipeline": "jaxgen.text.pipeline",
    "regex": "jaxgen.constraints.patterns",
    "replay": "jaxgen.records.replay",
    "score_tokens": "jaxgen.generation.results.score_tokens",
    "set_seed": "jaxgen.generation.choosing.seed",
}
_MODULES = ("demo", "distributed", "plot")
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
