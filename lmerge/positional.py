"""Options of a command from a function's signature, with several paths in a row where it asks."""

from __future__ import annotations

from collections.abc import Callable
from inspect import Parameter, signature
from pathlib import Path
from typing import Any, get_type_hints

from docstring_parser import parse
from jsonargparse import ArgumentParser


def add_options(parser: ArgumentParser, function: Callable[..., Any]) -> None:
    """Add the parameters of a function to a parser.

    Parameters without a default are positional. A `list[Path]` among them takes one path or more,
    as a shell writes them; jsonargparse alone would want a JSON list.
    """
    hints = get_type_hints(function)
    several: set[str | int] = {
        name
        for name, parameter in signature(function).parameters.items()
        if parameter.default is Parameter.empty and hints[name] == list[Path]
    }
    texts = {p.arg_name: p.description for p in parse(function.__doc__ or "").params}
    for name in several:
        parser.add_argument(str(name), nargs="+", type=Path, help=texts.get(str(name)))
    parser.add_function_arguments(function, as_positional=True, fail_untyped=True, skip=several)
