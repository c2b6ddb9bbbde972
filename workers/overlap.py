"""How the batches of a worker are done side by side.

A job is a generator that does one batch. What it does itself is the device's share; what it yields are calls of the
CPU's share, whose results it is sent when all have come. While one waits for them others go on, so that neither side
waits for the other as long as there is work for it.
"""

from __future__ import annotations

import functools
import threading
from collections import deque
from collections.abc import Callable, Collection, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from typing import Any, Generic, Protocol, TypeVar

from workers.phases import Phases

R = TypeVar("R")
Call = Callable[[], Any]
Job = Generator[Sequence[Call], list[Any], R]
UNDER_WAY = 3  # jobs: one before the device, one with it, one behind it


class Flow(Protocol):
    """How the jobs of a worker are run."""

    def run(self, jobs: Iterator[Job[R]], phases: Phases) -> Iterator[R]:
        """What each job returns, in order; `phases` gets the seconds of both shares. Jobs are taken when there is room
        for one. A call that fails raises in its job; what fails there ends the run, and cancels what is under way."""
        ...


def flow_of(device: str, threads: int, *, side_by_side: bool) -> Flow:
    """With so many cores: beside a device other than the CPU its own share; on a CPU job by job with all cores, or
    `side_by_side` where that measures better (`benchmarks/stages.py`)."""
    if device != "cpu":
        return Overlapped(threads)
    return SideBySide(threads) if side_by_side and threads > 1 else InTurn()


class InTurn:
    """Job by job, all in the calling thread."""

    def run(self, jobs: Iterator[Job[R]], phases: Phases) -> Iterator[R]:
        for job in jobs:
            with phases.cpu():
                result = _whole(job)
            yield result


class SideBySide:
    """Where all shares are the CPU's: a job a thread, each of which computes alone, which beats sharing every product
    of matrices among the cores."""

    def __init__(self, threads: int) -> None:
        self._threads, self._pool = threads, _pool_of_single_threads(threads)

    def run(self, jobs: Iterator[Job[R]], phases: Phases) -> Iterator[R]:
        def whole(job: Job[R]) -> R:
            with phases.cpu():
                return _whole(job)

        under_way: deque[Future[R]] = deque()
        try:
            for job in jobs:
                under_way.append(self._pool.submit(whole, job))
                if len(under_way) > self._threads:
                    yield under_way.popleft().result()
            while under_way:
                yield under_way.popleft().result()
        finally:
            _cancel(under_way)


class Overlapped:
    """The device's share in the calling thread, the CPU's in `threads` others."""

    def __init__(self, threads: int) -> None:
        self._pool = _pool_of_single_threads(threads)

    def run(self, jobs: Iterator[Job[R]], phases: Phases) -> Iterator[R]:
        """As `Flow.run`; the phase `wait_for_cpu` counts the seconds in which no job could go on."""
        under_way: deque[_UnderWay[R]] = deque()
        more = True
        try:
            while more or under_way:
                ready = next((each for each in under_way if each.is_ready), None)
                if ready is not None:
                    ready.go_on()
                elif more and len(under_way) < UNDER_WAY:
                    job = next(jobs, None)
                    more = job is not None
                    under_way.extend([] if job is None else [_UnderWay(job, self._pool, phases)])
                else:
                    with phases("wait_for_cpu"):
                        wait([call for each in under_way for call in each.pending], return_when=FIRST_COMPLETED)
                while under_way and under_way[0].finished:
                    yield under_way.popleft().result
        finally:
            for each in under_way:
                each.cancel()


class _UnderWay(Generic[R]):
    """A job that was begun, and the calls it waits for."""

    result: R

    def __init__(self, job: Job[R], pool: ThreadPoolExecutor, phases: Phases) -> None:
        self.finished = False
        self._job, self._pool, self._phases = job, pool, phases
        self._calls: list[Future[Any]] = []
        self._step(functools.partial(next, job))

    @property
    def pending(self) -> list[Future[Any]]:
        return [call for call in self._calls if not call.done()]

    @property
    def is_ready(self) -> bool:
        return not self.finished and not self.pending

    def go_on(self) -> None:
        failed = next((error for call in self._calls if (error := call.exception()) is not None), None)
        if failed is None:
            self._step(functools.partial(self._job.send, [call.result() for call in self._calls]))
        else:
            self._step(functools.partial(self._job.throw, failed))

    def cancel(self) -> None:
        _cancel(self._calls)
        self._job.close()

    def _step(self, step: Callable[[], Sequence[Call]]) -> None:
        try:
            with self._phases.device():
                calls = step()
        except StopIteration as end:
            self.result, self.finished = end.value, True
        else:
            self._calls = [self._pool.submit(_timed, call, self._phases) for call in calls]


def _whole(job: Job[R]) -> R:
    """All of a job in this thread."""
    step: Callable[[], Sequence[Call]] = functools.partial(next, job)
    while True:
        try:
            calls = step()
        except StopIteration as end:
            value: R = end.value
            return value
        try:
            step = functools.partial(job.send, [call() for call in calls])
        except Exception as error:
            step = functools.partial(job.throw, error)


def _timed(call: Call, phases: Phases) -> Any:
    with phases.cpu():
        return call()


def _cancel(calls: Collection[Future[Any]]) -> None:
    for call in calls:
        call.cancel()
    wait(calls)


def _pool_of_single_threads(threads: int) -> ThreadPoolExecutor:
    """Threads each of which computes alone: torch would otherwise start as many again in each of them."""
    import torch

    before, all_there = torch.get_num_threads(), threading.Barrier(threads)
    pool = ThreadPoolExecutor(threads, thread_name_prefix="jobs", initializer=_compute_alone)
    wait([pool.submit(all_there.wait) for _ in range(threads)])
    torch.set_num_threads(before)
    return pool


def _compute_alone() -> None:
    import torch

    torch.set_num_threads(1)
    torch.get_num_threads()  # a thread that has asked keeps its number when another one sets its own
