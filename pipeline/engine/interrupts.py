"""Signals that end work as Ctrl-C does: cleanly, by a KeyboardInterrupt in the main thread."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def interrupted_by(number: signal.Signals) -> Iterator[None]:
    """A signal raises KeyboardInterrupt for the time of the block. Other threads than the main one cannot be
    interrupted, and nothing is changed for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    before = signal.signal(number, interrupt)
    try:
        yield
    finally:
        signal.signal(number, before)
