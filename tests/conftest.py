"""Fixtures that every test may use."""

from __future__ import annotations

from pathlib import Path

import pytest

SHARED = Path(__file__).resolve().parents[2] / "shared"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of reference outputs and photos that may lie beside the checkout; the test is skipped without it."""
    if not SHARED.is_dir():
        pytest.skip("no reference data beside the checkout")
    return SHARED
