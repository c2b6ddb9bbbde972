"""All keys below a prefix of a bucket, in order, however many: a request answers with 1000 keys and takes some tenths
of a second, so that one after the other ten million would take the better part of an hour.

The folders that a listing by folders finds are cuts of the whole, between which it is listed side by side.
"""

from __future__ import annotations

import collections
import itertools
import math
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Full, Queue
from typing import Any

from pipeline.store.s3 import Ask, Listed, list_keys

HEAD = 1000  # keys that are listed before it is worth a look for folders
AT_A_TIME = 16  # pieces that are listed
FOLDERS = 10  # pages of them that are looked at for the cuts
DEPTH = 4  # levels of folders, where the upper ones have few
AHEAD = 4  # pages of a piece that wait to be taken, and about as many as it has
PAGE = 1000  # keys


def walk(
    ask: Ask, bucket: str, prefix: str, *, after: str = "", until: str | None = None, head: int | None = None
) -> Iterator[Listed]:
    """Every object below `prefix`, as `list_keys` gives them; those behind the key `after`, up to the key `until`.
    `head`: keys that are listed before it is worth a look for folders; None: HEAD. Memory: some pages of each piece
    under way."""
    one_by_one, most = list_keys(ask, bucket, prefix, below=True, after=after, until=until), head or HEAD
    while True:
        seen, count, last = set[str](), 0, ""
        for found in itertools.islice(one_by_one, most):
            yield found
            count, last = count + 1, found.key
            seen.add(last.rpartition("/")[0])
        if count < most:
            return
        folders = folders_behind(ask, bucket, prefix, last, until=until)
        most = HEAD if folders else 2 * most  # where there are none, they are looked for less and less
        if folders:
            each = math.ceil(AHEAD * PAGE * len(seen) / count)  # of a piece, if all are as large as those before
            cuts = folders[each - 1 :: each] or folders[-1:]
            yield from _side_by_side(ask, bucket, prefix, [last, *cuts])
            one_by_one = list_keys(ask, bucket, prefix, below=True, after=cuts[-1], until=until)


def folders_behind(ask: Ask, bucket: str, prefix: str, after: str, *, until: str | None = None) -> list[str]:
    """Those behind the key `after` and before `until`, of the first level that has enough; some ten thousand at
    most."""
    level, found = [prefix], list[str]()
    for _ in range(DEPTH):
        below = [folder for above in level for folder in _folders(ask, bucket, above, after, until)]
        if not below:
            break
        level, found = below, below
        if len(below) >= AT_A_TIME:
            break
    return [f for f in found if f.encode() > after.encode() and (until is None or f.encode() < until.encode())]


def _folders(ask: Ask, bucket: str, prefix: str, after: str, until: str | None) -> Iterator[str]:
    """Those directly below `prefix`, in order, from that on which holds the key `after` and about to that which holds
    `until`; some thousand at most."""
    request = {"Bucket": bucket, "Prefix": prefix, "Delimiter": "/"}
    inside = after.removeprefix(prefix).partition("/") if after.startswith(prefix) else ("", "", "")
    if inside[1]:
        yield f"{prefix}{inside[0]}/"
    if after.encode() > prefix.encode():
        # Behind all keys of the folder of `after`: "0" comes after "/".
        request["StartAfter"] = f"{prefix}{inside[0]}0" if inside[1] else after
    for _ in range(FOLDERS):
        page = ask("list_objects_v2", **request)
        found = page.get("CommonPrefixes", ())
        yield from (entry["Prefix"] for entry in found)
        if not found or not page.get("IsTruncated"):
            return
        if until is not None and found[-1]["Prefix"].encode() > until.encode():
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _side_by_side(ask: Ask, bucket: str, prefix: str, bounds: Sequence[str]) -> Iterator[Listed]:
    """The keys behind the first of the bounds and up to the last, in order."""
    stop = threading.Event()
    pieces = iter(itertools.pairwise(bounds))

    def fill(after: str, until: str, queue: Queue[Any]) -> None:
        try:
            keys = list_keys(ask, bucket, prefix, below=True, after=after, until=until)
            while page := list(itertools.islice(keys, PAGE)):
                _put(queue, page, stop)
                if stop.is_set():
                    return
            _put(queue, None, stop)
        except Exception as error:  # raised where the keys are taken
            _put(queue, error, stop)

    with ThreadPoolExecutor(AT_A_TIME, thread_name_prefix="walk") as pool:

        def begin(count: int) -> Iterator[Queue[Any]]:
            for piece in itertools.islice(pieces, count):
                queue: Queue[Any] = Queue(AHEAD)
                pool.submit(fill, *piece, queue)
                yield queue

        try:
            under_way = collections.deque(begin(2 * AT_A_TIME))
            while under_way:
                yield from _taken(under_way.popleft().get)
                under_way.extend(begin(1))
        finally:
            stop.set()


def _taken(get: Callable[[], Any]) -> Iterator[Listed]:
    while (page := get()) is not None:
        if isinstance(page, Exception):
            raise page
        yield from page


def _put(queue: Queue[Any], item: Any, stop: threading.Event) -> None:
    while not stop.is_set():
        try:
            queue.put(item, timeout=0.2)
        except Full:
            continue
        return
