import json
import math
import os
import re
import stat
import struct
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from lmerge.files import (
    provenance,
    read_json,
    read_tensors,
    write_json,
    write_tensors,
    write_text,
)

PLAN = {
    "method": "pairs",
    "groups": [{"members": [1, 2], "anchor": 1}, {"members": [5, 6, 7], "anchor": 5}],
    "similarity": [[0.1 + 0.2, 1 / 3], [1e-300, -0.0]],
    "note": "Übung",
    "empty": {},
    "commit": None,
}


def refusal(call: Callable[..., object], *arguments: object, **options: object) -> str:
    with pytest.raises(ValueError) as caught:  # noqa: PT011 - the callers check the text
        call(*arguments, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def refuse_to_rename(*_paths: object) -> None:
    raise OSError(30, "Read-only file system")


def test_json_reads_back(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", PLAN, schema=1)
    assert read_json(tmp_path / "x.json", schema=1) == PLAN


def test_json_holds_the_schema_number_first(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", PLAN, schema=7)
    assert next(iter(json.loads((tmp_path / "x.json").read_text()).items())) == ("schema", 7)


def test_json_keeps_the_order_of_keys(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"b": 1, "a": 2}, schema=1)
    assert list(read_json(tmp_path / "x.json", schema=1)) == ["b", "a"]


def test_floats_read_back_bit_for_bit(tmp_path: Path) -> None:
    bits = torch.randint(-(2**62), 2**62, (2000,), generator=torch.Generator().manual_seed(0))
    floats = [struct.unpack("<d", struct.pack("<q", value))[0] for value in bits.tolist()]
    values = [value for value in [*floats, 5e-324, 1.7e308, -0.0, 0.1] if math.isfinite(value)]
    write_json(tmp_path / "x.json", {"values": values}, schema=1)
    read = read_json(tmp_path / "x.json", schema=1)["values"]
    assert [value.hex() for value in read] == [value.hex() for value in values]


def test_long_list_of_numbers_stays_on_one_line(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", {"alphas": [[0.123456789] * 50] * 3}, schema=1)
    assert (tmp_path / "x.json").read_text().count("\n") == 8


def test_words_in_json_stay_readable(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", PLAN, schema=1)
    assert "Übung" in (tmp_path / "x.json").read_text(encoding="utf-8")


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_number_that_is_not_finite_is_refused_by_name(tmp_path: Path, value: float) -> None:
    data = {"val": {"ppl": [1.0, value]}}
    assert "val.ppl[1]" in refusal(write_json, tmp_path / "x.json", data, schema=1)


def test_refused_number_leaves_the_old_file(tmp_path: Path) -> None:
    write_json(tmp_path / "x.json", PLAN, schema=1)
    refusal(write_json, tmp_path / "x.json", {"ppl": math.nan}, schema=1)
    assert read_json(tmp_path / "x.json", schema=1) == PLAN


def test_byte_order_mark_of_an_editor_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_bytes(b'\xef\xbb\xbf{"schema": 1, "a": 2}')
    assert read_json(tmp_path / "x.json", schema=1) == {"a": 2}


def test_missing_json_is_refused(tmp_path: Path) -> None:
    message = refusal(read_json, tmp_path / "x.json", schema=1)
    assert message.startswith(f"{tmp_path}/x.json must be a readable file, got: No such file")


def test_json_path_that_is_a_folder_is_refused(tmp_path: Path) -> None:
    assert "Is a directory" in refusal(read_json, tmp_path, schema=1)


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "line 1 column 1"),
        (b'{"schema": 1,\n "a": }', "line 2 column 7"),
        (b'{"schema": 1, "a": 1, "a": 2}', "'a' appears twice"),
        (b'{"schema": 1, "a": NaN}', "finite, got NaN"),
        (b"\xff\xfe", "can't decode"),
        (b"[1]", "got list"),
        (b'{"schema": 2}', "`schema` 1, got 2"),
        (b'{"a": 2}', "`schema` 1, got None"),
        (b'{"schema": "\\r"}', r"`schema` 1, got '\r'"),
    ],
)
def test_malformed_json_is_refused_with_its_reason(
    tmp_path: Path, content: bytes, reason: str
) -> None:
    (tmp_path / "x.json").write_bytes(content)
    assert reason in refusal(read_json, tmp_path / "x.json", schema=1)


def test_missing_parents_are_made(tmp_path: Path) -> None:
    write_json(tmp_path / "a" / "b" / "x.json", {}, schema=1)
    assert read_json(tmp_path / "a" / "b" / "x.json", schema=1) == {}


def test_unwritable_path_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "must be writable" in refusal(write_json, tmp_path / "file" / "x", {}, schema=1)


def test_failed_write_leaves_the_old_file_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_text(tmp_path / "x.md", "old")
    monkeypatch.setattr(os, "replace", refuse_to_rename)
    assert "Read-only file system" in refusal(write_text, tmp_path / "x.md", "new")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_files_have_the_usual_permissions(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_text(tmp_path / "x.md", "text")
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {})
    modes = {stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert len(modes) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.int64])
def test_tensors_read_back(tmp_path: Path, dtype: torch.dtype) -> None:
    tensor = (100 * torch.randn(3, 4)).to(dtype)
    write_tensors(tmp_path / "x.safetensors", {"a": tensor}, {})
    assert torch.equal(read_tensors(tmp_path / "x.safetensors")[0]["a"], tensor)


def test_metadata_reads_back(tmp_path: Path) -> None:
    write_tensors(tmp_path / "x.safetensors", {"a": torch.ones(1)}, {"source": "org/name"})
    assert read_tensors(tmp_path / "x.safetensors")[1] == {"source": "org/name"}


def test_views_of_one_tensor_are_stored_apart(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4).requires_grad_()
    views = {"all": base, "same": base, "row": base[1], "turned": base.T}
    write_tensors(tmp_path / "x.safetensors", views, {})
    read, _ = read_tensors(tmp_path / "x.safetensors")
    assert all(torch.equal(read[name], view) for name, view in views.items())


@pytest.mark.parametrize("keep", [0, 4, -1])
def test_truncated_tensors_are_refused(tmp_path: Path, keep: int) -> None:
    path = tmp_path / "x.safetensors"
    write_tensors(path, {"a": torch.ones(9)}, {})
    path.write_bytes(path.read_bytes()[:keep])
    assert "must be a whole safetensors file" in refusal(read_tensors, path)


def test_missing_tensors_are_refused(tmp_path: Path) -> None:
    assert "No such file" in refusal(read_tensors, tmp_path / "x.safetensors")


def test_tensors_on_an_unwritable_path_are_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert "must be writable" in refusal(write_tensors, tmp_path / "file" / "x", {}, {})


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A git repository with one commit, as the working folder."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("old")
    name = ["-c", "user.name=n", "-c", "user.email=e"]
    for arguments in (["init", "-q"], ["add", "."], [*name, "commit", "-q", "-m", "one"]):
        subprocess.run(["git", *arguments], check=True)
    return tmp_path


def test_provenance_holds_the_commit(repository: Path) -> None:
    assert re.fullmatch("[0-9a-f]{40}", provenance()["git_commit"])


def test_provenance_tells_changed_files(repository: Path) -> None:
    clean = provenance()["git_changed"]
    (repository / "file.txt").write_text("new")
    assert (clean, provenance()["git_changed"]) == (False, True)


def test_provenance_without_a_repository_has_no_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert provenance()["git_commit"] is None


def test_provenance_names_no_path(repository: Path) -> None:
    assert "/" not in json.dumps(provenance())


def test_provenance_can_be_written_as_json(tmp_path: Path) -> None:
    made = provenance()
    write_json(tmp_path / "x.json", made, schema=1)
    assert read_json(tmp_path / "x.json", schema=1) == made
