"""A model for EleutherAI's lm-evaluation-harness, which gives the numbers of its `hf` model (extra `eval`)."""

import dataclasses
import json
import logging
import os
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from jaxgen.convert.load import AutoModelForCausalLM
from jaxgen.errors import JaxgenError, shown
from jaxgen.generation.options.checks import integer
from jaxgen.generation.programs.strict import Strict
from jaxgen.generation.prompts.layout import SMALLEST_PROMPT, bucket
from jaxgen.generation.results.score import TextScore, scores_of
from jaxgen.text.inputs import chat_text
from jaxgen.text.tokenizer import left_pad, tokenizer_for

try:
    from lm_eval.api.model import TemplateLM
    from lm_eval.api.registry import register_model
    from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window
    from tqdm import tqdm
except ImportError as error:
    raise JaxgenError("evaluation needs lm-eval: pip install lm-eval") from error

logger = logging.getLogger("jaxgen")

_AUTO = 64  # rows that "auto" begins with; lm-eval's own number
Request = tuple[tuple[str, str] | None, list[int], list[int]]  # texts to cache an answer by; ids: context and rest


class JaxgenLM(TemplateLM):
    """A model of jaxgen's for `lm_eval.simple_evaluate(model=JaxgenLM(...), tasks=[...])`.

    `pretrained`: a model, a checkpoint directory or a hub id; with `dtype`, `device` ("cpu", "cuda:1") and `loading`
    (`revision`, `load_in_4bit`, `adapter`, ...) for `from_pretrained`. `batch_size`: requests at a time, at most
    `max_batch_size`; "auto" begins with that (64) at every length, and halves it where the memory does not suffice.
    `max_length`: the longest context, by default the model's. `max_gen_toks`: new tokens where a task does not say.
    `add_bos_token`, `prefix_token_id` (before what has no context; by default BOS, or EOS), `enable_thinking`,
    `think_end_token` (a text or an id, up to which an answer is dropped) and `chat_template_args` are as in `hf`.

    What is sampled depends on `seed` and on the task, document and repetition, not on batches or order. With
    `strict` (True or a `jaxgen.Strict`) nothing depends on `batch_size`, which is then at most `strict.rows`. Raises
    `JaxgenError` as `from_pretrained` and `generate`. Source: lm_eval.models.huggingface.HFLM.
    """

    def __init__(
        self,
        pretrained: Any,
        *,
        tokenizer: Any = None,
        batch_size: int | str = 8,
        max_batch_size: int | None = None,
        device: str | None = None,
        dtype: Any = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        prefix_token_id: int | None = None,
        enable_thinking: bool | None = None,
        think_end_token: str | int | None = None,
        chat_template_args: dict[str, Any] | None = None,
        strict: bool | Strict | None = None,
        seed: int = 0,
        **loading: Any,
    ):
        super().__init__()
        self.model = _loaded(pretrained, {"device_map": device, "dtype": dtype, **loading})
        options = {} if add_bos_token is None else {"add_bos_token": add_bos_token}
        self.tokenizer = tokenizer_for(self.model, tokenizer, **options)
        self.add_bos_token = add_bos_token
        self.strict, self.seed = Strict.of(strict), seed
        self.batch_size, self._auto = _batch_size(batch_size, max_batch_size, self.strict)
        context = self.model.config.max_position_embeddings
        self.max_length = context if max_length is None else integer(1)("max_length", max_length)
        if self.max_length > context:
            raise JaxgenError(f"max_length={max_length} is more than the model's context of {context}")
        self.max_gen_toks = integer(1)("max_gen_toks", max_gen_toks)
        self._prefix_token_id = prefix_token_id
        self.think_end_token = think_end_token
        if isinstance(think_end_token, str) and think_end_token.isdigit():
            self.think_end_token = int(think_end_token)
        thinking = {} if enable_thinking is None else {"enable_thinking": enable_thinking}
        self.chat_template_args = {**(chat_template_args or {}), **thinking}

    # What lm-eval asks of tokens and chats.

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self.tokenizer.eos_token_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before what has no context."""
        given = (self._prefix_token_id, self.tokenizer.bos_token_id, self.tokenizer.eos_token_id)
        if (chosen := next((token for token in given if token is not None), None)) is None:
            raise JaxgenError("the tokenizer has neither a BOS nor an EOS token: pass prefix_token_id=")
        return chosen

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_others: Any) -> list[int]:
        """A text's ids. Where nothing is said, one that begins with the prefix token's text gets no second one."""
        return self._encode(string, add_special_tokens, self.tokenizer.decode(self.prefix_token_id))

    def _encode(self, text: str, add_special_tokens: bool | None, beginning: str | None) -> list[int]:
        if add_special_tokens is None:
            begun = beginning is not None and text.startswith(beginning)
            add_special_tokens = False if begun else self.add_bos_token
        options = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return list(self.tokenizer(text, **options)["input_ids"])

    @property
    def tokenizer_name(self) -> str:
        """What lm-eval's cache of requests calls the tokenizer."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A chat as text; without its system message where the template refuses that."""
        options = {"add_generation_prompt": add_generation_prompt, **self.chat_template_args}
        options["continue_final_message"] = not add_generation_prompt
        try:
            return chat_text(self.tokenizer, chat_history, **options)
        except JaxgenError:
            rest = [message for message in chat_history if message["role"] != "system"]
            if len(rest) == len(chat_history):
                raise
            logger.warning("the chat template refuses the system message, which is left out")
            return chat_text(self.tokenizer, rest, **options)

    def get_model_info(self) -> dict[str, Any]:
        """What lm-eval keeps beside the results."""
        from jaxgen import __version__

        return {
            "model_source": "jaxgen",
            "pretrained": str(self.model.name_or_path),
            "jaxgen_version": __version__,
            "model_num_parameters": self.model.num_parameters(),
            "model_dtype": str(self.model.dtype),
        }

    # Scores.

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """Of each continuation given its context: the log-probability, and whether greedy search finds it."""
        for place, request in enumerate(requests):
            if not request.args[1]:
                raise JaxgenError(f"request {place}: an empty continuation has no tokens to score")
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """The log-probability of each text, of any length: every token once, with as much context as there is room."""
        windows: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            pairs = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in pairs:
                windows.append((None, *make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (logprob, _) in zip(owners, self._loglikelihood_tokens(windows, disable_tqdm), strict=True):
            totals[owner] += logprob
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_others: Any
    ) -> list[tuple[float, bool]]:
        longest = self.max_length + 1  # the model does not read the last
        for place, (_, _, rest) in enumerate(requests):
            if not 0 < len(rest) <= self.max_length:
                raise JaxgenError(
                    f"request {place}: a continuation of {len(rest)} tokens, where a score needs 1 to max_length="
                    f"{self.max_length}"
                )
        if cut := sum(len(context) + len(rest) > longest for _, context, rest in requests):
            logger.warning(f"of {cut} requests the context is cut at its beginning, to max_length={self.max_length}")
        rows = [np.array([*context, *rest][-longest:], np.int32) for _, context, rest in requests]
        found = [(0.0, False)] * len(rows)
        with tqdm(total=len(rows), disable=disable_tqdm, desc="Running loglikelihood requests") as progress:
            for places, scores in self._scored(rows):
                for place, score in zip(places, scores, strict=True):
                    key, _, rest = requests[place]
                    new = slice(-len(rest), None)
                    found[place] = float(score.logprobs[new].sum(dtype=np.float64)), bool(score.greedy[new].all())
                    if key is not None:
                        self.cache_hook.add_partial("loglikelihood", key, found[place])
                progress.update(len(places))
        return found

    def _scored(self, rows: list[Any]) -> Iterator[tuple[list[int], list[TextScore]]]:
        """The scores of all rows, longest first: a row's neighbours are of its bucket, and so is its batch's shape.

        A row's numbers depend on it, and on the batch's shape: the last batch of a bucket is filled up, so that the
        order of requests changes nothing.
        """
        for places in _groups([bucket(len(row) - 1, SMALLEST_PROMPT) for row in rows]):
            size, done = min(self.batch_size, len(places)), 0
            while done < len(places):
                batch = places[done : done + size]
                filler = [batch[0]] * ((self.strict.rows if self.strict else size) - len(batch))
                try:
                    scores = scores_of(self.model, [rows[place] for place in [*batch, *filler]])
                except RuntimeError as error:
                    if not self._auto or size == 1 or "RESOURCE_EXHAUSTED" not in str(error):
                        raise
                    size //= 2
                    continue
                yield batch, scores[: len(batch)]
                done += size

    # Answers.

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """The text after each context, until one of its stops."""
        names = _names(requests)
        kinds: dict[str, list[int]] = defaultdict(list)
        for place, request in enumerate(requests):
            kinds[json.dumps(request.args[1], sort_keys=True, default=repr)].append(place)
        found = [""] * len(requests)
        with tqdm(total=len(requests), disable=disable_tqdm, desc="Running generate_until requests") as progress:
            for places in kinds.values():
                asked = self._asked(requests[places[0]].args[1])
                prompts = {place: self._prompt(requests[place].args[0], asked.tokens) for place in places}
                sizes = [bucket(len(prompts[place]), SMALLEST_PROMPT) for place in places]
                for group in _groups(sizes):
                    for start in range(0, len(group), self.batch_size):
                        batch = [places[index] for index in group[start : start + self.batch_size]]
                        rows = self._new_tokens([prompts[x] for x in batch], [names[x] for x in batch], asked)
                        for place, row in zip(batch, rows, strict=True):
                            found[place] = self._text(row, asked.stops)
                            self.cache_hook.add_partial("generate_until", requests[place].args, found[place])
                        progress.update(len(batch))
        return found

    def _asked(self, options: dict[str, Any]) -> "_Asked":
        """What a task wants, in the words of `generate`."""
        options = dict(normalize_gen_kwargs(options, self.max_gen_toks))
        stops = [stop for stop in handle_stop_sequences(options.pop("until", None), eos=None) if stop]
        tokens = integer(1)("max_gen_toks", options.pop("max_gen_toks"))
        if tokens >= self.max_length:
            raise JaxgenError(f"max_gen_toks={tokens} leaves no room for a prompt in max_length={self.max_length}")
        if not options["do_sample"]:
            options.pop("temperature", None)
        ends = self.model.generation_config.eos_token_id
        ends = [] if ends is None else [ends] if isinstance(ends, int) else list(ends)
        options["eos_token_id"] = sorted({*ends, self.eot_token_id} - {None}) or None
        if stops:
            options |= {"stop_strings": stops, "tokenizer": self.tokenizer}
        return _Asked(tokens, stops, {**options, "num_return_sequences": 1, "strict": self.strict})

    def _prompt(self, context: str, tokens: int) -> list[int]:
        """The end of a context, as far as it leaves room for so many new tokens."""
        ids = self._encode(context, None, self.tokenizer.bos_token)
        return ids[-(self.max_length - tokens) :] or [self.prefix_token_id]

    def _new_tokens(self, prompts: list[list[int]], names: list[str], asked: "_Asked") -> list[list[int]]:
        """The new tokens after each prompt."""
        rows = self._continued(prompts, names, asked.tokens, asked.options)
        for place, (prompt, name) in enumerate(zip(prompts, names, strict=True)):
            while asked.goes_on(*rows[place], self.tokenizer):
                tokens = rows[place][0]
                [(more, reason)] = self._continued([prompt + tokens], [name], asked.tokens - len(tokens), asked.options)
                rows[place] = tokens + more, reason
        return [tokens for tokens, _ in rows]

    def _continued(
        self, prompts: list[list[int]], names: list[str], tokens: int, options: dict[str, Any]
    ) -> list[tuple[list[int], str]]:
        """At most so many new tokens of each prompt, and why they end."""
        if options["do_sample"]:
            options = {**options, "seed": self.seed, "row_ids": names}
        masks = left_pad([[1] * len(row) for row in prompts], 0)
        out = self.model.generate(
            left_pad(prompts, 0), masks, **options, max_new_tokens=tokens, return_dict_in_generate=True
        )
        new = out.sequences[:, masks.shape[1] :]
        rows = zip(new, out.lengths, out.finish_reason, strict=True)
        return [(row[:count].tolist(), reason) for row, count, reason in rows]

    def _text(self, tokens: list[int], stops: list[str]) -> str:
        """What is said in new tokens, without what is thought before it and what follows a stop."""
        end = self.think_end_token
        if isinstance(end, int) and end in tokens:
            said = tokens[len(tokens) - tokens[::-1].index(end) :]
            text = self.tokenizer.decode(said, skip_special_tokens=True).lstrip()
        else:
            text = self.tokenizer.decode(tokens, skip_special_tokens=True)
        stops = stops if self.eot_token_id is None else [*stops, self.tokenizer.decode(self.eot_token_id)]
        return postprocess_generated_text(text, stops, end if isinstance(end, str) else None)


register_model("jaxgen")(JaxgenLM)


@dataclasses.dataclass(frozen=True)
class _Asked:
    """What a task wants after a prompt."""

    tokens: int  # at most
    stops: list[str]
    options: dict[str, Any]  # of `generate`

    def goes_on(self, tokens: list[int], reason: str, tokenizer: Any) -> bool:
        """Whether new tokens end too early: for `generate` a stop string may begin in the prompt, for tasks not."""
        if reason != "stop_string" or len(tokens) >= self.tokens:
            return False
        text = tokenizer.decode(tokens)
        return not any(stop in text for stop in self.stops)


def _loaded(pretrained: Any, options: dict[str, Any]) -> Any:
    """A model, loaded if it is a path or a hub id."""
    options = {name: value for name, value in options.items() if value is not None}
    if isinstance(pretrained, str | os.PathLike):
        return AutoModelForCausalLM.from_pretrained(pretrained, **options)
    if options:
        name, value = next(iter(options.items()))
        raise JaxgenError(f"{name}={shown(value)} is for loading a model; this one is loaded already")
    return pretrained


def _batch_size(asked: int | str, most: int | None, strict: Strict | None) -> tuple[int, bool]:
    """How many requests at a time, at most, and whether fewer will do where memory is short."""
    auto = str(asked).partition(":")[0] == "auto"
    most = None if most is None else integer(1)("max_batch_size", int(most) if str(most).isdigit() else most)
    if auto and strict:
        return min(most or strict.rows, strict.rows), False
    if auto:
        return most or _AUTO, True
    size = integer(1)("batch_size", int(asked) if str(asked).isdigit() else asked)
    size = min(size, most or size)
    if strict and size > strict.rows:
        raise JaxgenError(f"batch_size={size} is more than the {strict.rows} rows of strict; pass Strict(rows={size})")
    return size, False


def _groups(sizes: Sequence[int]) -> Iterator[list[int]]:
    """The places of equal sizes, the largest first."""
    groups: dict[int, list[int]] = defaultdict(list)
    for place, size in enumerate(sizes):
        groups[size].append(place)
    return (groups[size] for size in sorted(groups, reverse=True))


def _names(requests: list[Any]) -> list[str]:
    """The requests' names, by which they are sampled: the task, its document, and which of its repetitions it is."""
    seen: Counter[str] = Counter()
    names = []
    for request in requests:
        name = f"{request.task_name}/{request.doc_id}/{request.idx}"
        names.append(f"{name}/{seen[name]}")
        seen[name] += 1
    return names
