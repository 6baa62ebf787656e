"""Commands of the documentation parse, its examples run, its functions and links exist."""

import doctest
import re
import shlex
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml

from lmerge.commands import COMMANDS, EXIT_CODES, as_switches, help_text
from lmerge.completion import command_parser
from lmerge.verbosity import take_flags
from lmerge.yaml_files import with_shipped_configs

ROOT = Path(__file__).parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").glob("*.md")])
SHELL = re.compile(r"^ *```(?:sh|bash)\n(.*?)^ *```", flags=re.S | re.M)


def commands_of(page: Path) -> list[str]:
    """The lines of a page's shell blocks that start lmerge, without their comments."""
    text = "\n".join(SHELL.findall(page.read_text())).replace("\\\n", " ")
    return [line.strip() for line in text.splitlines() if line.strip().startswith("lmerge ")]


SHOWN = sorted({(page.name, line) for page in PAGES for line in commands_of(page)})


@cache
def parser_of(name: str) -> Any:
    return command_parser(name)


def test_there_are_commands_to_look_at() -> None:
    assert len(SHOWN) > 40


@pytest.mark.parametrize(("page", "line"), SHOWN)
def test_a_command_of_the_documentation_parses(
    page: str, line: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    name, *args = shlex.split(line, comments=True)[1:]
    if name.startswith("-"):
        return
    assert name in COMMANDS
    if "--help" in args or "--print_config" in args:
        return
    args, _ = take_flags(args)
    if ">" in args:
        args = args[: args.index(">")]
    args = ["--config=demo" if a.startswith("--config=runs/") else a for a in joined(args)]
    args, _ = with_shipped_configs([name, *as_switches(args)])
    parser_of(name).parse_args(args[1:])


def joined(args: list[str]) -> list[str]:
    """Arguments with `--config FILE` as one."""
    found: list[str] = []
    for arg in args:
        if found[-1:] == ["--config"]:
            found[-1] = f"--config={arg}"
        else:
            found.append(arg)
    return found


def test_python_examples_do_what_they_show(tiny_dir: Path, tmp_path: Path) -> None:
    done = doctest.testfile(
        str(ROOT / "docs" / "api.md"),
        module_relative=False,
        globs={"tiny_dir": tiny_dir, "run_dir": tmp_path / "run"},
        optionflags=doctest.NORMALIZE_WHITESPACE,
    )
    assert done.attempted > 8
    assert not done.failed


METHODS = [ROOT / "docs" / f"{n}.md" for n in ("method", "alignment", "similarity", "baselines")]
FILES = re.compile(r"\.(py|json|html|md|yaml|safetensors|csv|png)$")

NAMED = sorted(
    {
        (page.name, name)
        for page in METHODS
        for name in re.findall(r"`((?:\w+\.)+[A-Za-z]\w*)`", page.read_text())
        if not FILES.search(name)
        and (
            (ROOT / "lmerge" / f"{name.split('.')[0]}.py").is_file()
            or name.startswith(("baselines.", "lmerge."))
        )
    }
)


@pytest.mark.parametrize(("page", "name"), NAMED)
def test_a_function_that_a_page_names_exists(page: str, name: str) -> None:
    parts = name.removeprefix("lmerge.").split(".")
    if parts[0] in OPTIONS:
        pytest.skip("the name of an option")
    depth = 2 if parts[0] in ("baselines", "data") else 1
    found: Any = import_module(".".join(["lmerge", *parts[:depth]]))
    for part in parts[depth:]:
        assert hasattr(found, part) or part in getattr(found, "__annotations__", {})
        found = getattr(found, part, None)


OPTIONS = ("repair", "alignment", "export", "gate", "plan")
"""Groups of options that are called like a file."""


def test_the_table_of_methods_names_functions() -> None:
    assert len([name for page, name in NAMED if page == "method.md"]) > 15


def nav(entry: Any) -> list[str]:
    """All files below an entry of the navigation."""
    if isinstance(entry, str):
        return [entry]
    below = entry.values() if isinstance(entry, dict) else entry
    return [name for part in below for name in nav(part)]


def test_every_page_is_in_the_navigation() -> None:
    settings = yaml.safe_load((ROOT / "mkdocs.yml").read_text())
    assert sorted(nav(settings["nav"])) == sorted(
        ["index.md", *(path.name for path in (ROOT / "docs").glob("*.md"))]
    )


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:|#)([^)#\s]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_exit_codes_are_documented() -> None:
    text = (ROOT / "docs" / "command_line.md").read_text()
    documented = [int(code) for code in re.findall(r"^\| (\d+) \|", text, flags=re.M)]
    assert documented == list(EXIT_CODES)


def test_help_fits_a_small_terminal_and_keeps_the_order_of_use() -> None:
    lines = help_text().splitlines()
    assert len(lines) < 24
    assert max(map(len, lines)) <= 80
    shown = [
        line.split()[0] for line in lines if line.startswith("  ") and line.split()[0] in COMMANDS
    ]
    assert shown == list(COMMANDS)
