"""Hooks of mkdocs: README is the home page, and files outside of docs/ are named, not linked."""

import re
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
LINK = re.compile(r"(?<!!)\[([^\]]+)\]\((?!https?:|#)([^)#]+)(#[^)]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add README.md as the home page, its links as seen from docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    text = re.sub(r"\]\((?!https?:|#)(?!docs/)", "](../", text).replace("](docs/", "](")
    files.append(File.generated(config, "index.md", content=text))
    return files


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Name what lies outside of docs/, and fail where it does not exist."""
    return LINK.sub(_outside, markdown)


def _outside(link: re.Match[str]) -> str:
    label, target = link[1], link[2]
    if not target.startswith("../"):
        return link[0]
    path = target.removeprefix("../")
    if not (ROOT / path).exists():
        raise FileNotFoundError(f"a link to {path}, which does not exist")
    return f"{label} (`{path}`)"
