"""What W&B is told, read back from the files of offline runs."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_run import SMALL, run
from offline_run import Offline

from lmerge.trials import Trial
from lmerge.wandb_log import run_group, run_title, summary_of
from lmerge.wandb_tables import log_cells, log_trials, wandb_run

OPTIONS = {
    "seed_everything": 0,
    "model": {"source": "smollm2-135m", "num_removed": 6, "plan_method": "block_repaired"},
    "repair": {"config": {"method": "deep"}, "heal": {"method": "none"}},
}


@pytest.fixture(scope="module")
def fitted(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Offline:
    """A fit on the tiny model whose run and exported model went to W&B."""
    folder = tmp_path_factory.mktemp("wandb") / "tiny"
    options = [o for o in SMALL if not o.startswith(("--wandb", "--artefacts"))]
    run("fit", f"--model.source={tiny_dir}", f"--run_dir={folder}", *options, "--export.wandb=true")
    import wandb

    wandb.finish()
    return Offline(folder)


def test_a_run_is_named_and_grouped_so_that_a_project_page_reads_well() -> None:
    assert run_title(OPTIONS, "fit") == "smollm2-135m -6 block_repaired deep seed0"
    assert run_title(OPTIONS, "test") == "smollm2-135m -6 block_repaired deep seed0 test"
    assert run_group(OPTIONS) == "smollm2-135m -6"
    budget = {**OPTIONS, "model": {**OPTIONS["model"], "budget": "20%"}}
    assert run_group(budget) == "smollm2-135m -20%"
    mine = {**OPTIONS, "model": {**OPTIONS["model"], "plan": "plans/mine.json"}}
    assert run_title(mine, "fit") == "smollm2-135m plan mine mine deep seed0"


def test_a_fit_has_name_group_job_tags_and_options(fitted: Offline) -> None:
    (record,) = fitted.of_type("run")
    assert fitted.data["name"].endswith(" -2 block_repaired down seed0")
    assert record["run_group"] == fitted.data["name"].removesuffix(" block_repaired down seed0")
    assert record["job_type"] == "fit"
    assert fitted.data["tags"] == ["block_repaired", "weights"]
    assert fitted.data["config"]["model"]["num_removed"] == 2


def test_the_summary_holds_the_best_value_and_the_last(fitted: Offline) -> None:
    summary = fitted.summary
    for name in ("train/loss", "val/loss/en", "val/ppl/en", "val/kl/en"):
        assert summary[name]["min"] <= summary[name]["last"]
    for scoring in ("letter", "cloze"):
        assert set(summary[f"val/{scoring}_accuracy/medical"]) == {"max", "last"}


def test_the_summary_holds_what_runs_are_compared_by(fitted: Offline) -> None:
    run_dir = fitted.folder.parents[1]
    results = json.loads((run_dir / "metrics.json").read_text())["validate"]
    for name, value in summary_of(results).items():
        assert fitted.summary[f"validate/{name}"] == pytest.approx(value)
    assert fitted.summary["validate/layers"] == 2


def test_tables_charts_images_and_the_page_are_logged(fitted: Offline) -> None:
    assert fitted.table("validate/results")["columns"] == ["what", "source", "merged", "change"]
    texts = fitted.table("validate/texts")
    assert texts["columns"] == ["prompt", "source", "merged"]
    assert len(texts["data"]) == 8
    for scoring in ("letter", "cloze"):
        assert len(fitted.table(f"validate/subjects_{scoring}_table")["data"]) == 2
    groups = fitted.table("plan/groups")["data"]
    assert [row[0] for row in groups] == ["1 to 3"] or len(groups) == 1
    assert fitted.summary["plan/candidates_table"]["nrows"] >= 1
    assert fitted.summary["report"]["_type"] == "html-file"
    images = {path.parent.name for path in (fitted.folder / "files").rglob("*.png")}
    assert images >= {"plan", "alphas", "alignment", "similarity"}


def test_the_exported_model_is_an_artifact_when_asked(fitted: Offline) -> None:
    models = [a for a in fitted.of_type("artifact") if a["type"] == "model"]
    (model,) = models
    assert model["name"].endswith("-block_repaired-down-seed0")
    assert "model.safetensors" in {entry["path"] for entry in model["manifest"]["contents"]}


def test_sending_a_model_that_is_not_exported_is_refused(
    tiny_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("fit", f"--model.source={tiny_dir}", f"--run_dir={tmp_path / 'run'}", *SMALL,
            "--export.enabled=false", "--export.wandb=true")  # fmt: skip
    assert "`export.wandb` needs `export.enabled`" in capsys.readouterr().err


def test_a_model_that_nothing_is_to_send_costs_a_warning(
    tiny_dir: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run("fit", f"--model.source={tiny_dir}", f"--run_dir={tmp_path / 'run'}", *SMALL,
        "--export.wandb=true", "--evaluate_after=false")  # fmt: skip
    assert "`export.wandb` is ignored" in caplog.text


def test_a_run_that_wandb_refuses_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    def refuse(**_: object) -> None:
        raise wandb.errors.UsageError("api_key not configured (no-tty)")

    monkeypatch.setattr(wandb, "init", refuse)
    with (
        pytest.raises(ValueError, match="api_key not configured"),
        wandb_run("online", tmp_path, "a", "b", "c"),
    ):
        pass


def test_a_sweep_is_one_run_with_its_trials_and_the_best(tmp_path: Path) -> None:
    pytest.importorskip("sweeps")
    config = {"method": "bayes", "metric": {"name": "loss"}, "parameters": {"x": {"values": [1]}}}
    trials = [
        Trial(index=i, params={"x": i}, folder="", state="finished", metric=value)
        for i, value in enumerate((3.0, 1.0, 2.0))
    ]
    with wandb_run("offline", tmp_path, "alphas", "sweep", "alphas") as started:
        log_trials(started, config, trials)
    found = Offline(tmp_path)
    assert [row[3] for row in found.table("sweep/trials")["data"]] == [3.0, 1.0, 2.0]
    assert found.summary["sweep/best"] == {"min": 1.0, "last": 1.0}
    assert found.summary["best/trial"] == 1
    assert found.summary["best/x"] == 1
    names = {path.name.partition("_")[0] for path in found.folder.rglob("*.png")}
    assert names >= {"best", "parallel", "importance"}


def test_a_comparison_is_one_run_with_its_cells_and_each_budgets_best(tmp_path: Path) -> None:
    cells = [cell("ours", 3, 0.2), cell("last", 3, 0.9), cell("last", 6, 1.9)]
    rows = [{"removed": c["num_removed"], "method": c["method"], "p": None} for c in cells]
    with wandb_run("offline", tmp_path, "compare", "compare", "tiny") as started:
        log_cells(started, rows, cells)
    found = Offline(tmp_path)
    assert [row[1] for row in found.table("compare/cells")["data"]] == ["ours", "last", "last"]
    assert found.summary["best/-3/method"] == "ours"
    assert found.summary["best/-6/loss_increase"] == pytest.approx(1.9)
    assert found.summary["compare/loss_table"]["nrows"] == 3


def test_a_study_of_similarity_is_one_run_with_its_table_and_heatmaps(
    tiny_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "similarity"
    run("similarity", f"--source={tiny_dir}", f"--out_dir={out}", "--domains=[medical,math]",
        "--num_prompts=6", "--num_bootstrap=20", "--wandb=offline")  # fmt: skip
    found = Offline(out)
    result = json.loads((out / "similarity.json").read_text())
    (row,) = result["correlations"]
    table = found.table("similarity/agreement")
    assert dict(zip(table["columns"], table["data"][0], strict=True)) == pytest.approx(row)
    assert found.summary["agreement/angular/mean"] == pytest.approx(row["pearson_upper"])
    assert found.summary["similarity/angular"]["_type"] == "image-file"
    assert found.data["name"] == f"{tiny_dir.name} similarity"
    assert "wandb" not in result["settings"]


def test_a_study_of_transfer_is_one_run_with_its_rows_and_each_rules_cost(
    tiny_dir: Path, tmp_path: Path
) -> None:
    out = tmp_path / "transfer"
    command = ("transfer", f"--source={tiny_dir}", f"--out_dir={out}", "--domains=[medical,math]",
               "--rules=[angular]", "--num_removed=[1]", "--refits=[mixed]", "--num_prompts=4",
               "--num_calibration_tokens=512", "--block_size=64",
               "--num_eval_questions=3")  # fmt: skip
    run(*command)
    run(*command, "--wandb=offline")  # not another study
    found = Offline(out)
    result = json.loads((out / "transfer.json").read_text())
    rows = found.table("transfer/rows")
    assert len(rows["data"]) == len(result["rows"])
    increases = [row[rows["columns"].index("increase")] for row in rows["data"]]
    assert increases == pytest.approx([row["increase"]["value"] for row in result["rows"]])
    (line,) = result["summary"]
    for key in ("home", "away", "regret", "num_plans"):
        assert found.summary[f"angular -1 mixed/{key}"] == pytest.approx(line[key])
    assert found.summary["transfer/costs_table"]["nrows"] == 1
    assert found.summary["transfer/losses"]["_type"] == "image-file"


def cell(method: str, num_removed: int, above: float) -> dict[str, Any]:
    return {
        "method": method,
        "num_removed": num_removed,
        "texts": {"en": {"loss": 3 + above, "source_loss": 3.0}},
        "cost": {"model": {"parameters": 1_000_000}},
        "config": {"baseline": None if method == "ours" else method},
    }


def test_nothing_is_written_where_wandb_is_disabled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with wandb_run("disabled", tmp_path, "a", "b", "c") as started:
        assert started is None
    monkeypatch.setenv("WANDB_MODE", "disabled")
    with wandb_run("online", tmp_path, "a", "b", "c") as started:
        assert started is None
    assert list(tmp_path.iterdir()) == []
