import pytest

from lmerge.units import duration, size


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.1, "1 second"),
        (42, "42 seconds"),
        (89.9, "90 seconds"),
        (90, "2 minutes"),
        (150, "2 minutes"),
        (5399, "90 minutes"),
        (5400, "1.5 hours"),
    ],
)
def test_durations_are_for_people(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1 KiB"), (2**29, "512 MiB"), (2**34, "16.00 GiB")],
)
def test_a_size_has_the_unit_that_people_expect(num_bytes: int, text: str) -> None:
    assert size(num_bytes) == text
