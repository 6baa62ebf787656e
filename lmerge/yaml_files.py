"""YAML files that people write, checked before a parser expands them."""

from __future__ import annotations

from pathlib import Path

import yaml

SHIPPED = next(
    folder
    for folder in (Path(__file__).parent / "configs", Path(__file__).parents[1] / "configs")
    if folder.is_dir() or folder.parent != Path(__file__).parent
)
"""Folder of the configs that come with lmerge: in an installed package, or in its repository."""

CONFIG_FLAGS = ("-c", "--config")

MAX_NODES = 100_000
"""Values that a file may hold once its aliases are written out."""


def check_yaml(path: Path) -> None:
    """Raise ValueError when a YAML file is unreadable, contains itself, or grows without bound."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
        num_nodes = _count(root, {}) if root is not None else 0
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise ValueError(f"{path} must be readable YAML, got: {reason}. Correct it.") from None
    if num_nodes > MAX_NODES:
        raise ValueError(
            f"{path} must hold at most {MAX_NODES} values with its aliases written out, got "
            f"{num_nodes}. Use fewer aliases."
        )


def _count(node: yaml.Node, known: dict[int, int]) -> int:
    """Return the values below a node; `known` holds those of nodes seen before, 0 while open."""
    found = known.get(id(node))
    if found == 0:
        raise ValueError(f"an alias inside of what it stands for, line {node.start_mark.line + 1}")
    if found is None:
        known[id(node)] = 0
        children: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            children = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            children = node.value
        found = 1 + sum(_count(child, known) for child in children)
        known[id(node)] = found
    return found


def shipped_config(name: str) -> Path | None:
    """Return the config of lmerge that `best`, `best.yaml` or `configs/best.yaml` names."""
    path = SHIPPED / f"{name.removeprefix('configs/').removesuffix('.yaml')}.yaml"
    inside = path.resolve().is_relative_to(SHIPPED.resolve())
    return path if inside and path.is_file() else None


def with_shipped_configs(args: list[str]) -> tuple[list[str], list[Path]]:
    """Return the arguments with lmerge's own configs by path, and all files given as configs.

    A file of that name in the working folder comes first.
    """
    found, paths = list(args), []
    for i, arg in enumerate(args):
        flag, sign, value = arg.partition("=")
        if flag not in CONFIG_FLAGS:
            continue
        at = i if sign else i + 1
        name = value if sign else "".join(args[at : at + 1])
        path = Path(name) if Path(name).is_file() else shipped_config(name)
        if path is not None:
            found[at] = f"{flag}={path}" if sign else str(path)
            paths.append(path)
    return found, paths
