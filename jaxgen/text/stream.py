"""Text as it is generated: the same prefill and decode as `model.generate`, a few tokens at a time."""

import inspect
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import jax

from jaxgen.errors import JaxgenError
from jaxgen.generation.execute import decode_in_chunks, prefill, program_for
from jaxgen.generation.prompts.past_key_values import PastKeyValues
from jaxgen.text.detokenize import Detokenizer, Words
from jaxgen.text.inputs import checked_texts, encode
from jaxgen.text.tokenizer import left_pad, tokenizer_for


class TextStream:
    """The texts of a generation while it runs: an iterator over pieces, to be read once.

    Of one text it yields pieces (str), of a list of texts `(row, piece)`; `row` is the row that `generate` would
    return. A row's pieces, joined, are the text that `generate` gives it. Pieces are whole words and never half a
    character. `close()` stops generating. As the last expression of a notebook's cell it shows itself as it grows.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        prompts: Sequence[Sequence[int]],
        *,
        single: bool = False,
        chunk_size: int = 1,
        skip_special_tokens: bool = True,
        include_stop_str_in_output: bool = True,
        keep_past: bool = False,
        generation_config: Any = None,
        key: Any = None,
        seed: Any = None,
        row_ids: Any = None,
        **options: Any,
    ):
        """`prompts` are ids; with `keep_past`, `past_key_values` are there afterwards. See `stream` for the rest."""
        if not isinstance(chunk_size, int) or isinstance(chunk_size, bool) or chunk_size < 1:
            raise JaxgenError(f"chunk_size={chunk_size!r} must be an int of at least 1")
        ids, mask = left_pad(prompts, 0), left_pad([[1] * len(prompt) for prompt in prompts], 0)
        options.setdefault("tokenizer", tokenizer)
        request = model._prepare(ids, mask, generation_config, key, seed, row_ids, options)
        samples = request.layout.samples
        if not request.search.append_only:
            raise JaxgenError(
                f"num_beams={request.config.num_beams}: beam search has no text to show before it ends; use num_beams=1"
            )
        if single and samples > 1:
            raise JaxgenError(f"num_return_sequences={samples}: pass [text], a list, to stream several rows")
        self._model, self._request, self._state, self._keep_past = model, request, None, keep_past
        self._single, self._chunk_size = single, chunk_size
        stops = () if include_stop_str_in_output else request.config.stop_strings or ()
        prompts = [prompt for prompt in prompts for _ in range(samples)]
        self._rows = [(Detokenizer(tokenizer, prompt, skip_special_tokens), Words(stops)) for prompt in prompts]
        self._texts = [""] * len(prompts)
        self._pieces = self._generate()

    @property
    def seed(self) -> int | None:
        """The seed in effect, which gives this text again; None when a key was given."""
        return self._request.seed

    @property
    def past_key_values(self) -> PastKeyValues | None:
        """What was read, for a call that goes on; None unless `keep_past`, while it goes on, or if it broke at work."""
        state = self._state if inspect.getgeneratorstate(self._pieces) == inspect.GEN_CLOSED else None
        if state is None or any(leaf.is_deleted() for leaf in jax.tree.leaves(state)):
            return None
        return PastKeyValues(self._model, state, len(self._rows), self._request.layout.static.drafts)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        row, piece = next(self._pieces)
        return piece if self._single else (row, piece)

    def close(self) -> None:
        """Stop generating; what is left of the text is never made."""
        self._pieces.close()

    def _generate(self) -> Generator[tuple[int, str], None, None]:
        running = set(range(len(self._rows)))
        started, program = time.monotonic(), program_for(self._model, self._request)
        state = prefill(program, self._request)
        self._state = state if self._keep_past else None
        for chunk in decode_in_chunks(program, self._request, state, started, self._chunk_size):
            self._state = chunk.state if self._keep_past else None
            for row in sorted(running):
                detokenizer, words = self._rows[row]
                piece = words.push(detokenizer.push(chunk.new[row].tolist()))
                if chunk.done[row]:
                    piece += words.finish(detokenizer.finish())
                    running.discard(row)
                if piece:
                    self._texts[row] += piece
                    yield row, piece

    def _ipython_display_(self) -> None:
        """One display, updated with every piece."""
        from IPython.display import display  # type: ignore[import-not-found]  # whoever calls this has it

        handle = display({"text/plain": self._shown()}, raw=True, display_id=True)
        for _ in self:
            if handle is not None:  # there is no shell to show it in
                handle.update({"text/plain": self._shown()}, raw=True)

    def _shown(self) -> str:
        if self._single:
            return self._texts[0]
        return "\n".join(f"[{row}] {text}" for row, text in enumerate(self._texts))


def stream(
    model: Any,
    texts: Any,
    *,
    tokenizer: Any = None,
    chunk_size: int = 1,
    skip_special_tokens: bool = True,
    include_stop_str_in_output: bool = True,
    generation_config: Any = None,
    key: Any = None,
    seed: Any = None,
    row_ids: Any = None,
    **options: Any,
) -> TextStream:
    """The continuation of a text or chat, or of a list of them, piece by piece: `TextStream` says how.

    `tokenizer`: an object, a directory or a hub id; by default that of the model's checkpoint. The host looks at the
    device every `chunk_size` tokens; that changes the pieces, not the text. With
    `include_stop_str_in_output=False` the text ends before a stop string. The other arguments are those of
    `model.generate`, and what is wrong with them is raised here, before anything is compiled.

    >>> model, tokenizer = getfixture("demo")
    >>> list(stream(model, "A list of colors: red, blue", tokenizer=tokenizer))
    [', ', 'green, ', 'yellow, ', 'orange, ', 'purple, ', 'pink,']
    """
    tokenizer = tokenizer_for(model, tokenizer)
    rows, single = checked_texts(texts)
    if not rows:
        raise JaxgenError("no texts to continue")
    return TextStream(
        model,
        tokenizer,
        [encode(tokenizer, text)["input_ids"] for text in rows],
        single=single,
        chunk_size=chunk_size,
        skip_special_tokens=skip_special_tokens,
        include_stop_str_in_output=include_stop_str_in_output,
        generation_config=generation_config,
        key=key,
        seed=seed,
        row_ids=row_ids,
        **options,
    )
