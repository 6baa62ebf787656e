"""The command line: what `lmerge` answers at once, and which file does the rest."""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any, NoReturn

from lmerge import __version__
from lmerge.commands import (
    COMMANDS,
    LIGHTNING,
    UsageError,
    as_switches,
    closest_command,
    help_text,
)
from lmerge.verbosity import quiet_lightning, set_up_logging, speaking, take_flags, verbosity

INTERRUPTED = 130


def main(args: list[str] | None = None) -> None:
    """Run the command line; a user's mistake ends in one line and exit code 2."""
    args, level = take_flags(list(sys.argv[1:] if args is None else args))
    with speaking(level), _ending():
        if args[:1] == ["help"]:
            args = [*args[1:2], "--help"]
        if not args or args[0] in ("-h", "--help"):
            sys.stdout.write(help_text() + "\n")
        elif args[0] in ("-V", "--version"):
            sys.stdout.write(f"lmerge {__version__}\n")
        else:
            _check_command(args[0])
            set_up_logging()
            run(args)


def run(args: list[str]) -> object:
    """Run a command and return what its function returns; nothing is caught here.

    Args:
        args: Name and options of the command, without `-q` and `-v`.
    """
    # What a command needs is imported when it is called, so that help comes at once.
    from lmerge.yaml_files import check_yaml, with_shipped_configs

    args, paths = with_shipped_configs(as_switches(args))
    for path in paths:
        check_yaml(path)
    target = COMMANDS[args[0]].target
    function = _function(target)
    quiet_lightning()
    if target == LIGHTNING:
        return function(args)
    from lmerge.parser import run_function

    return run_function(args[0], function, args[1:])


def _function(target: str) -> Any:
    module, _, name = target.partition(":")
    return getattr(import_module(module), name)


def _check_command(name: str) -> None:
    if name in COMMANDS:
        return
    if name.startswith("-"):
        raise UsageError(f"a command must come first, got {name}; its options follow it.")
    known = ", ".join(COMMANDS)
    raise UsageError(f"the command must be one of {known}, got {name!r}.{closest_command(name)}")


@contextmanager
def _ending() -> Iterator[None]:
    """Turn errors into one line and the exit code that `commands.EXIT_CODES` documents."""
    try:
        yield
    except UsageError as error:
        _explain(error, error.message)
    except ValueError as error:
        _explain(error, " ".join(str(error).split()))
    except KeyboardInterrupt:
        sys.stderr.write("lmerge: stopped.\n")
        sys.exit(INTERRUPTED)
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # Lightning's own way to end
            sys.exit(INTERRUPTED)
        raise


def _explain(error: BaseException, line: str) -> NoReturn:
    if os.environ.get("LMERGE_TRACEBACK") or verbosity() == "verbose":
        traceback.print_exception(error)
    sys.stderr.write(f"lmerge: error: {line}\n")
    sys.exit(2)
