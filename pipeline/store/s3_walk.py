"""All keys below a prefix of a bucket, in order, however many: a request answers with 1000 keys and takes some tenths
of a second, so that one after the other ten million would take the better part of an hour.

The folders that a listing by folders finds are cuts of the whole, between which it is listed side by side.
"""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from queue import Full, Queue
from typing import Any

from pipeline.store.s3 import Ask, Listed, list_keys

HEAD = 1000  # keys that are listed before it is worth a look for folders
AT_A_TIME = 16  # pieces that are listed
CUTS = 64  # of a piece of the listing, at most
FOLDERS = 10  # pages of them that are looked at for the cuts
DEPTH = 4  # levels of folders, where the upper ones have few
AHEAD = 4  # pages of a piece that wait to be taken
PAGE = 1000  # keys


def walk(ask: Ask, bucket: str, prefix: str) -> Iterator[Listed]:
    """Every object below `prefix`, as `list_keys` gives them. Memory: some pages of each piece under way."""
    one_by_one, most = list_keys(ask, bucket, prefix, below=True), HEAD
    while True:
        count, last = 0, ""
        for found in itertools.islice(one_by_one, most):
            yield found
            count, last = count + 1, found.key
        if count < most:
            return
        cuts = _cuts(ask, bucket, prefix, last)
        most = HEAD if cuts else 2 * most  # where there are no folders, they are looked for less and less
        if cuts:
            yield from _side_by_side(ask, bucket, prefix, [last, *cuts])
            one_by_one = list_keys(ask, bucket, prefix, below=True, after=cuts[-1])


def _cuts(ask: Ask, bucket: str, prefix: str, after: str) -> list[str]:
    """Folders behind the key `after`, evenly spaced: those of the first level that has enough."""
    level, found = [prefix], list[str]()
    for _ in range(DEPTH):
        below = [folder for above in level for folder in _folders(ask, bucket, above, after)]
        if not below:
            break
        level, found = below, below
        if len(below) >= AT_A_TIME:
            break
    behind = [folder for folder in found if folder.encode() > after.encode()]
    count = min(CUTS, len(behind))
    return [behind[(i + 1) * len(behind) // count - 1] for i in range(count)]


def _folders(ask: Ask, bucket: str, prefix: str, after: str) -> Iterator[str]:
    """Those directly below `prefix`, in order, from that on which holds the key `after`; some thousand at most."""
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
        request["ContinuationToken"] = page["NextContinuationToken"]


def _side_by_side(ask: Ask, bucket: str, prefix: str, bounds: Sequence[str]) -> Iterator[Listed]:
    """The keys behind the first of the bounds and up to the last, in order."""
    stop = threading.Event()
    queues: list[Queue[Any]] = [Queue(AHEAD) for _ in bounds[1:]]

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
        try:
            for piece in zip(bounds, bounds[1:], queues, strict=False):
                pool.submit(fill, *piece)
            for queue in queues:
                yield from _taken(queue.get)
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
