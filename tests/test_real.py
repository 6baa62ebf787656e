"""The laws and the demo on the real small model."""

import json
from pathlib import Path

import pytest
import torch
from cli_run import run
from transformers import AutoModelForCausalLM, AutoTokenizer

from lmerge.alphas import AlphaConfig
from lmerge.llama import decoder_layers, with_layer_index, with_layers
from lmerge.merged import MergedLlama
from lmerge.plan import Group, MergePlan
from lmerge.source import load_model

pytestmark = pytest.mark.slow

CONFIG = Path(__file__).parents[1] / "configs" / "demo.yaml"
TOKENS = torch.arange(100, 164)[None]
PLAN = MergePlan(num_layers=30, groups=(Group(members=(15, 16, 17, 18), anchor=15),))


@torch.no_grad()
def test_merging_nothing_keeps_every_bit_of_smollm2() -> None:
    source = load_model("smollm2-135m")
    merged = MergedLlama(source, MergePlan(num_layers=30, groups=()), {}, AlphaConfig())
    assert torch.equal(merged.causal_lm(TOKENS).logits, source(TOKENS).logits)


@torch.no_grad()
def test_anchor_alphas_drop_the_other_layers_of_smollm2() -> None:
    source = load_model("smollm2-135m")
    kept = [i for i in range(30) if i not in (16, 17, 18)]
    layers = [with_layer_index(decoder_layers(source)[i], n) for n, i in enumerate(kept)]
    dropped = with_layers(source, layers, kept)(TOKENS).logits
    merged = MergedLlama(source, PLAN, {}, AlphaConfig(granularity="neuron", start="anchor"))
    assert torch.equal(merged.causal_lm(TOKENS).logits, dropped)


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of `make demo`."""
    folder = tmp_path_factory.mktemp("runs") / "demo"
    run("fit", "--config", CONFIG, f"--run_dir={folder}", "--wandb=offline")
    return folder


def test_demo_costs_at_most_a_fifth_of_a_nat_on_english_prose(demo_dir: Path) -> None:
    text = json.loads((demo_dir / "metrics.json").read_text())["validate"]["text"]["en"]
    assert 0 < text["merged"]["loss"] - text["source"]["loss"] <= 0.20


def test_demo_passes_the_default_gate(demo_dir: Path) -> None:
    gate = json.loads((demo_dir / "metrics.json").read_text())["validate"]["gate"]
    assert len(gate) >= 5
    assert [check["name"] for check in gate if not check["passed"]] == []


def test_demo_removes_three_layers_and_exports_a_model_that_writes(demo_dir: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_dir / "model")
    tokenizer = AutoTokenizer.from_pretrained(demo_dir / "model")
    prompt = tokenizer("The capital of France is", return_tensors="pt").input_ids
    ids = model.generate(prompt, max_new_tokens=8, do_sample=False)
    assert len(model.model.layers) == 27
    assert "Paris" in tokenizer.decode(ids[0])


def test_demo_leaves_an_offline_wandb_run(demo_dir: Path) -> None:
    assert list(demo_dir.glob("wandb/offline-run-*/*.wandb"))


def test_demo_checkpoint_is_small(demo_dir: Path) -> None:
    assert (demo_dir / "checkpoints" / "last.ckpt").stat().st_size < 5e6
