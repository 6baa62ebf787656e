"""Figures as SVG inside a page: text that stays text, in the page's colours, with own ids."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from contextlib import contextmanager
from html import escape
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

INK = "#010203"
"""Stands for the page's text colour while a figure is drawn; no other part may use it."""

THEME: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.facecolor": "none",
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlecolor": INK,
    "axes.titlesize": 10.0,
    "figure.facecolor": "none",
    "font.size": 10.0,
    "legend.frameon": False,
    "legend.labelcolor": INK,
    "savefig.facecolor": "none",
    "svg.fonttype": "none",
    "svg.hashsalt": "lmerge",
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


@contextmanager
def themed() -> Iterator[None]:
    """Let the figures that are made inside take the page's colours."""
    with mpl.rc_context(THEME):
        yield


def inline_svg(figure: Figure, name: str, label: str) -> str:
    """Return a figure, made and shown inside `themed()`, as an `<svg>` element of a page.

    Args:
        figure: The figure.
        name: Distinguishes the ids of this figure from those of others on the page.
        label: What it shows, for people who do not see it; escaped here.
    """
    sink = io.StringIO()
    figure.savefig(sink, format="svg", metadata={"Date": None, "Creator": None})
    text = sink.getvalue()
    text = text[text.index("<svg") :].strip()
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r' xmlns(:\w+)?="[^"]*"', "", text)  # an HTML parser knows them
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = text.replace("xlink:href", "href").replace(INK, "var(--ink)")
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(href="#|url\(#)', rf"\g<1>{name}-", text)
    return text.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)
