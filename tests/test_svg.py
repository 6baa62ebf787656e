"""Figures inside a page: their ids, their colours, their text."""

import re

from matplotlib.figure import Figure

from lmerge.svg import INK, inline_svg, themed


def drawn(name: str = "f1", label: str = "a line") -> str:
    with themed():
        figure = Figure(figsize=(2, 2))
        axis = figure.subplots()
        axis.plot([0, 1], [0, 2], label="up")
        axis.imshow([[0, 1], [1, 0]], interpolation="none")
        axis.set_title("a < b & c")
        return inline_svg(figure, name, label)


def test_two_figures_on_a_page_share_no_id() -> None:
    ids = [set(re.findall(r'\bid="([^"]+)"', drawn(name))) for name in ("f1", "f2")]
    assert all(ids)
    assert not ids[0] & ids[1]


def test_every_reference_has_its_target() -> None:
    svg = drawn()
    ids = set(re.findall(r'\bid="([^"]+)"', svg))
    used = re.findall(r'href="#([^"]+)"|url\(#([^)]+)\)', svg)
    assert used
    assert {a or b for a, b in used} <= ids


def test_text_stays_text_in_the_colour_of_the_page() -> None:
    svg = drawn()
    assert "a &lt; b &amp; c" in svg
    assert "fill: var(--ink)" in svg
    assert INK not in svg


def test_nothing_points_to_the_outside() -> None:
    assert not re.search(r"https?:|xmlns|<metadata|<!DOCTYPE", drawn())


def test_the_label_is_escaped() -> None:
    assert 'aria-label="&quot;&gt;&lt;b&gt;"' in drawn(label='"><b>')


def test_equal_figures_give_equal_text() -> None:
    assert drawn() == drawn()
