"""The beam search of transformers, watched, and compared with ours."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from tests.reference.cases import left_padded

# Scores that lie closer together than this may come in another order after float32 sums of another order.
SMALLEST_LEAD = 3e-5
NEW_TOKENS = 20


class Watched:
    """A transformers model whose beam search tells how close its closest decision was."""

    def __init__(self, model: Any):
        self.model, self.lead = model, np.inf
        self._watch("_get_top_k_continuations", self._candidates)
        self._watch("_update_finished_beams", self._finished)
        self._watch("_check_early_stop_heuristic", self._stop)

    def _watch(self, name: str, look: Any) -> None:
        method = getattr(self.model, name)

        def watched(**kwargs: Any) -> Any:
            look(SimpleNamespace(**kwargs))
            return method(**kwargs)

        setattr(self.model, name, watched)

    def _order(self, scores: torch.Tensor) -> None:
        real = scores[scores > -1e8].sort().values
        if len(real) > 1:
            self.lead = min(self.lead, float(real.diff().min()))

    def _candidates(self, step: Any) -> None:
        scores = step.accumulated_log_probs
        self._order(scores.topk(min(step.beams_to_keep + 1, scores.shape[1])).values)

    def _finished(self, step: Any) -> None:
        ends = step.next_token_hits_stopping_criteria[0] & step.top_num_beam_mask
        length = step.cur_len + 1 - step.decoder_prompt_len
        self._order(torch.cat([step.beam_scores[0], step.topk_log_probs[0, ends] / length**step.length_penalty]))

    def _stop(self, step: Any) -> None:
        if not step.is_sent_finished.all():
            return
        longest = step.early_stopping == "never" and step.length_penalty > 0
        length = (step.max_length if longest else step.cur_len) - step.decoder_prompt_len
        best, worst = step.running_beam_scores[0, 0] / length**step.length_penalty, step.beam_scores.min()
        self.lead = min(self.lead, float((best - worst).abs()))

    @torch.no_grad()
    def generate(self, prompt: list[int], **options: Any) -> tuple[SimpleNamespace, bool]:
        """Its result for one row, and whether every decision was clear."""
        self.lead = np.inf
        cache = {"use_cache": False} if getattr(self.model.config, "sliding_window", None) == 1 else {}
        result = self.model.generate(
            torch.tensor([prompt]), attention_mask=torch.ones(1, len(prompt), dtype=torch.long),
            return_dict_in_generate=True, output_scores=True, **options, **cache,
        )  # fmt: skip
        return SimpleNamespace(
            new=result.sequences[:, len(prompt) :].numpy(),
            indices=result.beam_indices.numpy(),
            totals=result.sequences_scores.numpy(),
            scores=[step.numpy() for step in result.scores],
        ), self.lead > SMALLEST_LEAD


def compare(theirs: Watched, ours: Any, prompts: list[list[int]], **options: Any) -> tuple[list[bool], int]:
    """Check the rows that transformers decided clearly; which those are, and how many sequences an eos ended."""
    ids, mask = left_padded(prompts)
    beams, returned = options["num_beams"], options.get("num_return_sequences", 1)
    options = {"max_new_tokens": NEW_TOKENS, "pad_token_id": 0} | options
    result = ours.generate(ids, mask, return_dict_in_generate=True, output_scores=True, **options)
    decided, ended = [], 0
    for row, prompt in enumerate(prompts):
        expected, clear = theirs.generate(prompt, **options)
        decided.append(clear)
        if not clear:
            continue
        for rank in range(returned):
            mine, inside = row * returned + rank, expected.indices[rank] >= 0
            count = int(inside.sum())
            assert result.lengths[mine] == count
            new = result.sequences[mine, ids.shape[1] :]
            np.testing.assert_array_equal(new[:count], expected.new[rank, :count])
            assert (new[count:] == 0).all()
            sources = np.where(result.beam_indices[mine] >= 0, result.beam_indices[mine] - row * beams, -1)
            np.testing.assert_array_equal(sources[:count], expected.indices[rank, :count])
            assert (sources[count:] == -1).all()
            terms = [expected.scores[t][expected.indices[rank, t], new[t]] for t in range(count)]
            np.testing.assert_allclose(result.logprobs[mine, :count], terms, atol=1e-4)
            ended += result.finish_reason[mine] == "eos"
        totals = result.sequences_scores[row * returned : (row + 1) * returned]
        np.testing.assert_allclose(totals, expected.totals, atol=1e-4, rtol=2e-6)  # a penalty of -1 multiplies
        for step, scores in enumerate(expected.scores):
            actual = result.scores[step][row * beams : (row + 1) * beams]
            np.testing.assert_allclose(actual, scores, atol=2e-4)
        assert all((later[row * beams] == 0).all() for later in result.scores[len(expected.scores) :])
    return decided, ended
