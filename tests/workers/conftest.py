"""What tests of the workers share."""

from __future__ import annotations

import pytest

from workers import devices


@pytest.fixture(params=["as a CPU", "as a GPU"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test runs twice, on the CPU: the second time the way it is done on a GPU."""
    if request.param == "as a GPU":
        monkeypatch.setattr(devices, "many_threads", lambda where: True)
