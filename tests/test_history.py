"""What a fit logged, read back from Lightning's metrics.csv."""

from pathlib import Path

from lmerge.history import read_series


def write(run_dir: Path, name: str, *lines: str) -> None:
    (run_dir / name).mkdir(parents=True)
    (run_dir / name / "metrics.csv").write_text("\n".join(lines) + "\n")


def test_each_metric_has_its_steps_without_the_empty_cells(tmp_path: Path) -> None:
    write(tmp_path, "logs", "step,epoch,a,b", "0,0,1.5,", "1,0,,2.5", "2,0,0.5,")
    assert read_series(tmp_path) == {"a": [(0, 1.5), (2, 0.5)], "b": [(1, 2.5)]}


def test_a_resumed_fit_goes_on_in_the_order_of_its_parts(tmp_path: Path) -> None:
    for i, name in enumerate(["logs-10", "logs", "logs-2"]):
        write(tmp_path, name, "step,a", f"{i},{i}")
    assert [value for _, value in read_series(tmp_path)["a"]] == [1.0, 2.0, 0.0]


def test_numbers_that_are_not_finite_are_left_out(tmp_path: Path) -> None:
    write(tmp_path, "logs", "step,a", "0,nan", "1,inf", "2,1")
    assert read_series(tmp_path) == {"a": [(2, 1.0)]}


def test_a_run_without_logs_has_no_series(tmp_path: Path) -> None:
    assert read_series(tmp_path) == {}
