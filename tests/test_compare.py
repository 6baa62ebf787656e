import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from models import logits, plan_of
from offline_run import Offline

from lmerge import compare as module
from lmerge.alphas import AlphaConfig
from lmerge.bench import CompareData
from lmerge.cache import cache_states
from lmerge.compare import compare
from lmerge.compare_table import best_baseline, held_out_loss
from lmerge.compose import Composer, MethodConfig, Planner
from lmerge.data.text import block_batches
from lmerge.heal import HealConfig
from lmerge.merged import MergedLlama
from lmerge.refine import refine_layers
from lmerge.repair import RepairConfig
from lmerge.score import score_text_pair
from lmerge.yardstick import Yardstick

DEEP = RepairConfig(method="deep", num_after=1)
HEAL = HealConfig(method="scales", num_steps=2)
METHODS = [
    MethodConfig(name="ours", repair=DEEP, heal=HEAL),
    MethodConfig(name="block", plan_method="block_repaired"),
    MethodConfig(baseline="last"),
    MethodConfig(baseline="replaceme"),
]
DATA = CompareData(
    domains=["medical"],
    eval_domains=["medical"],
    block_size=64,
    num_calibration_tokens=2048,
    eval_questions=1,
    eval_tokens=256,
)


def run(
    tiny_dir: Path, folder: Path, methods: list[MethodConfig] = METHODS, **more: object
) -> None:
    compare(methods, source=str(tiny_dir), budgets=[1, 2], data=DATA, run_dir=folder, **more)


@pytest.fixture(scope="module")
def finished(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("compare")
    run(tiny_dir, folder)
    return folder


def cells(folder: Path) -> list[dict]:
    return json.loads((folder / "compare.json").read_text())["cells"]


def test_every_method_at_every_budget_is_a_cell(finished: Path) -> None:
    found = [(cell["num_removed"], cell["method"]) for cell in cells(finished)]
    assert found == [(n, m.title) for n in (1, 2) for m in METHODS]
    assert len(list((finished / "cells").iterdir())) == 8


def test_tables_and_figure_are_written(finished: Path) -> None:
    markdown = (finished / "compare.md").read_text()
    assert markdown.count("\n## ") + markdown.startswith("## ") == 2
    assert "| ours |" in markdown
    assert len((finished / "compare.csv").read_text().splitlines()) == 9
    assert (finished / "pareto.png").stat().st_size > 1000


def test_every_text_of_a_cell_is_a_record_of_its_own(finished: Path) -> None:
    records = json.loads((finished / "compare.json").read_text())["records"]
    losses = {(r["method"], r["budget"], r["text"]): r["loss"] for r in records}
    expected = {
        (cell["method"], cell["num_removed"], name): text["loss"]
        for cell in cells(finished)
        for name, text in cell["texts"].items()
    }
    assert losses == expected
    for record in records:
        assert (
            record["interval_cloze"][0] <= record["accuracy_cloze"] <= record["interval_cloze"][1]
        )
        assert {"source_loss", "tokens", "kl", "minutes", "commit"} <= set(record)


def test_texts_are_the_calibration_blocks_and_those_that_were_held_back(finished: Path) -> None:
    for cell in cells(finished):
        assert set(cell["texts"]) == {"en", "questions", "calibration"}
        assert set(cell["choices"]) == {"cloze", "letter"}
        for text in cell["texts"].values():
            assert sum(text["block_nats"]) / sum(text["block_tokens"]) == pytest.approx(
                text["loss"]
            )


def test_each_domain_that_is_measured_on_is_a_text(tiny_dir: Path, tmp_path: Path) -> None:
    data = replace(DATA, domains=["medical"], eval_domains=["medical", "cs"])
    methods = [MethodConfig(baseline="last")]
    compare(methods, source=str(tiny_dir), budgets=[1], data=data, run_dir=tmp_path)
    (cell,) = cells(tmp_path)
    names = {"questions: medical, en", "questions: cs, en"}
    assert names == {name for name in cell["texts"] if name.startswith("questions")}


def test_the_source_scores_the_same_in_every_cell(finished: Path) -> None:
    losses = {json.dumps([t["source_loss"] for t in c["texts"].values()]) for c in cells(finished)}
    assert len(losses) == 1


def test_finished_cells_are_not_computed_again(
    finished: Path, tiny_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module.Bench, "compute", lambda *_: pytest.fail("computed again"))
    run(tiny_dir, finished, wandb="offline")
    assert Offline(finished).summary["compare/cells"]["nrows"] == 8


def test_a_comparison_goes_on_where_it_stopped(tiny_dir: Path, tmp_path: Path) -> None:
    run(tiny_dir, tmp_path, METHODS[2:], max_minutes=0.0)
    assert not (tmp_path / "cells").exists()
    run(tiny_dir, tmp_path, METHODS[2:3])
    run(tiny_dir, tmp_path, METHODS[2:])
    assert len(cells(tmp_path)) == 4


def test_the_best_baseline_is_no_composition_of_ours(finished: Path) -> None:
    found = cells(finished)
    best = best_baseline(found, 1)
    assert best is not None
    assert best["method"] in {"last", "replaceme"}
    others = [c for c in found if c["num_removed"] == 1 and c["config"]["baseline"]]
    assert held_out_loss(best) == min(map(held_out_loss, others))


def test_a_call_may_compute_some_rows_alone(tiny_dir: Path, tmp_path: Path) -> None:
    run(tiny_dir, tmp_path, METHODS[2:], only=["replaceme"])
    assert [cell["method"] for cell in cells(tmp_path)] == ["replaceme", "replaceme"]
    with pytest.raises(ValueError, match="`only` must name some of last, replaceme, got 'laco'"):
        run(tiny_dir, tmp_path, METHODS[2:], only=["laco"])


@pytest.mark.parametrize("methods", [[], [METHODS[2], METHODS[2]]])
def test_bad_rows_are_refused(methods: list[MethodConfig], tiny_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="at least one row and different names"):
        run(tiny_dir, tmp_path, methods)


def test_a_row_needs_a_name() -> None:
    with pytest.raises(ValueError, match="needs a `name`"):
        MethodConfig()


def test_a_yardstick_scores_as_the_pair_scorer_does() -> None:
    source, model = tiny_model(0), tiny_model(1)
    token_BT = torch.randint(0, 256, (5, 24), generator=torch.Generator().manual_seed(0))
    batches = block_batches("text", token_BT, 2)
    found = Yardstick(source, {"text": batches}, []).score(model)["texts"]["text"]
    pairs = [score_text_pair(source, model, batch) for batch in batches]
    total = sum(int(p.mask_BT.sum()) for p in pairs)
    for key, name in (
        ("loss", "merged_nll_BT"),
        ("source_loss", "source_nll_BT"),
        ("kl", "kl_BT"),
    ):
        wanted = sum(float(getattr(p, name).sum()) for p in pairs) / total
        assert found[key] == pytest.approx(wanted, rel=1e-5)


def test_a_composition_is_its_steps_one_after_the_other() -> None:
    source, token_BT = tiny_model(), torch.randint(0, 256, (24, 32))
    held_B = torch.arange(24) % 4 == 3
    plan = plan_of([1, 2])
    method = MethodConfig(name="deep", repair=DEEP)
    composed = Composer(source, token_BT, held_B, seed=0).compose(plan.groups, method)
    merged = MergedLlama(source, plan, {}, AlphaConfig())
    prefix_BTD = cache_states(source, token_BT, 1).prefix_BTD
    refine_layers(source, merged, prefix_BTD, held_B, RepairConfig(method="deep", num_after=1))
    torch.testing.assert_close(logits(composed.causal_lm), logits(merged.causal_lm))


def test_known_costs_spare_the_search(monkeypatch: pytest.MonkeyPatch) -> None:
    source, token_BT = tiny_model(), torch.randint(0, 256, (24, 32))
    held_B = torch.arange(24) % 4 == 3
    first = Planner(source, token_BT, held_B, costs={}, most_removed=2)
    groups = [first.groups("groups_repaired", n) for n in (1, 2)]
    second = Planner(source, token_BT, held_B, costs=first.costs, most_removed=2)
    monkeypatch.setattr("lmerge.search.GroupSearch.costs", lambda *_: pytest.fail("searched"))
    assert [second.groups("groups_repaired", n) for n in (1, 2)] == groups


def test_a_repair_that_is_kept_is_the_repair_computed_again() -> None:
    source, token_BT = tiny_model(), torch.randint(0, 256, (24, 32))
    held_B, groups = torch.arange(24) % 4 == 3, plan_of([1, 2]).groups
    healed = MethodConfig(name="healed", repair=DEEP, heal=HEAL)
    kept = Composer(source, token_BT, held_B, seed=0)
    kept.compose(groups, MethodConfig(name="deep", repair=DEEP))
    for _ in range(2):  # healing must not change what is kept
        found = kept.compose(groups, healed)
        wanted = Composer(source, token_BT, held_B, seed=0).compose(groups, healed)
        torch.testing.assert_close(logits(found.causal_lm), logits(wanted.causal_lm))
