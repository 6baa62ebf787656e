import pytest
from conftest import tiny_model

from lmerge.estimate import Work, estimate_seconds, measure_speed
from lmerge.heal import HealConfig
from lmerge.repair import RepairConfig

SPEED = (1e-5, 2e-5)
BASE = {"num_tokens": 4096, "num_removed": 2}


def seconds(**changes: object) -> float:
    return estimate_seconds(tiny_model(), Work(**{**BASE, **changes}), SPEED)


def test_speed_is_measured_in_seconds_a_token() -> None:
    per_layer, per_logits = measure_speed(tiny_model(), 64)
    assert 0 < per_layer < 0.1
    assert 0 < per_logits < 0.1


@pytest.mark.parametrize(
    "more",
    [
        {"num_tokens": 8192},
        {"search": "block_repaired"},
        {"num_steps": 10},
        {"repair": RepairConfig(method="deep")},
        {"heal": HealConfig(method="scales")},
    ],
)
def test_more_work_takes_longer(more: dict[str, object]) -> None:
    assert seconds(**more) > seconds()


def test_reading_the_source_alone_is_one_pass() -> None:
    assert seconds(repair=RepairConfig(method="none")) == pytest.approx(4096 * 4 * 1e-5)
