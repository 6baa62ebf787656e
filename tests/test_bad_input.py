"""Every bad input ends in one clear line and exit code 2, and nothing is written."""

import shutil
from pathlib import Path

import pytest
from bad_inputs import CASES, Place
from cli_run import run
from made_runs import made_run, source


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny checkpoint in shards and a finished run on it."""
    folder = tmp_path_factory.mktemp("whole")
    made_run(folder / "run", source(folder / "source", max_shard_size="20kB"))
    return folder


def tree(folder: Path) -> dict[str, int]:
    """What is below a folder, with the times of the last change."""
    return {str(path): path.lstat().st_mtime_ns for path in sorted(folder.rglob("*"))}


@pytest.mark.parametrize("name", CASES)
def test_bad_input_is_one_line_and_nothing_is_written(
    name: str,
    whole: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shutil.copytree(whole, tmp_path, dirs_exist_ok=True)
    text = (tmp_path / "run" / "config.yaml").read_text().replace(str(whole), str(tmp_path))
    (tmp_path / "run" / "config.yaml").write_text(text)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LMERGE_CACHE", str(tmp_path / "run"))  # nothing is made there either
    bad = CASES[name](Place(tmp_path, tmp_path / "source", tmp_path / "run"))
    before = tree(tmp_path)
    with pytest.raises(SystemExit) as stop:
        run(*bad.args)
    assert stop.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "error:" in line]
    assert len(lines) == 1
    for word in bad.words:
        assert word in lines[0]
    assert tree(tmp_path) == before


def test_there_are_at_least_sixty_cases() -> None:
    assert len(CASES) >= 60
