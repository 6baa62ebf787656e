"""Killed, starved of disk and locked out, an export leaves the old folder or the new one."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lmerge.big_files import check_room

NUM_KILLS = 50


@pytest.fixture(scope="module")
def report() -> dict[str, Any]:
    script = Path(__file__).with_name("killed_exports.py")
    done = subprocess.run(
        [sys.executable, script, str(NUM_KILLS)],
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def test_a_kill_at_any_moment_leaves_the_old_folder_or_the_new_one(report: dict[str, Any]) -> None:
    assert sum(report["found"].values()) == NUM_KILLS
    assert not any(key.startswith("half") for key in report["found"])
    # The moments were spread: some kills came before the swap, some after it.
    assert {key.split()[-1] for key in report["found"]} == {"kept", "replaced"}


def test_what_a_kill_leaves_is_removed_by_the_next_export(report: dict[str, Any]) -> None:
    assert report["left"] > 0
    assert report["left_after_the_next_export"] == 0


def test_a_full_disk_is_one_line_and_nothing_changes(report: dict[str, Any]) -> None:
    full = report["full"]
    assert (full["code"], full["unchanged"], len(full["lines"])) == (2, True, 1)
    assert "must be writable, got: File too large" in full["lines"][0]


def test_a_read_only_folder_is_one_line_and_nothing_changes(report: dict[str, Any]) -> None:
    locked = report["read_only"]
    assert (locked["code"], locked["unchanged"], len(locked["lines"])) == (2, True, 1)
    assert "must be writable, got: Permission denied" in locked["lines"][0]


def test_too_little_room_is_said_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"needs 931322574\.62 GiB, but its disk has"):
        check_room(tmp_path / "out", 10**18)
