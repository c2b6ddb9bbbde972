"""A training in a thread of its own: its result, its error, and an interrupt that is not held back."""

from __future__ import annotations

import os
import signal
import threading
import time

import pytest

from pipeline.engine import ray_train


class Training:
    def __init__(self, outcome: object = None, seconds: float = 0) -> None:
        self.outcome, self.seconds = outcome, seconds
        self.in_main_thread: bool | None = None

    def fit(self) -> object:
        self.in_main_thread = threading.current_thread() is threading.main_thread()
        time.sleep(self.seconds)
        if isinstance(self.outcome, Exception):
            raise self.outcome
        return self.outcome


def test_the_result_is_handed_on_from_a_thread_where_ray_takes_no_signal() -> None:
    training = Training("fitted")
    assert ray_train.fit(training) == "fitted"
    assert training.in_main_thread is False


def test_an_error_of_the_training_is_raised() -> None:
    with pytest.raises(ValueError, match="no such batch"):
        ray_train.fit(Training(ValueError("no such batch")))


def test_ctrl_c_ends_the_wait_at_once() -> None:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):
        ray_train.fit(Training(seconds=30))
