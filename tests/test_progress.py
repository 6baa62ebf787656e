import time
from collections.abc import Iterator

import pytest
from lightning.fabric.utilities.rank_zero import rank_zero_only

from lmerge.progress import track


def test_items_come_through_in_order() -> None:
    assert list(track(range(5), "counting", total=5)) == list(range(5))


def test_items_of_unknown_number_come_through() -> None:
    assert list(track((i for i in range(5)), "counting")) == list(range(5))


def test_items_are_taken_one_by_one() -> None:
    taken = []

    def items() -> Iterator[int]:
        for i in range(5):
            taken.append(i)
            yield i

    next(iter(track(items(), "counting")))
    assert taken == [0]


def test_short_work_shows_no_bar(capsys: pytest.CaptureFixture[str]) -> None:
    list(track(range(5), "counting", total=5))
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(("rank", "shown"), [(0, True), (1, False)])
def test_long_work_shows_a_bar_on_the_first_process_alone(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, rank: int, shown: bool
) -> None:
    monkeypatch.setattr(rank_zero_only, "rank", rank, raising=False)
    for _ in track(range(3), "counting", total=3):
        time.sleep(0.4)
    assert ("counting" in capsys.readouterr().err) == shown
