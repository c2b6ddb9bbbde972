"""How far a fit is, in a small file of its artifact folder: for `status`, and for the driver while Ray's workers train.

The file says what is seen, and decides nothing: a fit goes on from its checkpoint.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator, Mapping

from pipeline.store import storage

PROGRESS = "progress.json"
Entry = Mapping[str, float]  # `step`, counted from 1, and losses by name


def write_progress(out: str, steps: int, entry: Entry) -> None:
    """Put the entry of a step, of `steps`, into the artifact folder `out`. A store that is away costs nothing else."""
    with contextlib.suppress(*storage.store_errors(out)):
        storage.write_bytes(storage.join(out, PROGRESS), json.dumps({**entry, "steps": steps}).encode())


def read_progress(out: str) -> dict[str, float] | None:
    """The entry written last, and `steps`; None when there is none."""
    try:
        entry: dict[str, float] = json.loads(storage.read_bytes(storage.join(out, PROGRESS)))
    except FileNotFoundError:
        return None
    return entry


@contextlib.contextmanager
def watching(out: str, on_log: Callable[[Entry], None] | None, *, every_s: float = 5.0) -> Iterator[None]:
    """While the block runs, give `on_log` what other processes have written last, now and then, in a thread."""
    if on_log is None:
        yield
        return
    stop = threading.Event()
    watcher = threading.Thread(target=_watch, args=(out, on_log, every_s, stop), daemon=True, name="fit-progress")
    watcher.start()
    try:
        yield
    finally:
        stop.set()
        watcher.join()


def _watch(out: str, on_log: Callable[[Entry], None], every_s: float, stop: threading.Event) -> None:
    seen, stopped = None, False
    while not stopped:
        stopped = stop.wait(every_s)  # and one last look
        with contextlib.suppress(*storage.store_errors(out)):  # looked at again the next time
            entry = read_progress(out)
            if entry is not None and entry != seen:
                seen = entry
                on_log(entry)
