"""Last words: their log-probability, and whether greedy decoding says them."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from lmerge.data.records import IGNORE, WordBatch
from lmerge.indexed import IndexedMetric
from lmerge.metrics import exp_interval, micro_accuracy, perplexity
from lmerge.statistics import bootstrap_interval, exact_sum


@torch.no_grad()
def score_last_words(model: PreTrainedModel, batch: WordBatch) -> tuple[Tensor, Tensor]:
    """Return the loss of each last word and whether the model's first choices spell it.

    Args:
        model: A causal language model in eval mode.
        batch: Texts of which only the last word's tokens are targets.

    Returns:
        Negative log-likelihood summed over the word's tokens, in nats (float64 B), and whether each
        of them is the most probable one (bool B), so that greedy decoding says exactly this word.
    """
    target_BT = batch.target_BT.to(model.device)
    mask_BT = target_BT != IGNORE
    decoder, head = cast(nn.Module, model.model), cast(nn.Module, model.lm_head)
    # Padding is on the right, where a causal model cannot see it: no mask is needed.
    states = decoder(input_ids=batch.token_BT.to(model.device), use_cache=False)
    logits_NV = head(states.last_hidden_state[mask_BT]).float()
    target_N = target_BT[mask_BT]
    nll_BT = torch.zeros(mask_BT.shape, dtype=torch.float64, device=model.device)
    nll_BT[mask_BT] = F.cross_entropy(logits_NV, target_N, reduction="none").double()
    hit_BT = torch.ones_like(mask_BT)
    hit_BT[mask_BT] = logits_NV.argmax(dim=-1) == target_N
    return nll_BT.sum(dim=1), hit_BT.all(dim=1)


class LastWordMetric(IndexedMetric):
    """How often a model says the last word of a text, and how much that word surprises it."""

    def __init__(self, *, seed: int = 0, **kwargs: object) -> None:
        """Start empty.

        Args:
            seed: Seed of the bootstrap over texts.
            kwargs: Options of `torchmetrics.Metric`.
        """
        super().__init__(num_columns=3, **kwargs)
        self.seed = seed

    def update(self, index_B: Tensor, nll_B: Tensor, hit_B: Tensor) -> None:
        """Add texts.

        Args:
            index_B: Place of each text in its file.
            nll_B: Negative log-likelihood of its last word, in nats.
            hit_B: Whether greedy decoding says it.
        """
        self.append(index_B, {"nll_B": nll_B, "hit_B": hit_B})

    def restore_columns(self, index_B: Tensor, *columns: Tensor) -> None:
        self.update(index_B, *columns)

    def compute(self) -> dict[str, Any]:
        """Return the scores of the whole file.

        Returns:
            `accuracy` with `low` and `high` (95%, Wilson) and `num_questions`; `ppl`, the exponent
            of the mean loss of a word, with `ppl_low` and `ppl_high` (bootstrap over texts);
            `item_correct` (0 or 1) and `item_nats` of each text, so that two runs can be paired.
        """
        _, nll_N, hit_N = self.sorted_rows().unbind(dim=1)
        rate = micro_accuracy(hit_N.bool())
        ends = exp_interval(bootstrap_interval(nll_N, seed=self.seed))
        return {
            "accuracy": rate.value,
            "low": rate.low,
            "high": rate.high,
            "num_questions": rate.total,
            "ppl": perplexity(exact_sum(nll_N), len(nll_N)),
            "ppl_low": ends.low,
            "ppl_high": ends.high,
            "item_correct": hit_N.long().tolist(),
            "item_nats": nll_N.tolist(),
        }
