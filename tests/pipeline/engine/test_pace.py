"""What sets the pace of a stage, from receipts that are made up."""

from __future__ import annotations

import pytest

from pipeline.config.workers import WorkersConfig
from pipeline.engine.pace import pace_of
from pipeline.engine.receipts import Receipt

GPU = WorkersConfig(device="cuda", gpus=1, cpus=4)


def receipt(device_s: float, cpu_s: float, **seconds: float) -> Receipt:
    return Receipt("instances", "0" * 12, 0, True, 10.0, device_s=device_s, cpu_s=cpu_s, seconds=seconds)


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (receipt(9.0, 20.0, wait_for_cpu=0.5), "the device, device busy 90 %"),
        (receipt(2.0, 16.0, wait_for_cpu=7.0), "the cpus, device busy 20 %: wants 9 cpus"),
        (receipt(2.0, 4.0, wait_for_input=7.0), "the source, device busy 20 %"),
        (receipt(2.0, 30.0, wait_for_input=7.0), "the cpus, device busy 20 %: wants 16 cpus"),  # they decode
    ],
)
def test_the_side_that_the_other_waits_for(told: Receipt, text: str) -> None:
    pace = pace_of([told, told], GPU)
    assert pace is not None
    assert pace.text == text


@pytest.mark.parametrize(
    ("told", "text"),
    [
        (receipt(0.0, 9.0, wait_for_input=0.2), "the cpus"),
        (receipt(0.0, 2.0, wait_for_input=7.0), "the source"),
    ],
)
def test_a_cpu_is_its_own_device(told: Receipt, text: str) -> None:
    pace = pace_of([told], WorkersConfig(cpus=2))
    assert pace is not None
    assert (pace.text, pace.device_busy, pace.cpus_wanted) == (text, None, None)


def test_receipts_that_do_not_tell() -> None:
    assert pace_of([receipt(0.0, 0.0), receipt(0.0, 0.0)], GPU) is None
    assert pace_of([], GPU) is None
