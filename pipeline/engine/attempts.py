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
"""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

Key = int | str  # a shard, or the id of an actor that starts


@dataclass(frozen=True, slots=True)
class Attempt:
    """What a worker is told when it begins."""

    number: int = 1  # of all that were begun, deaths of nodes included
    one_by_one: bool = False  # an earlier attempt killed its worker: find out which image does
    crashed: frozenset[str] = frozenset()  # images found out so, which are not to be touched
    given_up: str | None = None  # why it is not tried again


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
    """The attempts at the shards of a stage. `limit` is `workers.attempts`; `node_lives` tells of a node's id."""

    def __init__(self, limit: int, node_lives: Callable[[str], bool]) -> None:
        self._limit, self._node_lives = limit, node_lives
        self._under_way: dict[Key, _Work] = {}

    def begin(self, key: Key, node: str) -> Attempt:
        """An attempt begins on a node. One that is still open has killed its worker, or went down with its node."""
        known = self._under_way.setdefault(key, _Work())
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
        self._under_way.pop(key, None)

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


def start_ledger(limit: int) -> Any:
    """The handle of a ledger on the driver's node, which lives as long as the handle."""
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=True)
    actor = ray.remote(num_cpus=0, max_restarts=-1, max_task_retries=-1, scheduling_strategy=here)(Ledger)
    return actor.remote(limit, _is_alive)


def _is_alive(node: str) -> bool:
    import ray

    return any(entry["NodeID"] == node and entry["Alive"] for entry in ray.nodes())


class Attempts:
    """A worker's side of the ledger, and the watch over its hanging. Without a ledger, which is outside Ray, every
    attempt is the first and nothing is watched.

    The watch is a timer of faulthandler: it needs neither the interpreter nor its lock, so that it ends a process which
    hangs in native code too, and it leaves the stacks of all threads in the worker's log.
    """

    def __init__(self, ledger: Any = None, hang_timeout_s: float | None = None) -> None:
        self._ledger = ledger
        self._key: Key = ""
        self.hang_timeout_s = hang_timeout_s
        self.node = ""  # Ray's id
        self.current = Attempt()

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
        self._rearm()
        try:
            yield self.current
        finally:
            faulthandler.cancel_dump_traceback_later()
            self._ledger.end.remote(self._key)  # nothing hangs on when it arrives
            self.current = Attempt()

    def touch(self, image_id: str | None) -> None:
        """Something moves: the next image, or None after the last."""
        if self.current.one_by_one:
            self._tell("touch", image_id)
        if self._ledger is not None:
            self._rearm()

    def _tell(self, method: str, *arguments: Any) -> Any:
        import ray

        return ray.get(getattr(self._ledger, method).remote(self._key, *arguments))

    def _rearm(self) -> None:
        if self.hang_timeout_s is not None:
            faulthandler.dump_traceback_later(self.hang_timeout_s, exit=True)
