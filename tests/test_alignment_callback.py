from pathlib import Path

import pytest
import torch
from cli_run import fit, run

from lmerge import alignment
from lmerge.runs import read_orders
from lmerge.symmetry import Transform

METHOD = "--alignment.method"


def test_a_second_run_with_the_same_key_does_not_solve_again(
    tiny_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit(tiny_dir, tmp_path / "run")
    wanted = read_orders(tmp_path / "run" / "orders.safetensors")
    assert all(isinstance(motion, Transform) for motion in wanted.values())
    assert len(list((tmp_path / "run" / "alignment_cache").iterdir())) == 1

    def refuse(*_args: object, **_options: object) -> None:
        raise AssertionError("solved again")

    monkeypatch.setattr(alignment, "align_tasks", refuse)
    fit(tiny_dir, tmp_path / "run", "--overwrite=true")
    found = read_orders(tmp_path / "run" / "orders.safetensors")
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[i].neuron_F, wanted[i].neuron_F) for i in wanted)  # type: ignore[union-attr]


@pytest.mark.parametrize("method", ["both", "full", "soft", "rowwise"])
def test_every_aligner_runs_from_fit_to_validate(
    tiny_dir: Path, tmp_path: Path, method: str
) -> None:
    folder = tmp_path / "run"
    fit(tiny_dir, folder, f"{METHOD}={method}")
    assert (folder / "alignment" / "matrices.png").is_file()
    run("validate", "--config", folder / "config.yaml")
