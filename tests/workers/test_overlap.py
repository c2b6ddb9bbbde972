"""Jobs in turn, side by side, and with the CPU's share beside the device's: the same results in the same order."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import pytest

from workers.overlap import UNDER_WAY, Flow, InTurn, Job, Overlapped, SideBySide, flow_of
from workers.phases import Phases

FLOWS: dict[str, Callable[[], Flow]] = {
    "in turn": InTurn,
    "side by side": lambda: SideBySide(3),
    "overlapped": lambda: Overlapped(3),
}
PATIENCE_S = 20.0


def squares(number: int) -> Job[list[int]]:
    first = yield [lambda: number, lambda: number + 1]
    second = yield []
    return [*(yield [lambda value=value: value**2 for value in first]), *second]


def fails(number: int) -> Job[str]:
    try:
        yield [lambda: number, lambda: 1 // (3 - number)]
    except ZeroDivisionError as error:
        raise RuntimeError(f"job {number}") from error
    return f"{number}"


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)
def test_every_job_gets_its_own_results_and_the_order_stays(flow: Callable[[], Flow]) -> None:
    done = list(flow().run(map(squares, range(20)), Phases()))
    assert done == [[n**2, (n + 1) ** 2] for n in range(20)]
    assert list(flow().run(iter([]), Phases())) == []


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)
def test_a_call_that_fails_raises_in_its_job(flow: Callable[[], Flow]) -> None:
    done, jobs = [], map(fails, range(100))
    with pytest.raises(RuntimeError, match="job 3"):
        done.extend(flow().run(jobs, Phases()))  # what came before is not lost on the way
    assert sum(1 for _ in jobs) > 80  # it did not go on after the failure


@pytest.mark.parametrize("flow", FLOWS.values(), ids=FLOWS)
def test_no_more_jobs_are_begun_than_may_be_under_way(flow: Callable[[], Flow]) -> None:
    begun: list[int] = []

    def jobs() -> Iterator[Job[list[int]]]:
        for number in range(12):
            begun.append(number)
            yield squares(number)

    for done, _ in enumerate(flow().run(jobs(), Phases()), 1):
        assert len(begun) <= done + UNDER_WAY + 1


def test_the_device_goes_on_while_a_job_waits_for_the_cpu() -> None:
    """Each call waits until the device has begun the next job: in turn this would never end."""
    begun = [threading.Event() for _ in range(5)]
    here = threading.get_ident()

    def job(number: int) -> Job[tuple[bool, bool]]:
        begun[number].set()
        waits = number + 1 < len(begun)
        (came,) = yield [lambda: begun[number + 1].wait(PATIENCE_S) if waits else True]
        return came, threading.get_ident() == here

    phases = Phases()
    assert list(Overlapped(2).run(map(job, range(5)), phases)) == [(True, True)] * 5  # the device has one thread
    assert phases.device_s > 0
    assert "wait_for_cpu" in phases.seconds


def test_whole_jobs_run_at_the_same_time_side_by_side() -> None:
    both = threading.Barrier(2)

    def job() -> Job[int]:
        both.wait(PATIENCE_S)
        yield []
        return threading.get_ident()

    first, second = SideBySide(2).run(iter([job(), job()]), Phases())
    assert len({first, second, threading.get_ident()}) == 3


def test_threads_compute_alone_and_the_caller_keeps_its_own() -> None:
    import torch

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)

        def job() -> Job[int]:
            return (yield [torch.get_num_threads])[0]

        for flow in (SideBySide(2), Overlapped(2)):
            torch.set_num_threads(2)  # which those that are there do not heed
            assert list(flow.run(iter([job(), job(), job()]), Phases())) == [1, 1, 1]
            assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


def test_what_flows_where() -> None:
    assert isinstance(flow_of("cuda", 1, side_by_side=False), Overlapped)
    assert isinstance(flow_of("cpu", 2, side_by_side=True), SideBySide)
    assert isinstance(flow_of("cpu", 2, side_by_side=False), InTurn)
    assert isinstance(flow_of("cpu", 1, side_by_side=True), InTurn)
