"""A few of each kind of fault done to one run, by a seed; `make chaos` does some hundred."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config import load_config
from pipeline.operations.status import run_status
from tests.faults import Damage, Victim, damage, small_cluster
from tests.integration.conftest import SCENES, write_config


@pytest.mark.slow
def test_a_run_that_loses_workers_nodes_drivers_and_parts_ends_as_if_nothing_had_happened(
    scenes: Path, labelled: Path, tmp_path: Path
) -> None:
    config = write_config(scenes, tmp_path, shard_size=1, workers={"size": 1, "memory_gb": 0.3, "attempts": 9})
    with small_cluster() as cluster, Victim(config, cluster, seed=5) as victim:
        victim.start()
        for kind in ("kill_actor", "suspend_actor", "kill_node", "terminate_driver"):
            done = len(victim.parts("instances"))
            victim.wait(lambda done=done: len(victim.parts("instances")) > done)  # type: ignore[misc]
            assert victim.do(kind), kind
        for kind in ("garbage_part", "truncate_part", "delete_part", "leave_litter"):
            assert victim.do(kind), kind
        victim.start()
        victim.wait(lambda: False)
        assert victim.poll() == 0, victim.log.read_text()
    assert damage(str(tmp_path / "run"), str(labelled)) == Damage(lost=0, duplicated=0, wrong=0, litter=0, leases=0)
    stages = run_status(load_config(str(config))).stages
    assert [(stage.done, stage.failed) for stage in stages] == [(SCENES, []), (1, []), (SCENES, [])]
    assert "run the same command again" in victim.log.read_text()
