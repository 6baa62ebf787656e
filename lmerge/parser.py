"""The parser of the command line: options without abbreviations, errors in one line with a hint."""

from __future__ import annotations

import difflib
import re
import sys
from typing import Any, NoReturn

from lightning.pytorch.cli import LightningArgumentParser

COMMANDS: dict[str, tuple[str, str]] = {
    "compare": ("lmerge.compare", "compare"),
    "similarity": ("lmerge.similarity_study", "run_similarity"),
    "transfer": ("lmerge.transfer_study", "run_transfer"),
    "sweep": ("lmerge.sweep", "sweep"),
    "export": ("lmerge.export_run", "export"),
    "diff": ("lmerge.diff", "diff"),
    "report": ("lmerge.report", "report"),
}
"""Commands beside fit, validate and test: name -> (module, function), imported when called.

The function's signature gives the options and its docstring their help.
"""

RENAMED = {"num_merges": "num_removed", "num_layers_removed": "num_removed"}
"""Names that people try, and what the option is called here."""


class Parser(LightningArgumentParser):
    """A parser that takes no abbreviations and reports an error in one line with a hint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        kwargs.setdefault("allow_abbrev", False)
        super().__init__(*args, **kwargs)

    def error(self, message: str, ex: Exception | None = None) -> NoReturn:
        parser = getattr(ex, "subcommand_parser", None) or self
        line = " ".join(message.split())
        sys.stderr.write(f"lmerge: error: {line}{_hint(parser, line)}\n")
        sys.exit(2)


def _hint(parser: Any, message: str) -> str:
    """Return a `did you mean` for the first unknown option in a message."""
    typed = re.search(r"subcommand: invalid choice: '(\w+)' \(choose from (.*)\)", message)
    if typed is not None:
        known = [*re.findall(r"\w+", typed[2]), *COMMANDS]
        close = difflib.get_close_matches(typed[1], known, n=1)
        return f" Did you mean `lmerge {close[0]}`?" if close else ""
    match = re.search(
        r"(?:[Uu]nrecognized arguments: (?:--)?|[Kk]ey ['\"]?|option ['\"])([\w.]+)", message
    )
    if match is None:
        return ""
    key = match[1]
    stem, _, leaf = key.rpartition(".")
    options = list(_option_names(parser))
    wanted = f"{stem}.{RENAMED[leaf]}".lstrip(".") if leaf in RENAMED else key
    close = difflib.get_close_matches(wanted, options, n=1, cutoff=0.6)
    close = close or [name for name in options if name.rpartition(".")[2] == leaf][:1]
    return f" Did you mean `--{close[0]}`?" if close else ""


def _option_names(parser: Any) -> set[str]:
    names = {s[2:] for a in parser._actions for s in a.option_strings if s.startswith("--")}
    subcommands = getattr(parser, "_subcommands_action", None)
    for subparser in subcommands._name_parser_map.values() if subcommands else ():
        names |= _option_names(subparser)
    return names
