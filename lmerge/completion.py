"""`lmerge completion`: a script that completes commands and options in a shell."""

from __future__ import annotations

import sys
from importlib import import_module
from importlib.util import find_spec
from typing import Literal

from jsonargparse import ArgumentParser

from lmerge.commands import COMMANDS, LIGHTNING
from lmerge.lightning_cli import lightning_parser
from lmerge.parser import Hints, function_parser

Shell = Literal["bash", "zsh", "tcsh"]


def completion(shell: Shell) -> None:
    """Print a script that lets a shell complete commands, options and their choices.

    Args:
        shell: The shell that is to read it, such as by `eval "$(lmerge completion bash)"`.
    """
    if find_spec("shtab") is None:
        raise ValueError("completion needs the package shtab, got none. Run `pip install shtab`.")
    sys.stdout.write(whole_parser().get_completion_script(f"shtab-{shell}"))


def whole_parser() -> ArgumentParser:
    """Return one parser of all commands."""
    root = Hints(prog="lmerge")
    commands = root.add_subcommands()
    for name, (summary, _) in COMMANDS.items():
        commands.add_subcommand(name, command_parser(name), help=summary)
    return root


def command_parser(name: str) -> ArgumentParser:
    """Return the parser of a command."""
    target = COMMANDS[name].target
    if target == LIGHTNING:
        return lightning_parser(name)
    module, _, function = target.partition(":")
    return function_parser(name, getattr(import_module(module), function))
