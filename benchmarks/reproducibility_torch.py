"""The same jobs in transformers on torch: `python reproducibility_torch.py SPEC.json OUT.npz`; see reproducibility.py.

As its documentation asks: left padding with a mask, from which `generate` makes the position ids, and `set_seed` before
each call. Its random numbers are one global stream, which it never promised to be independent of the batch.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from reproducibility_jobs import generated

import jaxgen


def torch_call(model: Any, new_tokens: int) -> Callable[..., tuple[np.ndarray, np.ndarray]]:
    """A batch through transformers' `generate`."""

    def call(
        ids: np.ndarray, mask: np.ndarray, batch: list[int], seed: Any, options: dict[str, Any], how: dict[str, Any]
    ) -> tuple[np.ndarray, np.ndarray]:
        if seed is not None:
            transformers.set_seed(seed)
        with torch.inference_mode():
            out = model.generate(
                torch.tensor(ids), attention_mask=torch.tensor(mask), max_new_tokens=new_tokens, eos_token_id=None,
                return_dict_in_generate=True, output_scores=True, **options,
            )  # fmt: skip
        new = out.sequences[:, ids.shape[1] :]
        scores = torch.log_softmax(torch.stack(out.scores, 1).float(), -1)
        return new.numpy(), scores.gather(2, new[..., None])[..., 0].numpy()

    return call


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    found = {}
    for weights in spec["weights"]:
        model = transformers.AutoModelForCausalLM.from_pretrained(jaxgen.demo.path(), dtype=getattr(torch, weights))
        for name, arrays in generated(spec, torch_call(model.eval(), spec["new_tokens"])):
            found |= {f"{weights}/{name}/{kind}": array for kind, array in arrays.items()}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__}
    everything: dict[str, Any] = found | {"about": np.array(json.dumps({"versions": versions}))}
    np.savez(sys.argv[2], **everything)


if __name__ == "__main__":
    main()
