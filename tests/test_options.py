"""Every option of every command says what it is, in which unit, and what it is by default."""

import argparse
import re
from functools import cache
from typing import Any

import pytest

from lmerge.cli import main
from lmerge.commands import COMMANDS, EXIT_CODES
from lmerge.completion import command_parser, whole_parser
from lmerge.gate import EXIT_CODE
from lmerge.verbosity import take_flags, verbosity

FOREIGN = ("trainer.", "optimizer.", "lr_scheduler.")
"""Options whose texts are Lightning's and torch's."""

UNITS = re.compile(
    r"\b(tokens?|layers?|blocks?|questions?|prompts?|positions?|processes|steps?|epochs?|GiB|"
    r"seconds|minutes|share|seed|rate|neighbou?rs|factor|times|trials?|resamples|examples|pairs|jobs|"
    r"passes|bandwidth|width|weight|power|temperature|regulari[sz]ation|at least|at most|"
    r"above|below|between|number of|0 is|null)\b",
    flags=re.I,
)


@cache
def actions(name: str) -> list[argparse.Action]:
    parser: Any = command_parser(name)
    return [a for a in parser._actions if a.dest not in ("help", "config", "print_config")]


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_has_help(name: str) -> None:
    missing = [a.dest for a in actions(name) if not a.help]
    assert not missing


@pytest.mark.parametrize("name", COMMANDS)
def test_every_number_has_a_unit_or_a_range(name: str) -> None:
    bare = [
        a.dest
        for a in actions(name)
        if getattr(a, "_typehint", None) in (int, float, int | None, float | None)
        and not a.dest.startswith(FOREIGN)
        and not UNITS.search(str(a.help))
    ]
    assert not bare


@pytest.mark.parametrize("name", ["export", "fit"])
def test_help_shows_defaults_and_exit_codes(name: str) -> None:
    text = " ".join(command_parser(name).format_help().split())
    options = [a for a in actions(name) if a.option_strings and not a.dest.startswith(FOREIGN)]
    assert text.count("default: ") >= len(options) // 2
    assert all(f"{code} " in text for code in EXIT_CODES)
    assert "--quiet" in text


def test_the_gate_has_its_exit_code() -> None:
    assert "gate" in EXIT_CODES[EXIT_CODE]


@pytest.mark.parametrize("shell", ["bash", "zsh", "tcsh"])
def test_completion_knows_every_command(shell: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("shtab")
    # The parsers of Lightning's commands take seconds; the others show the same.
    few = {name: row for name, row in COMMANDS.items() if name in ("export", "diff", "report")}
    monkeypatch.setattr("lmerge.completion.COMMANDS", few)
    script = whole_parser().get_completion_script(f"shtab-{shell}")
    assert all(name in script for name in few)
    assert "max_shard_size" in script


def test_quiet_and_verbose_are_taken_from_anywhere() -> None:
    assert take_flags(["fit", "-q", "--x", "1"]) == (["fit", "--x", "1"], "quiet")
    assert take_flags(["-v", "fit"]) == (["fit"], "verbose")
    assert take_flags(["fit"]) == (["fit"], None)


def run(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, str]:
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    return int(stop.value.code or 0), capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (("fti",), "Did you mean `lmerge fit`?"),
        (("--config", "x"), "a command must come first"),
        (("diff", "a", "b", "--stage", "tset"), "Did you mean test?"),
        (("export", "a", "--max_shard_sze", "1GB"), "Did you mean `--max_shard_size`?"),
        (("export", "a", "--gguf_dtype", "F15"), "must be one of auto, F32, F16, BF16"),
        (("similarity", "--num_prompts", "many"), "must be a whole number"),
        (("similarity", "--config", "similrity.yaml"), "Did you mean configs/similarity.yaml?"),
    ],
)
def test_a_mistake_gets_a_hint(
    args: tuple[str, ...], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    code, text = run(capsys, *args)
    assert code == 2
    assert words in text
    assert text.count("\n") == 1


def test_verbose_shows_where_an_error_arose(capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "export", "nowhere", "-v")
    assert code == 2
    assert "Traceback" in text
    assert text.splitlines()[-1].startswith("lmerge: error: run folder nowhere")
    assert verbosity() == "normal"


def test_an_interrupt_ends_with_its_code(monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(args: list[str]) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lmerge.cli.run", stop)
    with pytest.raises(SystemExit) as ended:
        main(["diff", "a", "b"])
    assert ended.value.code == 130
