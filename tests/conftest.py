"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"
RAY_ENVIRONMENT = {
    "RAY_AUTH_MODE": "disabled",
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_DATA_DISABLE_PROGRESS_BARS": "1",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_memory_usage_threshold": "0.98",
}


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference outputs and photos that may lie beside the checkout; the test is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("no reference data beside the checkout")
    return SHARED


@pytest.fixture(scope="session")
def ray_session() -> Iterator[None]:
    """One local Ray with 4 logical CPUs for the whole test session; takes about 7 s to start."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in RAY_ENVIRONMENT.items():
            patch.setenv(name, value)
        import ray

        ray.init(num_cpus=4, object_store_memory=150 * 2**20, include_dashboard=False, log_to_driver=False)
        yield
        ray.shutdown()
