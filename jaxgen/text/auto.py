"""AutoTokenizer: transformers' tokenizers, whose results JAX takes as they are."""

import functools
import importlib.util
import os
from typing import Any

from jaxgen.errors import NO_REMOTE_CODE, JaxgenError, UnsupportedError
from jaxgen.text.hf import transformers
from jaxgen.text.tokenizer import read_tokenizer


class AutoTokenizer:
    """Loads tokenizers, under the name that Hugging Face users know; never instantiated."""

    def __init__(self):
        raise JaxgenError("AutoTokenizer is not instantiated: call AutoTokenizer.from_pretrained(...)")

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | os.PathLike[str],
        *,
        revision: str | None = None,
        local_files_only: bool = False,
        cache_dir: str | os.PathLike[str] | None = None,
        token: str | bool | None = None,
        trust_remote_code: bool = False,
        **options: Any,
    ) -> Any:
        """transformers' tokenizer of a directory or hub id; `options` (such as `padding_side`) are transformers'.

        It also has `return_tensors="jax"`, which tokenizers that transformers loaded have not, and what it returns has
        `.to(device)`, which changes nothing: `generate` reads its inputs on the host. Raises `JaxgenError` for files
        that transformers cannot read, and `UnsupportedError` for a repository that wants to run code of its own.

        >>> from jaxgen import demo
        >>> tokenizer = AutoTokenizer.from_pretrained(demo.path(), padding_side="left")
        >>> tokenizer(["1, 2, 3"], return_tensors="jax").to("cpu")["input_ids"].shape
        (1, 8)
        """
        from jaxgen.convert.hub import COMPANIONS, locate

        if trust_remote_code:
            raise UnsupportedError(NO_REMOTE_CODE)
        placed: dict[str, Any] = {"local_files_only": local_files_only, "cache_dir": cache_dir, "token": token}
        directory = locate(
            pretrained_model_name_or_path, revision=revision, files=("config.json", *COMPANIONS), **placed
        )
        tokenizer = read_tokenizer(directory, **options)
        tokenizer.__class__ = _with_jax(type(tokenizer))
        return tokenizer


class _WithJax:
    """In front of a tokenizer class of transformers."""

    def __call__(self, *texts: Any, return_tensors: Any = None, **options: Any) -> Any:
        return _as_jax(super().__call__, return_tensors, *texts, **options)  # pyright: ignore[reportAttributeAccessIssue]

    def encode(self, *texts: Any, return_tensors: Any = None, **options: Any) -> Any:
        return _as_jax(super().encode, return_tensors, *texts, **options)  # pyright: ignore[reportAttributeAccessIssue]

    def apply_chat_template(self, *chats: Any, return_tensors: Any = None, **options: Any) -> Any:
        return _as_jax(super().apply_chat_template, return_tensors, *chats, **options)  # pyright: ignore[reportAttributeAccessIssue]

    def pad(self, *rows: Any, return_tensors: Any = None, **options: Any) -> Any:
        return _as_jax(super().pad, return_tensors, *rows, **options)  # pyright: ignore[reportAttributeAccessIssue]

    def decode(self, token_ids: Any, *args: Any, **options: Any) -> Any:
        ids = token_ids.tolist() if hasattr(token_ids, "tolist") else token_ids
        return super().decode(ids, *args, **options)  # pyright: ignore[reportAttributeAccessIssue]

    def __reduce_ex__(self, protocol: Any) -> Any:  # a class that is made here cannot be pickled by its name
        _, _, *state = super().__reduce_ex__(protocol)
        return _unpickled, (type(self).__bases__[1],), *state


@functools.cache
def _with_jax(kind: type) -> Any:
    return type(kind.__name__, (_WithJax, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def _unpickled(kind: type) -> Any:
    return object.__new__(_with_jax(kind))


@functools.cache
def _encoding() -> Any:
    class BatchEncoding(transformers().BatchEncoding):
        """transformers' BatchEncoding, of arrays that are moved by whoever reads them."""

        def to(self, device: Any = None, **options: Any) -> Any:
            return self

        def convert_to_tensors(self, tensor_type: Any = None, prepend_batch_axis: bool = False) -> Any:
            return _as_jax(
                super().convert_to_tensors, tensor_type, prepend_batch_axis=prepend_batch_axis, by="tensor_type"
            )

    return BatchEncoding


def _as_jax(method: Any, kind: Any, *args: Any, by: str = "return_tensors", **options: Any) -> Any:
    """What a method of the tokenizer returns, in jax arrays if asked for, and with `.to(device)`."""
    wanted = getattr(kind, "value", kind)  # transformers has an enum
    if wanted == "pt" and importlib.util.find_spec("torch") is None:
        raise JaxgenError(f"{by}='pt' needs torch; write {by}='np' (or 'jax')")
    result = method(*args, **{by: "np" if wanted == "jax" else kind}, **options)
    if isinstance(result, transformers().BatchEncoding):
        result.__class__ = _encoding()
        if wanted == "jax":
            result.data = {name: _array(value) for name, value in result.data.items()}
        return result
    return _array(result) if wanted == "jax" else result


def _array(value: Any) -> Any:
    import jax.numpy as jnp
    import numpy as np

    if not isinstance(value, np.ndarray):
        return value
    if value.dtype == object:
        raise JaxgenError("the rows have different lengths, and an array has one: pass padding=True")
    return jnp.asarray(value, np.int32)
