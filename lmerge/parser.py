"""The parser of the command line: options without abbreviations, errors in one line with a hint."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NoReturn

from jsonargparse import (  # type: ignore[attr-defined]
    ActionConfigFile,
    ArgumentParser,
    set_parsing_settings,
)

from lmerge.commands import EPILOG, UsageError
from lmerge.hints import explained
from lmerge.positional import add_options


class Hints(ArgumentParser):
    """A parser that takes no abbreviations and reports an error in one line with a hint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        kwargs.setdefault("epilog", EPILOG)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        raise UsageError(explained(" ".join(message.split()), sorted(_option_names(parser))))


def function_parser(name: str, function: Callable[..., object]) -> Hints:
    """Return the parser of a command whose options are a function's parameters."""
    docstring_options()
    assert function.__doc__ is not None
    parser = Hints(prog=f"lmerge {name}", description=function.__doc__.partition("\n")[0])
    parser.add_argument("--config", action=ActionConfigFile, help="YAML file of options.")
    add_options(parser, function)
    return parser


def run_function(name: str, function: Callable[..., object], args: list[str]) -> object:
    """Call a function with the options of a command line."""
    parser = function_parser(name, function)
    options = parser.instantiate_classes(parser.parse_args(args))
    return function(**{key: value for key, value in options.items() if key != "config"})


def docstring_options() -> None:
    """Let the strings below the fields of dataclasses be the help of their options."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)


def _option_names(parser: Any) -> set[str]:
    names = {s[2:] for a in parser._actions for s in a.option_strings if s.startswith("--")}
    subcommands = getattr(parser, "_subcommands_action", None)
    for subparser in subcommands._name_parser_map.values() if subcommands else ():
        names |= _option_names(subparser)
    return names
