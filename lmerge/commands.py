"""The commands in the order of use, what `lmerge --help` says of them, and the exit codes."""

from __future__ import annotations

import difflib
from typing import NamedTuple

LIGHTNING = "lmerge.lightning_cli:run"
"""Runs the commands that are stages of Lightning's Trainer."""


class UsageError(SystemExit):
    """A mistake on the command line; `message` is the line to be printed."""

    def __init__(self, message: str) -> None:
        super().__init__(2)
        self.message = message


class Command(NamedTuple):
    """A command of the command line."""

    summary: str
    """One line for `lmerge --help`, at most 64 characters."""
    target: str = LIGHTNING
    """`module:function`, imported when called; the signature gives the options, the docstring
    their help."""


COMMANDS: dict[str, Command] = {
    "plan": Command("choose the layers to merge; --memory: what a fit would take"),
    "fit": Command("merge, learn the alphas, repair, evaluate and export"),
    "validate": Command("measure source and merged model side by side again"),
    "test": Command("the same on test questions, once you are done choosing"),
    "export": Command("write a run's model as safetensors or GGUF", "lmerge.export_run:export"),
    "report": Command("one HTML page of a run, or of several", "lmerge.report:report"),
    "diff": Command("paired tests of two runs on the same data", "lmerge.diff:diff"),
    "compare": Command("methods x budgets, published ones too", "lmerge.compare:compare"),
    "similarity": Command(
        "which layers are alike, by domain and language", "lmerge.similarity_study:run_similarity"
    ),
    "transfer": Command(
        "what a plan of one domain costs on another", "lmerge.transfer_study:run_transfer"
    ),
    "sweep": Command("a W&B sweep file without a server", "lmerge.sweep:sweep"),
    "completion": Command(
        "print a completion script for bash, zsh or tcsh", "lmerge.completion:completion"
    ),
}

SWITCHES = ("--memory", "--overwrite", "--check", "--streamed")
"""Options that may stand alone, for true."""

EXIT_CODES: dict[int, str] = {
    0: "done",
    1: "a fault of lmerge",
    2: "your mistake",
    3: "the merged model failed its gate",
    130: "stopped by Ctrl-C",
}

EPILOG = (
    "-q, --quiet: results, warnings and errors alone. -v, --verbose: also what the libraries say, "
    "and where an error arose. Exit codes: "
    + ", ".join(f"{code} {meaning}" for code, meaning in EXIT_CODES.items())
    + "."
)
"""Stands below the options of every command."""


def help_text() -> str:
    """Return what `lmerge --help` prints; it fits a terminal of 24 lines and 80 columns."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items()]
    codes = [f"{code} {meaning}" for code, meaning in EXIT_CODES.items()]
    return "\n".join(
        [
            "Usage: lmerge COMMAND [OPTIONS]",
            "Make a Llama smaller by merging its redundant layers, and see what it cost.",
            "",
            *lines,
            "",
            "lmerge COMMAND --help          its options, with units and defaults",
            "lmerge COMMAND --print_config  its options as YAML, to be given as --config FILE",
            "-q, --quiet    results, warnings and errors alone",
            "-v, --verbose  also what the libraries say, and where an error arose",
            f"Exit codes: {', '.join(codes[:3])},",
            f"  {', '.join(codes[3:])}",
        ]
    )


def closest_command(name: str) -> str:
    """Return a hint at the command that `name` may stand for; empty if none is close."""
    close = difflib.get_close_matches(name, COMMANDS, n=1)
    return f" Did you mean `lmerge {close[0]}`?" if close else ""


def as_switches(args: list[str]) -> list[str]:
    """Return the arguments with `=true` after switches that stand alone."""
    pairs = zip(args, [*args[1:], ""], strict=True)
    alone = ("true", "false")
    return [f"{a}=true" if a in SWITCHES and b.lower() not in alone else a for a, b in pairs]
