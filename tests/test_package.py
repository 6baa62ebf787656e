"""What a package of lmerge holds, and the versions that it asks for."""

import re
from pathlib import Path

import pytest

import lmerge
from lmerge.yaml_files import shipped_config, with_shipped_configs

ROOT = Path(__file__).parents[1]
PROJECT = (ROOT / "pyproject.toml").read_text()


def test_lowest_versions_are_those_of_the_project() -> None:
    (block,) = re.findall(r"^dependencies = \[(.*?)^\]", PROJECT, flags=re.S | re.M)
    lowest = re.findall(r'"([\w-]+)(?:\[\w+\])?>=([\d.]+)', block)
    kept = re.findall(r"^([\w-]+)==([\d.]+)$", (ROOT / "constraints-lowest.txt").read_text(), re.M)
    assert dict(kept) == dict(lowest)


def test_every_subpackage_is_packaged() -> None:
    (block,) = re.findall(r"^packages = \[(.*?)\]", PROJECT, flags=re.M)
    inside = {path.parent for path in (ROOT / "lmerge").rglob("__init__.py")}
    names = {".".join(path.relative_to(ROOT).parts) for path in inside}
    assert set(re.findall(r'"([\w.]+)"', block)) == names | {"lmerge.configs"}


def test_the_citation_has_the_version_of_the_package() -> None:
    assert f"\nversion: {lmerge.__version__}\n" in (ROOT / "CITATION.cff").read_text()


@pytest.mark.parametrize("name", ["best", "best.yaml", "configs/best.yaml"])
def test_a_config_is_found_by_its_name(name: str) -> None:
    path = shipped_config(name)
    assert path is not None
    assert path.samefile(ROOT / "configs" / "best.yaml")


def test_no_name_leads_out_of_the_configs() -> None:
    assert shipped_config("../pyproject") is None
    assert shipped_config("no_such") is None


def test_a_file_in_the_working_folder_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "best").write_text("seed_everything: 1\n")
    args, paths = with_shipped_configs(["fit", "--config", "best"])
    assert args == ["fit", "--config", "best"]
    assert paths == [Path("best")]
    args, (path,) = with_shipped_configs(["fit", "--config=demo"])
    assert args == ["fit", f"--config={path}"]
