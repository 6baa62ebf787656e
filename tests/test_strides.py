"""Overlapping blocks: each token scored once, with the context that the stride promises."""

import json
import math
from itertools import count
from pathlib import Path

import pytest
import torch
from cli_run import fit
from conftest import byte_tokenizer, tiny_model
from models import logits, plan_of

from lmerge.alphas import AlphaConfig
from lmerge.data.module import MMLUDataModule
from lmerge.data.text import text_batches
from lmerge.evaluate import Evaluation
from lmerge.merged import MergedLlama

TEXT = "Many a word was written before a model read one of them; sí, también así."
BLOCK = 16


def window_start(place: int, stride: int) -> int:
    """First token of the first window of `BLOCK` tokens whose predictions reach a token."""
    return next(k * stride for k in count() if place <= k * stride + BLOCK)


@pytest.mark.parametrize("stride", [1, 3, 8, 15, BLOCK])
def test_scores_are_those_of_a_pass_for_each_token(stride: int) -> None:
    source = tiny_model()
    merged = MergedLlama(source, plan_of([1, 2]), {}, AlphaConfig(start="uniform")).causal_lm
    evaluation = Evaluation({"en": len(TEXT.encode())})
    tokenizer = byte_tokenizer()
    for batch in text_batches("en", TEXT, tokenizer, block_size=BLOCK, stride=stride, batch_size=4):
        evaluation.update(source, merged, batch)
    both = evaluation.results([], {})["text"]["en"]
    ids = tokenizer(TEXT)["input_ids"]
    nats, kl, same = {"source": 0.0, "merged": 0.0}, 0.0, 0
    for place in range(1, len(ids)):
        start = window_start(place, stride)
        # As in transformers' guide to perplexity: a stride keeps at least this much context.
        assert place - start >= min(place, BLOCK - stride + 1)
        context = torch.tensor([ids[start:place]])
        logp_V, logq_V = (
            logits(model, context)[0, -1].double().log_softmax(dim=-1) for model in (source, merged)
        )
        nats["source"] -= float(logp_V[ids[place]])
        nats["merged"] -= float(logq_V[ids[place]])
        kl += float((logp_V.exp() * (logp_V - logq_V)).sum())
        same += int(logp_V.argmax() == logq_V.argmax())
    num_tokens = len(ids) - 1
    for name, total in nats.items():
        assert both[name]["tokens"] == num_tokens
        assert both[name]["loss"] == pytest.approx(total / num_tokens, rel=1e-5)
        assert both[name]["ppl"] == pytest.approx(math.exp(total / num_tokens), rel=1e-4)
        wanted = total / math.log(2) / len(TEXT.encode())
        assert both[name]["bits_per_byte"] == pytest.approx(wanted, rel=1e-5)
    assert both["merged"]["kl"] == pytest.approx(kl / num_tokens, rel=1e-4)
    assert both["merged"]["agreement"] == same / num_tokens


@pytest.mark.parametrize("stride", [0, -1, 65])
def test_an_impossible_stride_is_refused(stride: int) -> None:
    with pytest.raises(ValueError, match=f"`stride` must be between 1 and .* 64, got {stride}"):
        MMLUDataModule(block_size=64, stride=stride)


def test_a_stride_changes_the_context_and_not_the_tokens(tiny_dir: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.txt").write_text(f"{name}. {TEXT} " * 4, encoding="utf-8")
    texts = f"--data.eval_text=[{tmp_path / 'a.txt'},{tmp_path / 'b.txt'}]"
    found = {}
    for stride in ("null", "16"):
        fit(tiny_dir, tmp_path / stride, texts, f"--data.stride={stride}")
        metrics = json.loads((tmp_path / stride / "metrics.json").read_text())
        found[stride] = metrics["validate"]["text"]
    assert list(found["16"]) == ["a", "b"]
    for name, both in found["16"].items():
        plain = found["null"][name]
        assert both["source"]["tokens"] == plain["source"]["tokens"]
        assert both["source"]["loss"] != plain["source"]["loss"]
        assert len(both["source"]["block_tokens"]) > len(plain["source"]["block_tokens"])
