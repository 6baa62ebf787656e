"""The gate on the real small model: what letters alone would let through does not pass."""

from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from lmerge.alphas import AlphaConfig
from lmerge.artefacts import write_on
from lmerge.data.module import MMLUDataModule
from lmerge.data.records import ChoiceBatch, TextBatch
from lmerge.evaluate import Evaluation
from lmerge.gate import Check, GateConfig, check_gate
from lmerge.llama import decoder_layers, num_layers
from lmerge.merged import MergedLlama
from lmerge.plan import MergePlan, tail_groups
from lmerge.source import load_model

pytestmark = pytest.mark.slow

MKA_ALPHA = 0.6225
"""Share of the lower layer in MKA's released merges, whatever the data: sigmoid(1/2)."""

NUM_TEXT_BATCHES = 1


@pytest.fixture(scope="module")
def data(shared_dir: Path) -> MMLUDataModule:
    """Forty real questions without examples, and the bundled English prose."""
    module = MMLUDataModule(
        questions=str(shared_dir / "data" / "mmlu"),
        domains=["anatomy", "virology", "marketing", "nutrition"],
        num_shots=0,
        max_questions=10,
        scorings=["letter"],
    )
    module.setup("validate")
    return module


def some_batches(data: MMLUDataModule) -> Iterator[TextBatch | ChoiceBatch]:
    texts = [batch for batch in data.evaluation_batches if isinstance(batch, TextBatch)]
    yield from islice(texts, NUM_TEXT_BATCHES)
    yield from (batch for batch in data.evaluation_batches if isinstance(batch, ChoiceBatch))


def tail_merged(source: PreTrainedModel, num_removed: int) -> PreTrainedModel:
    """MKA's released schedule: the last two layers become one, again and again."""
    depth = num_layers(source)
    plan = MergePlan(
        num_layers=depth, groups=tail_groups(torch.eye(depth), num_removed), method="tail"
    )
    config = AlphaConfig(granularity="layer", start="fixed", value=MKA_ALPHA)
    return MergedLlama(source, plan, {}, config).plain()


@pytest.fixture(scope="module")
def results(data: MMLUDataModule) -> dict[str, Any]:
    """Source and the model without its last eight layers, on the same questions and text."""
    source = load_model("smollm2-135m")
    merged = tail_merged(source, 8)
    assert len(decoder_layers(merged)) == 22
    evaluation = Evaluation(data.text_bytes, data.scorings)
    for batch in some_batches(data):
        evaluation.update(source, merged, batch)
    found = evaluation.results(data.questions, data.domain_subjects)
    found["generation"] = {
        name: write_on(model, data.tokenizer)
        for name, model in {"source": source, "merged": merged}.items()
    }
    return found


def checks(results: dict[str, Any]) -> dict[str, Check]:
    return {check.name: check for check in check_gate(results, GateConfig())}


def test_letter_accuracy_alone_would_let_the_published_tail_schedule_pass(
    results: dict[str, Any],
) -> None:
    letters = results["choices"]["letter"]
    assert letters["mcnemar"]["p_value"] > 0.05
    assert checks(results)["accuracy ratio (upper end), letter"].passed


@pytest.mark.parametrize(
    "name",
    [
        "perplexity ratio on en text",
        "KL on en text",
        "distinct bigrams",
        "repetition beyond the source's",
    ],
)
def test_the_default_gate_refuses_the_published_tail_schedule(
    name: str, results: dict[str, Any]
) -> None:
    assert not checks(results)[name].passed
