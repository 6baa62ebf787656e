"""What the parser of options says of a mistake, in words of the command line, and the way out."""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from pathlib import Path

from lmerge.yaml_files import SHIPPED

RENAMED = {"num_merges": "num_removed", "num_layers_removed": "num_removed"}
"""Names that people try, and what the option is called here."""

KINDS = {"int": "a whole number", "float": "a number", "bool": "true or false", "str": "text"}


def explained(message: str, options: Collection[str]) -> str:
    """Return a parser's message as one line that names option, rule, value and way out.

    Args:
        message: What jsonargparse says, on one line.
        options: Names of the options that there are, without dashes.
    """
    return (
        _bad_choice(message)
        or _bad_kind(message)
        or _missing_config(message)
        or message + _other_option(message, options)
    )


def _bad_choice(message: str) -> str:
    """Explain a value outside of a closed set."""
    found = re.search(r'key "([\w.+]+)".*?Literal\[(.*?)\].*?(?:Got|Given) value: (.*)$', message)
    if found is None:
        return ""
    choices, value = re.findall(r"'([^']*)'", found[2]), found[3].strip("'\" ")
    null = " (or null)" if "NoneType" in message else ""
    line = f"`--{found[1]}` must be one of {', '.join(choices)}{null}, got {value!r}."
    close = difflib.get_close_matches(value, choices, n=1)
    return line + (f" Did you mean {close[0]}?" if close else "")


def _bad_kind(message: str) -> str:
    """Explain a value of another type."""
    found = re.search(r'key "([\w.+]+)": Expected a <class \'(\w+)\'>\. Got value: (.*)$', message)
    if found is None or found[2] not in KINDS:
        return ""
    return f"`--{found[1]}` must be {KINDS[found[2]]}, got {found[3]!r}; correct the value."


def _missing_config(message: str) -> str:
    """Explain a config that is not there."""
    found = re.search(r"key \"config\".*?does not exist: '?(.*?)'?$", message)
    if found is None:
        return ""
    path = Path(found[1])
    near = {p.name: str(p) for p in path.parent.glob("*.yaml")} if path.parent.is_dir() else {}
    known = {p.name: f"configs/{p.name}" for p in SHIPPED.glob("*.yaml")} | near
    close = difflib.get_close_matches(path.name, known, n=1)
    hint = f"Did you mean {known[close[0]]}?" if close else "Check the path."
    return f"`--config` must be a YAML file, got {path}, which does not exist. {hint}"


def _other_option(message: str, options: Collection[str]) -> str:
    """Return a `did you mean` for the first unknown option in a message."""
    match = re.search(
        r"(?:[Uu]nrecognized arguments: (?:--)?|[Kk]ey ['\"]?|option ['\"])([\w.]+)", message
    )
    if match is None or match[1] in options:
        return ""
    stem, _, leaf = match[1].rpartition(".")
    wanted = f"{stem}.{RENAMED[leaf]}".lstrip(".") if leaf in RENAMED else match[1]
    close = difflib.get_close_matches(wanted, options, n=1, cutoff=0.6)
    close = close or [name for name in options if name.rpartition(".")[2] == leaf][:1]
    stop = "" if message.endswith((".", "?")) else "."
    return f"{stop} Did you mean `--{close[0]}`?" if close else ""
