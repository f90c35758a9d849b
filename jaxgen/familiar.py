"""HF's ordinary methods of a model, which scripts call in passing: they answer, or say what to write here."""

import sys
from typing import Any, no_type_check

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jaxgen.causal_output import CausalLMOutput
from jaxgen.errors import JaxgenError, shown

IGNORED = -100  # HF's label of a token that does not count

# Of transformers' `forward`: what makes it return more than logits and loss, and what else it may be told.
_MORE_RETURNED = ("output_attentions", "output_hidden_states")
_MORE_TOLD = ("cache", "cache_position", "inputs_embeds", "past_key_values", "position_ids", "use_cache")


def answer(logits: Any, labels: Any = None, token_type_ids: Any = None, **options: Any) -> CausalLMOutput:
    """The logits; with `labels` [B, T], the loss too.

    The loss is the mean cross-entropy (nats) of each next label, without those that are -100, as in HF; padding is not
    left out by itself. `token_type_ids`, `use_cache=False`, `return_dict=True` and options that are None change
    nothing. Raises `JaxgenError` for others.
    """
    for name, value in options.items():
        _check_option(name, value)
    if labels is None:
        return CausalLMOutput(logits)
    if np.shape(labels) != logits.shape[:2]:
        raise JaxgenError(f"labels has shape {np.shape(labels)}; expected that of input_ids, {logits.shape[:2]}")
    following, before = jnp.asarray(labels, jnp.int32)[:, 1:], logits[:, :-1]
    counts = following != IGNORED
    logprobs = jax.nn.log_softmax(before, axis=-1)
    chosen = jnp.take_along_axis(logprobs, jnp.where(counts, following, 0)[..., None], axis=-1)[..., 0]
    loss = -jnp.sum(jnp.where(counts, chosen, 0.0)) / jnp.sum(counts)
    return CausalLMOutput(logits, loss)


def _check_option(name: str, value: Any) -> None:
    """Raise for an option of HF's `forward`, unless its value is what is done anyway."""
    if name in (*_MORE_RETURNED, *_MORE_TOLD, "return_dict"):
        what_is_done_anyway = name == "return_dict"
        if value is None or value is what_is_done_anyway:
            return
    if name == "use_cache":
        raise JaxgenError("model(..., use_cache=True): it returns logits; model.prefill and model.step have a cache")
    if name == "return_dict":
        raise JaxgenError(f"model(..., return_dict={shown(value)}): write model(...).to_tuple() for a tuple")
    if name in _MORE_RETURNED:
        raise JaxgenError(
            f"model(..., {name}={shown(value)}): it returns logits; write "
            f"generate(..., {name}=True, return_dict_in_generate=True)"
        )
    raise JaxgenError(f"model(...): there is no option {name!r:.60}; it has input_ids, attention_mask and labels")


class FamiliarMethods:
    """What `PreTrainedModel` of transformers has beside `generate`; stands in front of `nnx.Module`."""

    config: Any
    dtype: Any
    device: Any
    model: Any

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **options: Any) -> Any:
        """`AutoModelForCausalLM.from_pretrained`."""
        from jaxgen.convert.load import AutoModelForCausalLM

        return AutoModelForCausalLM.from_pretrained(pretrained_model_name_or_path, **options)

    @classmethod
    def can_generate(cls) -> bool:
        """True."""
        return True

    def eval(self, **attributes: Any) -> Any:
        """The model itself, which has no dropout; `attributes` as for `flax.nnx.Module.eval`."""
        super().eval(**attributes)  # pyright: ignore[reportAttributeAccessIssue]
        return self

    def train(self, mode: bool = True, **attributes: Any) -> Any:
        """The model itself, which has no dropout; `attributes` as for `flax.nnx.Module.train`."""
        kind = super().train if mode else super().eval  # pyright: ignore[reportAttributeAccessIssue]
        kind(**attributes)
        return self

    def to(self, *places: Any, device: Any = None, dtype: Any = None, non_blocking: bool = False) -> Any:
        """The model itself, if it is there already and has this dtype: both are chosen while loading.

        Raises `JaxgenError` for another device or dtype.
        """
        from jaxgen.convert.placement import as_device, as_dtype

        for place in (*places, device, dtype):
            if place is None:
                continue
            is_dtype = place is dtype or "float" in str(place)
            if is_dtype and as_dtype(place) != self.dtype:
                raise JaxgenError(
                    f"the model is {self.dtype}: load it with dtype={str(place).split('.')[-1]!r} instead"
                )
            if not is_dtype and as_device(place) != self.device:
                raise JaxgenError(f"the model is on {self.device}: load it with device_map={str(place)!r} instead")
        return self

    def cuda(self, device: int = 0) -> Any:
        """`to("cuda")`."""
        return self.to(f"cuda:{device}")

    def cpu(self) -> Any:
        """`to("cpu")`."""
        return self.to("cpu")

    @property
    @no_type_check  # a checked function has another caller
    def hf_device_map(self) -> dict[str, Any]:
        """The one device that holds the whole model, under the name of the whole."""
        # transformers' pipelines look here before anything else, and would go on to torch.
        if sys._getframe(1).f_globals.get("__name__", "").startswith("transformers.pipelines"):
            raise JaxgenError(
                "transformers.pipeline runs torch models; write jaxgen.pipeline('text-generation', model=model)"
            )
        return {"": self.device}

    def get_input_embeddings(self) -> Any:
        """The `Embedding` of the tokens."""
        return self.model.embed_tokens

    def get_output_embeddings(self) -> Any:
        """The head: a `Linear`, or the input's `Embedding` if it is the same matrix."""
        return getattr(self, "lm_head", self.model.embed_tokens)

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model has, those in four bits counted one by one.

        `only_trainable`: without quantised weights. `exclude_embeddings`: without those of the input.
        """
        from jaxgen.models.tensors import EMBEDDING, parameter_parts

        quantized = {
            ".".join(map(str, path))
            for path, variable in nnx.to_flat_state(nnx.state(self))  # pyright: ignore[reportArgumentType]
            if only_trainable and not isinstance(variable, nnx.Param)
        }
        return sum(
            int(np.prod(part.shape))
            for name, parts in parameter_parts(self.config).items()
            for part in parts
            if name not in quantized and not (exclude_embeddings and name == EMBEDDING)
        )

    def get_memory_footprint(self, return_buffers: bool = True) -> int:
        """Bytes of the weights, as they are kept."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(nnx.state(self)))  # pyright: ignore[reportArgumentType]
