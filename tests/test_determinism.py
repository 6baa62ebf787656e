"""The same seed, config and machine give the same plan, alphas and metrics, bit for bit."""

import json
from pathlib import Path
from typing import Any

import pytest
from cli_run import fit

from lmerge.files import read_tensors


@pytest.fixture(scope="module")
def twins(tiny_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two runs of one config."""
    folder = tmp_path_factory.mktemp("twins")
    for name in ("one", "two"):
        fit(tiny_dir, folder / name, "--model.optimizer=torch.optim.Adam", "--seed_everything=7")
    return [folder / "one", folder / "two"]


def without(data: Any, *names: str) -> Any:
    """JSON data without the keys that hold times."""
    if isinstance(data, dict):
        return {key: without(value, *names) for key, value in data.items() if key not in names}
    return [without(item, *names) for item in data] if isinstance(data, list) else data


@pytest.mark.parametrize("name", ["plan.json", "alphas.json", "metrics.json"])
def test_twins_write_the_same_numbers(twins: list[Path], name: str) -> None:
    # What differs: when it was made, how fast the machine was just then.
    one, two = (json.loads((run_dir / name).read_text()) for run_dir in twins)
    assert without(one, "time_utc", "cost") == without(two, "time_utc", "cost")


@pytest.mark.parametrize(
    "name", ["orders.safetensors", "repair.safetensors", "model/model.safetensors"]
)
def test_twins_write_the_same_tensors(twins: list[Path], name: str) -> None:
    one, two = (read_tensors(run_dir / name) for run_dir in twins)
    assert one[1] == two[1]
    assert one[0].keys() == two[0].keys()
    assert all(one[0][key].equal(two[0][key]) for key in one[0])


def test_provenance_lists_versions_seed_and_fingerprints(twins: list[Path]) -> None:
    metrics = json.loads((twins[0] / "metrics.json").read_text())["validate"]
    plan = json.loads((twins[0] / "plan.json").read_text())
    assert {"lmerge", "torch", "transformers", "git_commit"} <= metrics["provenance"].keys()
    assert {"dev", "val"} <= metrics["fingerprints"].keys()
    assert metrics["source_fingerprint"] == plan["source"]
    assert metrics["seeds"] == {"alphas": 0, "data": 0}
    assert len(plan["source"]) == len(plan["calibration"]) == 16
    assert "seed_everything: 7" in (twins[0] / "config.yaml").read_text()
