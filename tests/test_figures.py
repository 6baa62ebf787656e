import subprocess
import sys
from pathlib import Path

import pytest
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from models import plan_of

from lmerge.figures import matching_figure, save, similarity_figure

PNG = b"\x89PNG\r\n"
PLAN = plan_of([0, 1], [2, 3])


def matrices(count: int) -> dict[str, torch.Tensor]:
    return {f"domain {i}": torch.rand(4, 4).double() for i in range(count)}


def panels(figure: Figure) -> list[Axes]:
    """The axes that show a matrix."""
    return [axis for axis in figure.axes if axis.images]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_every_matrix_has_a_panel_under_its_name(count: int) -> None:
    figure = similarity_figure(matrices(count), "angular", PLAN)
    assert [axis.get_title() for axis in panels(figure)] == list(matrices(count))
    assert len(figure.axes) == count + 1  # and the colour bar


def test_panels_share_one_colour_scale() -> None:
    shown = matrices(3)
    figure = similarity_figure(shown, "angular", PLAN)
    limits = {axis.images[0].get_clim() for axis in panels(figure)}
    low, high = min(m.min() for m in shown.values()), max(m.max() for m in shown.values())
    assert limits == {(float(low), float(high))}


def test_the_groups_of_the_plan_are_framed() -> None:
    (axis,) = panels(similarity_figure(matrices(1), "angular", plan_of([1, 2, 3])))
    (frame,) = (patch for patch in axis.patches if isinstance(patch, Rectangle))
    assert frame.get_bbox().bounds == (0.5, 0.5, 3, 3)


def test_a_plan_that_merges_nothing_has_no_frame() -> None:
    (axis,) = panels(similarity_figure(matrices(1), "angular", plan_of()))
    assert not axis.patches


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_matrix_of_one_value_is_drawn(tmp_path: Path, value: float) -> None:
    figure = similarity_figure({"all": torch.full((4, 4), value)}, "cka", PLAN)
    save(figure, tmp_path / "constant.png")
    assert (tmp_path / "constant.png").stat().st_size > 1000


@pytest.mark.parametrize("count", [1, 2, 12])
def test_every_aligned_layer_has_a_box_before_and_after(count: int) -> None:
    layers = {13 + i: torch.rand(20) for i in range(count)}
    (axis,) = matching_figure(layers, layers).axes
    assert [label.get_text() for label in axis.get_xticklabels()] == [str(i) for i in layers]
    assert len(axis.patches) == 2 * count
    assert [text.get_text() for text in axis.get_legend().get_texts()] == ["before", "after"]


@pytest.mark.parametrize("kind", ["similarity", "matching"])
def test_a_figure_is_written_as_png_into_a_new_folder(tmp_path: Path, kind: str) -> None:
    layers = {1: torch.rand(20), 2: torch.rand(20)}
    figure = (
        similarity_figure(matrices(4), "angular", PLAN)
        if kind == "similarity"
        else matching_figure(layers, layers)
    )
    path = tmp_path / "new" / "figure.png"
    save(figure, path)
    assert path.read_bytes().startswith(PNG)
    assert path.stat().st_size > 1000


def test_importing_leaves_the_backend_of_a_notebook_alone() -> None:
    code = (
        "import matplotlib; matplotlib.use('svg'); import lmerge.figures; "
        "assert matplotlib.get_backend() == 'svg'"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
