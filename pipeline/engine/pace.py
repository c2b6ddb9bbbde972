"""What sets the pace of a stage, by the receipts: the device, the CPUs beside it, or the source of the photos."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pipeline.config.workers import WorkersConfig
from pipeline.engine.receipts import Receipt

BUSY = 0.8  # share of the time from which a device sets the pace
STARVED = 0.2  # share of it that is waited for photos, from which their source does
AT_WORK = 0.6  # share of an actor's CPUs that work, from which it is they after all: photos wait to be decoded


@dataclass(frozen=True, slots=True)
class Pace:
    """`device_busy`: share of the time in which an actor had work for its device, and `cpus_wanted` how many CPUs of an
    actor would always have some; both None on a CPU, which is its own device."""

    set_by: Literal["device", "cpus", "source"]
    device_busy: float | None = None
    cpus_wanted: int | None = None

    @property
    def text(self) -> str:
        if self.device_busy is None:
            return f"the {self.set_by}"
        wish = f": wants {self.cpus_wanted} cpus" if self.set_by == "cpus" else ""
        return f"the {self.set_by}, device busy {100 * self.device_busy:.0f} %{wish}"


def pace_of(receipts: Sequence[Receipt], workers: WorkersConfig) -> Pace | None:
    """Of a stage with these receipts; None where they do not tell, as those of fits and of earlier versions."""
    told = [receipt for receipt in receipts if receipt.cpu_s]
    wall = sum(receipt.wall_s for receipt in told)
    if not wall:
        return None
    device, cpu = sum(receipt.device_s for receipt in told), sum(receipt.cpu_s for receipt in told)
    at_work = cpu / (wall * max(1, math.floor(workers.cpus))) >= AT_WORK
    idle, hungry = (sum(receipt.seconds.get(f"wait_for_{what}", 0.0) for receipt in told) for what in ("cpu", "input"))
    starved = hungry > max(idle, STARVED * wall) and not at_work
    beside: Literal["cpus", "source"] = "source" if starved else "cpus"
    if not device:
        return Pace(beside)
    busy = device / wall
    return Pace("device" if busy >= BUSY else beside, busy, 1 + math.ceil(cpu / device))
