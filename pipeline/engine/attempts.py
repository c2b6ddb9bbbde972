"""Attempts at shards: a shard that kills its workers must not be tried for ever, nor hold up a run by hanging.

Ray starts a worker that died again and gives it the same shard, without end. So every worker says to a ledger (one
small Ray actor a stage) what it begins and ends; an attempt that was begun and never ended has killed its worker.

1. The first attempt is an ordinary one.
2. After a death the images are processed one at a time, each told to the ledger before it is touched.
3. An image that was in flight in `limit - 1` such deaths gets the status `crashed`, and the rest of its shard goes on.
4. A shard that killed `limit` workers without such an image to blame is given up: a failed receipt.

Attempts that ended because their whole node was lost do not count. A worker that hangs ends its own process, which is
a death as any other. Loading the model is an attempt too, under the id of the actor: Ray would start one that dies
there again for ever. The ledger lives as long as a stage of one run: the next run tries afresh.

On a node that got notice to go, such as a spot instance, nothing begins any more: workers leave between two shards.

The ledger also knows which shards are late. When none is left to begin, idle workers do these a second time, each once;
the part that is whole first stands. So one slow machine does not decide when a stage ends.
"""

from __future__ import annotations

import bisect
import collections
import contextlib
import faulthandler
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.store import retries

log = logging.getLogger(__name__)
Key = int | str  # a shard, or the id of an actor that starts
LATE, LATE_S = 1.5, 2.0  # times the median shard, and seconds at least, from which one under way is late
POLL_S = 0.5  # between an idle worker's questions
HANGS, HANGS_S = 10.0, 120.0  # times what the photos under way take, and seconds at least, from which one hangs
KNOWN = 16  # photos, from which on it is known what they take


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a worker is told when it begins."""

    number: int = 1  # of all that were begun, deaths of nodes included
    one_by_one: bool = False  # an earlier attempt killed its worker: find out which image does
    crashed: frozenset[str] = frozenset()  # images found out so, which are not to be touched
    given_up: str | None = None  # why it is not tried again
    leave: bool = False  # the node got notice to go: begin nothing here any more


@dataclass(frozen=True, slots=True)
class Second:
    """What an idle worker is told: a shard to do a second time; or that there may be one `later`, or none any more."""

    shard: int | None = None
    later: bool = False


@dataclass
class _Work:
    """What the ledger knows of work that is under way."""

    begun: int = 0
    node: str | None = None  # of the attempt under way
    image: str | None = None  # that it said it would touch
    started: float = 0.0
    lasted: list[float] = field(default_factory=list)  # seconds of every attempt that killed its worker
    blamed: collections.Counter[str] = field(default_factory=collections.Counter)  # deaths by image


class Ledger:
    """The attempts at the shards of a stage. `limit` is `workers.attempts`; `node_lives` and
    `node_leaves` tell of a node's id; `shards` are all that are to be done."""

    def __init__(
        self,
        limit: int,
        node_lives: Callable[[str], bool],
        shards: Collection[int] = (),
        node_leaves: Callable[[str], bool] = lambda node: False,
    ) -> None:
        self._limit, self._node_lives, self._node_leaves = limit, node_lives, node_leaves
        self._under_way: dict[Key, _Work] = {}
        self._not_begun = set(shards)
        self._durations: list[float] = []  # of shards that ended, in order of size
        self._seconded: set[int] = set()
        self._done: set[int] = set()  # of these

    def begin(self, key: Key, node: str) -> Attempt:
        """An attempt begins on a node. One that is still open has killed its worker, or went down with its node."""
        if self._node_leaves(node):
            return Attempt(leave=True)
        known = self._under_way.setdefault(key, _Work())
        if isinstance(key, int):
            self._not_begun.discard(key)
        if known.node is not None and self._node_lives(known.node):
            known.lasted.append(time.monotonic() - known.started)
            known.blamed.update([known.image] if known.image is not None else [])
        known.node, known.image, known.started = node, None, time.monotonic()
        known.begun += 1
        crashed = {image: deaths for image, deaths in known.blamed.items() if deaths >= self._limit - 1}
        given_up = None
        if len(known.lasted) - sum(crashed.values()) >= self._limit:
            given_up = self._verdict(key, known)
            self.end(key)
        return Attempt(known.begun, bool(known.lasted), frozenset(crashed), given_up)

    def touch(self, key: Key, image_id: str | None) -> None:
        """The attempt goes on to this image, or has done with all of them."""
        if key in self._under_way:  # a ledger that was lost with its node has forgotten
            self._under_way[key].image = image_id

    def end(self, key: Key) -> None:
        known = self._under_way.pop(key, None)
        if known is not None and isinstance(key, int):
            bisect.insort(self._durations, time.monotonic() - known.started)

    def second(self) -> Second:
        """A shard for a worker that has none: the one that is under way the longest, when that is longer than shards
        take and no death is looked into."""
        if self._not_begun and self._under_way:
            return Second(later=True)
        open_ = [(work.started, key) for key, work in self._under_way.items() if isinstance(key, int)]
        late = [(at, key) for at, key in open_ if key not in self._seconded and self._under_way[key].begun == 1]
        if not late:
            return Second()
        at, shard = min(late)
        took = time.monotonic() - at
        if not self._durations or took < max(LATE_S, LATE * self._durations[len(self._durations) // 2]):
            return Second(later=True)
        self._seconded.add(shard)
        return Second(shard)

    def done(self, shard: int) -> None:
        """The part of a shard is written."""
        if shard in self._seconded:
            self._done.add(shard)

    def is_done(self, shard: int) -> bool:
        """Whether one of the two attempts at a shard that was done a second time has written its part."""
        return shard in self._done

    def _verdict(self, key: Key, known: _Work) -> str:
        what = f"shard {key}" if isinstance(key, int) else "loading the model"
        seconds = ", ".join(f"{lasted:.0f}" for lasted in known.lasted)
        images = f" at {', '.join(sorted(known.blamed))}" if known.blamed else ""
        return (
            f"{what} killed its worker {len(known.lasted)} times{images} (after {seconds} s): out of memory, a "
            "crash of native code, or a hang (workers.hang_timeout_s); raise workers.memory_gb or lower "
            f"workers.batch_size (Ray's worker logs, the last on node {known.node}, say more), or raise "
            "workers.attempts if something else kills workers"
        )


def start_ledger(limit: int, shards: Collection[int] = ()) -> Any:
    """The handle of a ledger on the driver's node, which lives as long as the handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(Ledger)
    return actor.remote(limit, _is_alive, shards, Leaving())


def _is_alive(node: str) -> bool:
    import ray

    return any(entry["NodeID"] == node and entry["Alive"] for entry in ray.nodes())


class Leaving:
    """Whether a node got notice to go, such as a spot instance; the cluster is asked now and then."""

    EVERY_S = 2.0

    def __init__(self) -> None:
        self._asked, self._nodes = -math.inf, set[str]()

    def __call__(self, node: str) -> bool:
        from ray.exceptions import RayError

        if time.monotonic() - self._asked > self.EVERY_S:
            self._asked = time.monotonic()
            try:
                self._nodes = self.ask()
            except RayError as error:  # a head that is away for a moment: what it said last holds
                log.warning("the cluster does not say which nodes are to go: %s", error)
        return node in self._nodes

    def ask(self) -> set[str]:
        """The ids of those that are to go. RayError: the cluster does not answer."""
        import ray
        from ray._raylet import GcsClient  # type: ignore[attr-defined]  # Ray has no public way to ask

        return set(GcsClient(address=ray.get_runtime_context().gcs_address).get_draining_nodes())


class Attempts:
    """A worker's side of the ledger, and the watch over its hanging. Without a ledger, which is outside Ray, every
    attempt is the first and nothing is watched.

    The watch is a timer of faulthandler: it needs neither the interpreter nor its lock, so that it ends a process which
    hangs in native code too, and it leaves the stacks of all threads in the worker's log. It is wound up again by every
    image that is taken in, and while a store is asked again.
    """

    def __init__(self, ledger: Any = None, hang_timeout_s: float | None = None, held: int = 1) -> None:
        """`held`: photos that the worker may have under way at a time."""
        self._ledger = ledger
        self._key: Key = ""
        self._watching, self._lock = False, threading.Lock()
        self._watch = HangLimit(hang_timeout_s, held)
        self.node = ""  # Ray's id
        self.current = Attempt()
        if ledger is not None:
            retries.on_pause(self._alive)

    @contextlib.contextmanager
    def attempt(self, shard: int | None = None) -> Iterator[Attempt]:
        """An attempt at a shard, or at starting up, for the time of the block; an exception ends it as well."""
        if self._ledger is None:
            yield self.current
            return
        import ray

        context = ray.get_runtime_context()
        self.node = context.get_node_id()
        self._key = context.get_actor_id() if shard is None else shard
        self.current = self._tell("begin", self.node)
        if self.current.leave:
            os._exit(0)  # Ray starts the worker on another node and gives it the same shard
        try:
            with self._watched():
                yield self.current
        finally:
            self._ledger.end.remote(self._key)  # nothing hangs on when it arrives
            self.current = Attempt()

    def seconds(self) -> Iterator[int]:
        """Shards that are late elsewhere, for a worker that has none of its own; waits for them."""
        while True:
            told: Second = self._ask("second")
            if told.shard is not None:
                with self._watched():
                    yield told.shard
            elif told.later:
                time.sleep(POLL_S)
            else:
                return

    def is_done(self, shard: int) -> bool:
        """Whether another worker has written the part of this shard meanwhile."""
        return self._ledger is not None and bool(self._ask("is_done", shard))

    def done(self, shard: int) -> None:
        """This worker has."""
        if self._ledger is not None:
            self._ledger.done.remote(shard)

    def touch(self, image_id: str | None) -> None:
        """Something moves: the next image, or None after the last."""
        if self.current.one_by_one:
            self._tell("touch", image_id)
        self._watch.count()
        self._alive()

    def _tell(self, method: str, *arguments: Any) -> Any:
        return self._ask(method, self._key, *arguments)

    def _ask(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self._ledger, method).remote(*arguments))

    @contextlib.contextmanager
    def _watched(self) -> Iterator[None]:
        self._watching = True
        self._watch.begin()
        self._alive()
        try:
            yield
        finally:
            with self._lock:  # no thread that still waits for a store winds it up again
                self._watching = False
                faulthandler.cancel_dump_traceback_later()
            self._watch.end()

    def _alive(self) -> None:
        limit_s = self._watch.limit_s(one_by_one=self.current.one_by_one)
        with self._lock:
            if self._watching and limit_s is not None:
                faulthandler.dump_traceback_later(limit_s, exit=True)


class HangLimit:
    """How long a worker may be silent: ten times what so many photos as it holds at a time took so far, at least two
    minutes and at most `most_s`, which also holds before that is known; None: for ever."""

    def __init__(self, most_s: float | None, held: int, clock: Callable[[], float] = time.monotonic) -> None:
        self._most_s, self._held, self._clock = most_s, held, clock
        self._photos, self._spent_s, self._last = 0, 0.0, 0.0

    def begin(self) -> None:
        """Time before this was not a photo's."""
        self._last = self._clock()

    def count(self) -> None:
        """A photo is taken in."""
        self.end()
        self._photos += 1

    def end(self) -> None:
        """Time up to now was the photos'."""
        now = self._clock()
        self._spent_s, self._last = self._spent_s + now - self._last, now

    def limit_s(self, *, one_by_one: bool) -> float | None:
        """In seconds. `one_by_one`: a photo may yet be found to be at fault, and gets the longest."""
        if self._most_s is None or one_by_one or self._photos < max(KNOWN, 2 * self._held):
            return self._most_s
        return min(self._most_s, max(HANGS_S, HANGS * self._held * self._spent_s / self._photos))
