"""Options of transformers 5.24 that jaxgen refuses: the values at which they do nothing, and why."""

import dataclasses
from typing import Any


@dataclasses.dataclass(frozen=True)
class Refused:
    """An option that is refused, but for values that ask for nothing."""

    reason: str
    harmless: tuple[Any, ...] = ()  # besides None
    changes_tokens: bool = True  # False: in a stored file it is passed over

    def takes(self, value: object) -> bool:
        """Whether this value asks for nothing."""
        known = type(value) in (bool, int, float, str, list, dict)
        return value is None or (known and any(value == harmless for harmless in self.harmless))


_HUB = "transformers moved it to the hub"
_LAYOUT = "jaxgen always decodes from a static cache, compiled"
_DRAFTS = "drafts come from an assistant_model or from the prompt"
REFUSED: dict[str, Refused] = {
    "assistant_early_exit": Refused(_DRAFTS, changes_tokens=False),
    "assistant_ensemble_weight": Refused("it changes the distribution"),
    "assistant_lookbehind": Refused("it needs two tokenizers", (10,), changes_tokens=False),
    "cache_config": Refused(_LAYOUT, ({},), changes_tokens=False),
    "compile_config": Refused(_LAYOUT, changes_tokens=False),
    "constraints": Refused(_HUB, ([],)),
    "continuous_batching_config": Refused("it belongs to a server", changes_tokens=False),
    "decoder_start_token_id": Refused("it is for encoder-decoder models", changes_tokens=False),
    "disable_compile": Refused(_LAYOUT, (False,), changes_tokens=False),
    "diversity_penalty": Refused(_HUB, (0.0,)),
    "dola_layers": Refused(_HUB),
    "force_words_ids": Refused(_HUB, ([],)),
    "is_assistant": Refused("pass the drafting model as assistant_model", (False,), changes_tokens=False),
    "low_memory": Refused("transformers refuses it too", (False,), changes_tokens=False),
    "num_assistant_tokens_schedule": Refused(
        "the number of drafts is part of the compiled program", ("constant",), changes_tokens=False
    ),
    "num_beam_groups": Refused(_HUB, (1,)),
    "penalty_alpha": Refused(_HUB),
    "speculation_type": Refused(_DRAFTS, changes_tokens=False),
    "target_lookbehind": Refused("it needs two tokenizers", (10,), changes_tokens=False),
    "token_healing": Refused("it needs the tokenizer of every call", (False,)),
    "use_cache": Refused(_LAYOUT, (True,), changes_tokens=False),
    "use_mtp": Refused("no model here has such heads", (False,), changes_tokens=False),
    # Arguments of HF's generate() that are not fields of its GenerationConfig.
    "assistant_tokenizer": Refused("the assistant must share the model's vocabulary"),
    "custom_generate": Refused("it runs code from the hub"),
    "inputs_embeds": Refused("prompts are token ids"),
    "position_ids": Refused("positions count the real tokens of attention_mask"),
    "synced_gpus": Refused("a model lives on one device", (False,)),
    "trust_remote_code": Refused("jaxgen runs no code from the hub", (False,)),
}
METADATA = frozenset({"transformers_version", "_from_model_config", "_commit_hash"})
