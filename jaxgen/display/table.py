"""A result as a table: one line per new token."""

import math
from collections.abc import Iterable
from typing import Any

import numpy as np

from jaxgen.display.rows import Row, rows_of, step_logits
from jaxgen.display.texts import Texts, texts_of
from jaxgen.errors import JaxgenError


def to_pandas(output: Any, tokenizer: Any = None) -> Any:
    """A result as a pandas DataFrame with one line per new token.

    Columns: `row`; `prompt`, the index of the prompt in the call, and `sample`, of the rows that continue it; `step`
    counts a row's new tokens from 0, `position` its tokens; `token_id`; `text`, what the token adds to the text, None
    without a tokenizer; `logprob` as drawn, after processors, and `probability`, its exponential; `model_logprob`, the
    model's own; `finish_reason` where the row ends, else None. With `top_logprobs` or `output_logits` also `rank`:
    1 for the model's most probable token, missing if it is not among those asked for. With `top_logprobs` also
    `top_ids`, `top_texts` and `top_logprobs`, tuples. Raises `JaxgenError` if pandas is not installed.

    >>> model, tokenizer = getfixture("demo")
    >>> inputs = tokenizer(["A list of colors: red, blue"], return_tensors="np")
    >>> table = to_pandas(model.generate(**inputs, max_new_tokens=3, return_dict_in_generate=True))
    >>> table["text"].tolist(), table["finish_reason"].tolist()
    ([',', ' g', 're'], [None, None, 'length'])
    """
    try:
        import pandas as pd
    except ImportError as error:
        raise JaxgenError("to_pandas needs a package: pip install pandas") from error

    texts = texts_of(output, tokenizer)
    lines = [line for row in rows_of(output) for line in _lines(output, row, texts)]
    table = pd.DataFrame(lines)
    if "rank" in table:
        table["rank"] = table["rank"].astype("Int64")
    for name in {"text", "finish_reason"} & set(table):  # None, not NaN, where there is nothing
        table[name] = pd.Series([line[name] for line in lines], dtype=object)
    return table


def _lines(output: Any, row: Row, texts: Texts) -> Iterable[dict[str, Any]]:
    pieces = texts.pieces(row.prompt_ids, row.new_ids) if texts.known else None
    for step, token in enumerate(row.new_ids):
        logprob, at = float(output.logprobs[row.index, step]), (row.index, step)
        line: dict[str, Any] = {
            "row": row.index,
            "prompt": row.prompt,
            "sample": row.sample,
            "step": step,
            "position": len(row.prompt_ids) + step,
            "token_id": token,
            "text": None if pieces is None else pieces[step],
            "logprob": logprob,
            "model_logprob": float(output.model_logprobs[at]),
            "probability": math.exp(logprob),
        }
        logits = step_logits(output, row.index, step)
        if logits is not None:
            line["rank"] = int((logits > logits[token]).sum()) + 1
        elif output.top_ids is not None:
            found = np.flatnonzero(output.top_ids[at] == token)
            line["rank"] = int(found[0]) + 1 if found.size else None
        if output.top_ids is not None:
            ids = tuple(output.top_ids[at].tolist())
            line |= {"top_ids": ids, "top_texts": tuple(map(texts.name, ids)) if texts.known else None}
            line["top_logprobs"] = tuple(output.top_logprobs[at].tolist())
        yield line | {"finish_reason": output.finish_reason[row.index] if step + 1 == len(row.new_ids) else None}
