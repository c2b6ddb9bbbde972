"""How many CPUs a training gets, and that the driver's threads are given back."""

from __future__ import annotations

import pytest
import torch

from pipeline.config import Config
from pipeline.engine import fits


def config(**workers: object) -> Config:
    return Config.model_validate({"source": {"uri": "a"}, "run": {"uri": "b"}, "workers": workers})


@pytest.mark.parametrize(
    ("workers", "threads"),
    [
        ({"size": 3, "cpus": 2}, 6),  # all workers' share, for the driver alone
        ({"size": 4, "cpus": 0.5}, 2),
        ({"size": 1, "cpus": 0.5}, 1),
        ({"size": 100, "cpus": 4}, 8),  # never more than there are
    ],
)
def test_a_training_in_this_process_has_the_cpus_of_all_workers(
    workers: dict[str, object], threads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fits, "_machine_cpus", lambda: 8)
    before = torch.get_num_threads()
    with pytest.raises(KeyboardInterrupt), fits.fit_threads(config(**workers).workers) as cpus:
        assert (cpus, torch.get_num_threads()) == (threads, threads)
        raise KeyboardInterrupt
    assert torch.get_num_threads() == before


def test_a_worker_of_ray_train_has_its_own() -> None:
    before = torch.get_num_threads()
    with fits.fit_threads(config(size=3, cpus=2, train_workers=2).workers) as cpus:
        assert (cpus, torch.get_num_threads()) == (2, before)
