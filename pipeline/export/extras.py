"""Libraries that own a format, and are no part of the plain installation."""

from __future__ import annotations

import importlib
from typing import Any

from pipeline.errors import ConfigError


def load_extra(module: str, *, package: str, format: str) -> Any:
    """A module of the extra `exports`. ConfigError says how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ConfigError(
            f"export {format}: {package} is not there ({error}); pip install -c constraints.txt -e '.[exports]'"
        ) from error
