"""`jaxgen.pipeline("text-generation")`: from texts or chats to texts or chats, as transformers' pipeline does it."""

import dataclasses
import itertools
import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from types import GeneratorType
from typing import Any, Unpack, overload

import numpy as np

from jaxgen.errors import JaxgenError, UnsupportedError
from jaxgen.generation.choosing.sample import random_key, row_id_words
from jaxgen.generation.options.config import GenerationConfig, check_names
from jaxgen.generation.options.table import Extras
from jaxgen.generation.options.typed import PipelineArguments
from jaxgen.generation.prompts.contexts import context_of
from jaxgen.records.record import Recording
from jaxgen.text.inputs import Messages, checked_text, checked_texts, continues_final_message, encode, is_message
from jaxgen.text.tokenizer import continuation, left_pad, tokenizer_for

TASK = "text-generation"
# What holds where neither the user nor the checkpoint's generation_config.json says otherwise.
# Source: transformers `TextGenerationPipeline`.
DEFAULTS: dict[str, Any] = {"max_new_tokens": 256, "do_sample": True, "temperature": 0.7}
_OF_GENERATE = ("generation_config", "streamer", "chunk_size")  # its arguments that are no fields of a config


def pipeline(
    task: str | None = None,
    model: Any = None,
    *,
    tokenizer: Any = None,
    device: int | str | Any = None,
    device_map: Any = None,
    dtype: Any = None,
    torch_dtype: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    model_kwargs: Mapping[str, Any] | None = None,
    **defaults: Any,
) -> "TextGenerationPipeline":
    """A pipeline for a task, which can only be "text-generation", as transformers' `pipeline` makes it.

    `model`: a jaxgen model, a checkpoint directory or a hub id. `tokenizer`: an object, directory or hub id; by
    default the checkpoint's. `device` ("cpu", "cuda:1", an index, -1 for the CPU), `device_map`, `dtype` (or
    `torch_dtype`), `revision`, `token` and `model_kwargs` go to `from_pretrained`. `defaults` are options of the calls.
    Raises `UnsupportedError` for another task, and `JaxgenError` for what cannot be loaded. `transformers.pipeline`
    runs torch models: given one of jaxgen's, it says to write this; without torch, it ends before it looks at any.

    >>> from jaxgen import demo
    >>> generator = pipeline("text-generation", model=demo.path())
    >>> generator("Portugal is", max_new_tokens=5, do_sample=False)
    [{'generated_text': 'Portugal is a country in'}]
    """
    if task not in (None, TASK):
        raise UnsupportedError(f"task={task!r} is not supported by jaxgen, which has {TASK!r}")
    if model is None:
        raise JaxgenError("pipeline needs model=: a jaxgen model, a checkpoint directory or a hub id")
    if defaults.pop("trust_remote_code", False):
        raise UnsupportedError("trust_remote_code=True is not supported by jaxgen, which runs no code of a checkpoint")
    if device is not None and device_map is not None:
        raise JaxgenError(f"both device={device!r} and device_map={device_map!r} were given; choose one")
    placed = {"device_map": _device(device) if device_map is None else device_map, "dtype": dtype}
    placed |= {"torch_dtype": torch_dtype, "revision": revision, "token": token, **(model_kwargs or {})}
    placed = {name: value for name, value in placed.items() if value is not None}
    if not isinstance(model, str | os.PathLike):
        if placed:
            name = next(iter(placed))
            raise JaxgenError(f"{name}={placed[name]!r} is for loading a model; this one is loaded already")
        return TextGenerationPipeline(model, tokenizer, **defaults)
    from jaxgen.convert.hub import locate
    from jaxgen.convert.load import AutoModelForCausalLM

    names = ("revision", "token", "cache_dir", "local_files_only")
    directory = locate(model, **{name: placed[name] for name in names if name in placed})
    loaded = AutoModelForCausalLM.from_pretrained(directory, **placed)
    return TextGenerationPipeline(loaded, str(directory) if tokenizer is None else tokenizer, **defaults)


def _device(device: Any) -> Any:
    """What `from_pretrained` calls it: transformers' pipelines number their devices, and -1 is the CPU."""
    if not isinstance(device, int) or isinstance(device, bool):
        return device
    import jax

    devices = jax.local_devices()
    if device >= len(devices):
        raise JaxgenError(f"device={device}: JAX has {len(devices)} devices here, numbered from 0")
    return devices[device] if device >= 0 else "cpu"


@dataclasses.dataclass(frozen=True)
class Options:
    """What the pipeline does itself; all other options are those of `generate`. Names and meaning are HF's."""

    return_full_text: Any = None  # False: only what is new
    return_tensors: Any = None  # ids, prompt included, in place of text
    return_text: Any = None
    return_type: Any = None
    clean_up_tokenization_spaces: Any = None
    skip_special_tokens: Any = None  # None: True
    prefix: Any = None  # in front of every text, and not in the result
    handle_long_generation: Any = None  # "hole": drop the beginning of a prompt that leaves too little room
    stop_sequence: Any = None  # the stop_strings of generate
    truncation: Any = None
    padding: Any = None
    add_special_tokens: Any = None
    continue_final_message: Any = None
    tokenizer_encode_kwargs: Any = None
    tools: Any = None
    documents: Any = None
    batch_size: Any = None
    seed: Any = None
    key: Any = None
    row_ids: Any = None

    @classmethod
    def take(cls, options: Mapping[str, Any]) -> "tuple[dict[str, Any], dict[str, Any]]":
        """Split a call's options into these, checked and as far as given, and those of `generate`."""
        names = {field.name for field in dataclasses.fields(cls)}
        own = {name: value for name, value in options.items() if name in names and value is not None}
        if (kind := _return_type(own)) is not None:
            own["return_type"] = kind
        if own.get("handle_long_generation", "hole") != "hole":
            raise JaxgenError(f"handle_long_generation={own['handle_long_generation']!r} must be None or 'hole'")
        size = own.get("batch_size", 1)
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise JaxgenError(f"batch_size={size!r} must be an int of at least 1")
        return own, {name: value for name, value in options.items() if name not in names}


def _return_type(own: Mapping[str, Any]) -> str | None:
    """ "TENSORS", "NEW_TEXT" or "FULL_TEXT", if the options say so."""
    if (kind := own.get("return_type")) is not None:
        name = getattr(kind, "name", kind)  # transformers has an enum
        if name not in ("TENSORS", "NEW_TEXT", "FULL_TEXT"):
            raise JaxgenError(f"return_type={kind!r} must be 'TENSORS', 'NEW_TEXT' or 'FULL_TEXT'")
        return name
    given = [name for name in ("return_full_text", "return_tensors") if name in own]
    if given and "return_text" in own:
        given.append("return_text")
    if len(given) > 1:
        raise JaxgenError(f"{given[0]} and {given[1]} exclude each other")
    if "return_full_text" in own:
        return "FULL_TEXT" if own["return_full_text"] else "NEW_TEXT"
    return "TENSORS" if own.get("return_tensors") else None


@dataclasses.dataclass(frozen=True)
class Prompt:
    """A text or chat and its ids; without any, generation starts from BOS, which is then `invented`."""

    text: str | Messages
    ids: list[int]
    mask: list[int]
    invented: int = 0
    max_new_tokens: int | None = None  # where the pipeline's default decides


class TextGenerationPipeline:
    """Continues texts and chats; made by `pipeline`. Source: transformers `TextGenerationPipeline`."""

    def __init__(self, model: Any, tokenizer: Any = None, **defaults: Any):
        self.task, self.model, self.tokenizer = TASK, model, tokenizer_for(model, tokenizer)
        self._own, self._generate = Options.take(defaults)
        check_names({k: v for k, v in Extras.take(self._generate)[1].items() if k not in _OF_GENERATE})

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of a {type(self.model).__name__}>"

    @overload
    def __call__(
        self, text_inputs: "Generator[str | Messages, Any, Any]", **options: Unpack[PipelineArguments]
    ) -> Iterator[list[dict[str, Any]]]: ...

    @overload
    def __call__(
        self, text_inputs: "str | Messages | Sequence[str | Messages]", **options: Unpack[PipelineArguments]
    ) -> "Results": ...

    def __call__(self, text_inputs: object, **options: object) -> "Results | Iterator[list[dict[str, Any]]]":
        """Continue a text, a chat (a list of messages with "role" and "content"), or a list of either.

        A text gives `[{"generated_text": text}]`, with one entry per `num_return_sequences`; a chat gives its
        messages and the answer; a list gives a list of these; a generator gives an iterator. `options` are those of
        `Options` and of `model.generate`, `batch_size` texts at a time. Where neither they nor the checkpoint's
        generation_config.json say otherwise: do_sample=True, temperature=0.7, max_new_tokens=256 (or what is left of
        the context). With `seed` (or `key`) the result repeats; a text's result does not depend on `batch_size`: its
        row id is its place in the list, unless `row_ids` are given. Raises `JaxgenError`, as `generate` does.
        """
        own, generate = Options.take(options)
        config = generate.get("generation_config")
        before = self._generate
        if config is not None:  # it replaces what the pipeline was made with
            before = {name: value for name, value in before.items() if name not in vars(GenerationConfig())}
        mine = self._own
        if {"seed", "key"} & own.keys():  # either replaces either
            mine = {name: value for name, value in mine.items() if name not in ("seed", "key")}
        call = _Call(self.model, self.tokenizer, Options(**{**mine, **own}), {**before, **generate})
        if "max_length" in options:
            call.tokenizing["max_length"] = options["max_length"]
        if isinstance(text_inputs, GeneratorType):
            first = next(text_inputs, None)
            rest = itertools.chain([] if first is None else [first], text_inputs)
            if not is_message(first):
                return call.run(rest)
            text_inputs = list(rest)
        texts, single = checked_texts(text_inputs)
        if call.options.row_ids is not None:
            row_id_words(call.options.row_ids, len(texts))
        call.recording = Recording(self.tokenizer)
        results = list(call.run(texts))
        return Results(results[0] if single else results, call.recording)


class Results(list[Any]):
    """A list, as transformers' pipeline returns it, that also has a `record` of how it came about."""

    def __init__(self, values: Iterable[Any], recording: Recording):
        super().__init__(values)
        self._recording = recording

    @property
    def record(self) -> Any:
        """The `jaxgen.Record` of the call, with one entry per batch."""
        return self._recording.record()


class _Call:
    """One call of a pipeline, its options settled."""

    def __init__(self, model: Any, tokenizer: Any, options: Options, generate: dict[str, Any]):
        self.model, self.tokenizer, self.options = model, tokenizer, options
        self.tokenizing = {
            name: value
            for name in ("add_special_tokens", "truncation", "padding")
            if (value := getattr(options, name)) is not None
        }
        self.decoding: dict[str, Any] = {"skip_special_tokens": options.skip_special_tokens is not False}
        if options.clean_up_tokenization_spaces is not None:
            self.decoding["clean_up_tokenization_spaces"] = options.clean_up_tokenization_spaces
        if self._parses_answers():
            self.decoding["skip_special_tokens"] = False
        self._default_length = not {"max_length", "max_new_tokens"} & self._set(generate).keys()
        self.generate = self._with_defaults(generate)
        self.recording: Recording | None = None  # of every batch, if it is wanted
        self.key, self.seed = options.key, options.seed
        if self.key is None and self.seed is None:
            self.seed = random_key(None, None)[1]
        elif random_key(self.key, self.seed)[0].ndim:
            raise JaxgenError("a pipeline takes one seed or key for all texts; a list of them goes to model.generate")

    def run(self, texts: Iterable[Any]) -> Iterator[list[dict[str, Any]]]:
        """Each text's results, computed `batch_size` texts at a time."""
        texts, start, size = iter(texts), 0, self.options.batch_size or 1
        while batch := list(itertools.islice(texts, size)):
            prompts = [self._prompt(checked_text(text, start + i)) for i, text in enumerate(batch)]
            # What is left of the context is a matter of each prompt, not of its neighbours.
            for _, same in itertools.groupby(prompts, key=lambda prompt: prompt.max_new_tokens):
                group = list(same)
                yield from self._results(group, start)
                start += len(group)

    def _with_defaults(self, generate: dict[str, Any]) -> dict[str, Any]:
        """The options of `generate`, and the pipeline's defaults for what nobody set, but for the length."""
        given = self._set(generate)
        added = {"do_sample": DEFAULTS["do_sample"], "pad_token_id": self.tokenizer.pad_token_id}
        added = {name: value for name, value in added.items() if name not in given}
        if {**given, **added}["do_sample"] and "temperature" not in given:
            added["temperature"] = DEFAULTS["temperature"]
        if self.options.stop_sequence is not None:
            stops = self.options.stop_sequence
            added |= {"stop_strings": [stops] if isinstance(stops, str) else stops}
        if self.options.prefix:
            # A total length has to include the prefix.
            add = {"add_special_tokens": bool(self.options.add_special_tokens)}
            length = len(self.tokenizer(self.options.prefix, **add)["input_ids"])
            for total, new in (("max_length", "max_new_tokens"), ("min_length", "min_new_tokens")):
                if given.get(total) is not None and new not in given:
                    added[total] = given[total] + length
        return {"tokenizer": self.tokenizer, **generate, **added}

    def _set(self, generate: Mapping[str, Any]) -> dict[str, Any]:
        """What the checkpoint or the user set, in the order in which it counts."""
        given: dict[str, Any] = {}
        for config in (self.model.generation_config, generate.get("generation_config")):
            if config is not None:
                known = config if isinstance(config, GenerationConfig) else GenerationConfig.from_hf(config)
                given |= {name: value for name, value in vars(known).items() if value is not None}
        return given | dict(generate)

    def _prompt(self, text: str | Messages) -> Prompt:
        encoded = self._encode(text)
        ids, mask = list(encoded["input_ids"]), list(encoded.get("attention_mask", [1] * len(encoded["input_ids"])))
        context = self.model.config.max_position_embeddings
        if self.options.handle_long_generation == "hole":
            asked = self._new_tokens(len(ids))
            keep = min(self.tokenizer.model_max_length, context) - asked
            if keep <= 0:
                raise JaxgenError(
                    f"handle_long_generation='hole': no prompt fits beside {asked} new tokens in the context of "
                    f"{context}; ask for fewer"
                )
            ids, mask = ids[-keep:], mask[-keep:]
        left = context_of(self.model.config, sum(mask)) - sum(mask)
        room = max(1, min(DEFAULTS["max_new_tokens"], left)) if self._default_length else None
        if ids:
            return Prompt(text, ids, mask, max_new_tokens=room)
        bos = self._set(self.generate).get("bos_token_id")
        if bos is None:
            raise JaxgenError("an empty text has no tokens, and the model no bos_token_id to start from")
        return Prompt(text, [bos], [1], invented=1, max_new_tokens=room)

    def _encode(self, text: str | Messages) -> Any:
        options, arguments = self.options, dict(self.tokenizing)
        more = options.tokenizer_encode_kwargs or {}
        if isinstance(text, str):
            return encode(self.tokenizer, (options.prefix or "") + text, **{**arguments, **more})
        arguments.pop("add_special_tokens", None)  # a template writes its own
        arguments |= {"tools": options.tools, "documents": options.documents, **more}
        return encode(self.tokenizer, text, options.continue_final_message, **arguments)

    def _new_tokens(self, length: int) -> int:
        """How many new tokens are asked for after a prompt of `length`."""
        given = self._set(self.generate)
        asked, total = given.get("max_new_tokens"), given.get("max_length")
        if asked is not None or total is None:
            return asked or DEFAULTS["max_new_tokens"]
        if total < length:
            raise JaxgenError(
                f"handle_long_generation='hole' cannot tell how many new tokens max_length={total} leaves after a "
                f"prompt of {length}; set max_new_tokens"
            )
        return total - length

    def _results(self, prompts: Sequence[Prompt], start: int) -> Iterator[list[dict[str, Any]]]:
        """Generate for prompts in one batch, the first of which is number `start` of the call."""
        pad = self._set(self.generate).get("pad_token_id")
        ids = left_pad([prompt.ids for prompt in prompts], 0 if pad is None else pad)
        end = start + len(prompts)
        chosen = self.options.row_ids
        length = {} if prompts[0].max_new_tokens is None else {"max_new_tokens": prompts[0].max_new_tokens}
        output = self.model.generate(
            ids,
            left_pad([prompt.mask for prompt in prompts], 0),
            key=self.key,
            seed=self.seed,
            row_ids=range(start, end) if chosen is None else chosen[start:end],
            **{**self.generate, **length, **self._constraint(start, end), **self._details_anyway()},
        )
        sequences = output if isinstance(output, np.ndarray) else output.sequences  # a model may wrap `generate`
        if self.recording is not None and sequences is not output:
            self.recording.add(output)
        asked = self._set(self.generate).get("return_dict_in_generate")
        samples = len(sequences) // len(prompts)
        for row, prompt in enumerate(prompts):
            rows = range(row * samples, (row + 1) * samples)
            results = [self._result(prompt, sequences[r].tolist(), ids.shape[1]) for r in rows]
            yield [result | _details(output, r) if asked else result for result, r in zip(results, rows, strict=True)]

    def _constraint(self, start: int, end: int) -> dict[str, Any]:
        """Of a list, which has one for each text, those of a batch."""
        given = self.generate.get("constraint")
        if not isinstance(given, Sequence):
            return {}
        if len(given) < end:
            raise JaxgenError(f"constraint is a list of {len(given)}, and this is text {end - 1}; pass one for each")
        return {"constraint": given[start:end]}

    def _details_anyway(self) -> dict[str, Any]:
        """What the record needs; but what `generate` says of `output_scores` without details is its to say."""
        names = [name for name, value in self._set(self.generate).items() if value]
        asks = any(name.startswith("output_") or name == "top_logprobs" for name in names)
        return {} if asks else {"return_dict_in_generate": True}

    def _result(self, prompt: Prompt, sequence: list[int], width: int) -> dict[str, Any]:
        """One result: `sequence` has the prompt's `width` columns, then the new tokens."""
        kind = self.options.return_type or "FULL_TEXT"
        if kind == "TENSORS":
            return {"generated_token_ids": sequence}
        own = [token for token, real in zip(prompt.ids, prompt.mask, strict=True) if real]
        own = own[prompt.invented :]
        text = continuation(self.tokenizer, own, sequence[width - prompt.invented :], **self.decoding)
        if kind == "NEW_TEXT":
            return {"generated_text": text}
        if isinstance(prompt.text, str):
            return {"generated_text": prompt.text + text}
        return {"generated_text": self._answered(prompt.text, text, own)}

    def _answered(self, chat: Messages, text: str, ids: list[int]) -> Messages:
        if continues_final_message(chat, self.options.continue_final_message):
            last = {"role": chat[-1]["role"], "content": chat[-1]["content"] + text}
            return [*chat[:-1], last]
        if self._parses_answers():
            prompt = self.tokenizer.decode(ids, **self.decoding)
            return [*chat, self.tokenizer.parse_response(text, prefix=prompt, tools=self.options.tools)]
        return [*chat, {"role": "assistant", "content": text}]

    def _parses_answers(self) -> bool:
        """Whether the tokenizer knows how to take a model's answer apart (reasoning, calls of tools)."""
        return getattr(self.tokenizer, "response_template", None) is not None


def _details(output: Any, row: int) -> dict[str, Any]:
    """What else HF's pipeline hands out of a `GenerateOutput`: lists per step."""
    details = {}
    for name in ("scores", "logits", "sequences_scores", "beam_indices"):
        if (value := getattr(output, name, None)) is not None:
            per_step = isinstance(value, tuple)
            details[name] = [step[row].tolist() for step in value] if per_step else value[row].tolist()
    return details
