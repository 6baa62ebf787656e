import os
import time
from pathlib import Path

import pytest
from checkpoints import refusal

from lmerge import folders
from lmerge.folders import MIN_AGE, atomic_folder, exchange


def make_folder(path: Path, text: str, *, overwrite: bool = False) -> None:
    with atomic_folder(path, overwrite=overwrite) as temporary:
        (temporary / "file.txt").write_text(text)


def refuse_to_rename(*_paths: object) -> None:
    raise OSError(30, "Read-only file system")


def test_folder_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_folder(tmp_path / "out") as temporary:
        (temporary / "file.txt").touch()
        assert not (tmp_path / "out").exists()
    assert (tmp_path / "out" / "file.txt").exists()


def test_folder_leaves_nothing_else_behind(tmp_path: Path) -> None:
    make_folder(tmp_path / "out", "old")
    make_folder(tmp_path / "out", "new", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_existing_folder_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "out", "old")
    assert "already exists" in refusal(make_folder, tmp_path / "out", "new")


def test_existing_folder_is_replaced_where_allowed(tmp_path: Path) -> None:
    make_folder(tmp_path / "out", "old")
    make_folder(tmp_path / "out", "new", overwrite=True)
    assert (tmp_path / "out" / "file.txt").read_text() == "new"


def test_existing_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "out").touch()
    assert "got a file" in refusal(make_folder, tmp_path / "out", "new", overwrite=True)


@pytest.mark.parametrize("path", [".", "..", "~"])
def test_folder_that_people_work_in_is_never_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, path: str
) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "never replaced" in refusal(make_folder, Path(path), "new", overwrite=True)


def test_error_in_the_block_leaves_the_old_folder(tmp_path: Path) -> None:
    def stop_half_way() -> None:
        with atomic_folder(tmp_path / "out", overwrite=True) as temporary:
            (temporary / "file.txt").write_text("half")
            raise KeyboardInterrupt

    make_folder(tmp_path / "out", "old")
    with pytest.raises(KeyboardInterrupt):
        stop_half_way()
    assert [path.read_text() for path in tmp_path.rglob("*.txt")] == ["old"]


@pytest.mark.parametrize("failing_call", [1, 2])
def test_failed_move_leaves_the_old_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, failing_call: int
) -> None:
    make_folder(tmp_path / "out", "old")
    rename, calls = os.rename, []

    def fail_once(old: Path, new: Path) -> None:
        calls.append(new)
        (refuse_to_rename if len(calls) == failing_call else rename)(old, new)

    monkeypatch.setattr(os, "rename", fail_once)
    monkeypatch.setattr(folders, "exchange", lambda *_: False)
    assert "must be writable" in refusal(make_folder, tmp_path / "out", "new", overwrite=True)
    assert [path.read_text() for path in tmp_path.rglob("*.txt")] == ["old"]


def test_folder_on_an_unwritable_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "must be writable" in refusal(make_folder, tmp_path / "file" / "out", "new")


def test_link_to_a_folder_stays_a_link(tmp_path: Path) -> None:
    make_folder(tmp_path / "real", "old")
    (tmp_path / "link").symlink_to(tmp_path / "real")
    make_folder(tmp_path / "link", "new", overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "file.txt").read_text() == "new"


def test_folders_are_swapped_in_one_step(tmp_path: Path) -> None:
    make_folder(tmp_path / "one", "1")
    make_folder(tmp_path / "two", "2")
    assert exchange(tmp_path / "one", tmp_path / "two")
    assert [(tmp_path / name / "file.txt").read_text() for name in ("one", "two")] == ["2", "1"]


def test_what_a_killed_process_left_is_removed(tmp_path: Path) -> None:
    left = tmp_path / ".out.0123abcd.tmp"
    left.mkdir()
    (left / "half").touch()
    make_folder(tmp_path / "out", "new")
    assert left.exists()  # perhaps another process makes it just now
    old = time.time() - 2 * MIN_AGE
    os.utime(left, (old, old))
    make_folder(tmp_path / "out", "new", overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_another_process_is_writing_is_left_alone(tmp_path: Path) -> None:
    def write_slowly() -> None:
        with atomic_folder(tmp_path / "out") as slow:
            old = time.time() - 2 * MIN_AGE
            os.utime(slow, (old, old))
            make_folder(tmp_path / "out", "faster")
            assert slow.exists()

    assert "already exists" in refusal(write_slowly)
    assert (tmp_path / "out" / "file.txt").read_text() == "faster"
