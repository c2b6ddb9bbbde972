"""An exclusive lease on a run folder, so that two drivers never write the same stages at the same time.

The lease is one small file made by an exclusive create (a conditional put on S3). Its holder renews it; one whose
holder is dead on this machine, or that was not renewed for its lifetime, is taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psutil

from pipeline import storage
from pipeline.errors import LeaseHeld

LIFETIME_S = 120.0


@contextmanager
def run_lease(run_uri: str, *, lifetime_s: float = LIFETIME_S) -> Iterator[None]:
    """Hold the run folder for the time of the block. LeaseHeld when a living run has it."""
    uri = storage.join(run_uri, "lease.json")
    owner = _owner()
    _acquire(uri, owner, lifetime_s)
    stop = threading.Event()
    renewal = threading.Thread(target=_renew, args=(uri, owner, lifetime_s, stop), daemon=True, name="lease")
    renewal.start()
    try:
        yield
    finally:
        stop.set()
        renewal.join()
        if (_read(uri) or {}).get("id") == owner["id"]:
            storage.remove(uri)


def _owner() -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "acquired": time.time(),
    }


def _acquire(uri: str, owner: dict[str, Any], lifetime_s: float) -> None:
    for _ in range(3):
        if storage.create_bytes(uri, _dump(owner, lifetime_s)):
            return
        held = _read(uri)
        if held is not None and not _stale(held):
            raise LeaseHeld(
                f"{storage.redact(uri)}: the run folder is in use by process {held.get('pid')} on {held.get('host')} "
                f"since {time.ctime(held.get('acquired', 0))}; wait for it, stop it, or choose another run.uri "
                f"(a lease that is not renewed expires after {lifetime_s:.0f} s)"
            )
        storage.remove(uri)
    raise LeaseHeld(f"{storage.redact(uri)}: other runs keep taking the run folder; try again when they have ended")


def _dump(owner: dict[str, Any], lifetime_s: float) -> bytes:
    return json.dumps(owner | {"expires": time.time() + lifetime_s}).encode()


def _read(uri: str) -> dict[str, Any] | None:
    try:
        return dict(json.loads(storage.read_bytes(uri)))
    except FileNotFoundError:
        return None
    except ValueError:  # half a file of a driver that died while it wrote
        return {"expires": 0}


def _stale(held: dict[str, Any]) -> bool:
    if time.time() > held.get("expires", 0):
        return True
    return held.get("host") == socket.gethostname() and not _lives(held)


def _lives(held: dict[str, Any]) -> bool:
    """Whether the holder's process still runs here; a reused process id has another start time."""
    try:
        return abs(psutil.Process(held["pid"]).create_time() - held["process_started"]) < 1
    except psutil.NoSuchProcess:
        return False


def _renew(uri: str, owner: dict[str, Any], lifetime_s: float, stop: threading.Event) -> None:
    while not stop.wait(lifetime_s / 4):
        with contextlib.suppress(*storage.store_errors(uri)):  # an outage: the next turn comes before the lease ends
            storage.write_bytes(uri, _dump(owner, lifetime_s))
