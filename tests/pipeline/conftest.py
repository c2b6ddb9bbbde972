"""Places on disk and in a bucket that tests run on alike."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.store import storage


@pytest.fixture(params=["disk", "s3"])
def source(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Where a test puts its images, on disk or in a bucket."""
    if request.param == "disk":
        return str(tmp_path / "source")
    return storage.join(request.getfixturevalue("s3_bucket"), "source")
