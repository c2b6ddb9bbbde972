"""An exclusive lease on a run folder, so that two drivers never write the same stages at the same time.

The lease is one small file made by an exclusive create (a conditional put on S3). Its holder renews it; one whose
holder is dead on this machine, or that was not renewed for its lifetime, is taken over.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from pipeline.engine.interrupts import interrupted_by
from pipeline.errors import LeaseHeld
from pipeline.store import storage
from pipeline.store.retries import BRIEF, ONCE, PATIENT, Retry

LIFETIME_S = 120.0
KEYS = {"id": str, "host": str, "pid": int, "process_started": int | float, "expires": int | float}
LOST = signal.SIGUSR1  # not SIGINT, which a shell lets its background jobs ignore


@contextmanager
def run_lease(run_uri: str, *, lifetime_s: float = LIFETIME_S) -> Iterator[None]:
    """Hold the run folder for the time of the block. LeaseHeld when a living run has it, or took it meanwhile because
    this one was suspended for longer than the lease lasts: the block is then interrupted (in the main thread)."""
    uri = storage.join(run_uri, "lease.json")
    owner = _owner()
    _acquire(uri, owner, lifetime_s)
    stop, lost = threading.Event(), threading.Event()
    wakes = threading.current_thread() is threading.main_thread()
    renewal = threading.Thread(
        target=_renew, args=(uri, owner, lifetime_s, stop, lost, wakes), daemon=True, name="lease"
    )
    try:
        with interrupted_by(LOST):
            renewal.start()
            try:
                yield
            finally:
                stop.set()
                renewal.join()
    except KeyboardInterrupt:
        if not lost.is_set():
            raise
    finally:
        _give_back(uri, owner)
    if lost.is_set():
        raise LeaseHeld(f"{storage.redact(uri)}: another run took the folder while this one was suspended")


def _owner() -> dict[str, Any]:
    return {
        "id": uuid.uuid4().hex,
        "host": socket.gethostname(),
        "processes": _processes(),
        "pid": os.getpid(),
        "process_started": psutil.Process().create_time(),
        "acquired": time.time(),
    }


def _acquire(uri: str, owner: dict[str, Any], lifetime_s: float) -> None:
    for _ in range(3):
        if storage.create_bytes(uri, _dump(owner, lifetime_s)) and _is_ours(uri, owner):
            return
        held = _read(uri)
        if held is not None and not _stale(held):
            raise LeaseHeld(
                f"{storage.redact(uri)}: the run folder is in use by process {held.get('pid')} on {held.get('host')} "
                f"since {time.ctime(held.get('acquired', 0))}; wait for it, stop it, or choose another run.uri "
                f"(a lease that is not renewed expires after {lifetime_s:.0f} s)"
            )
        _remove_stale(uri, held)
    raise LeaseHeld(f"{storage.redact(uri)}: other runs keep taking the run folder; try again when they have ended")


def _remove_stale(uri: str, held: dict[str, Any] | None) -> None:
    """Remove the stale lease that was read, and put back what another run may have created in its place."""
    taken = storage.take_away(uri)
    if taken is not None and _parse(taken).get("id") != (held or {}).get("id"):
        storage.create_bytes(uri, taken)


def _give_back(uri: str, owner: dict[str, Any]) -> None:
    """A store that is away keeps the lease until it expires, and does not hide how the run ended."""
    with contextlib.suppress(*storage.store_errors(uri)):
        if _is_ours(uri, owner, BRIEF):
            storage.remove(uri, retry=BRIEF)


def _is_ours(uri: str, owner: dict[str, Any], retry: Retry = PATIENT) -> bool:
    return (_read(uri, retry) or {}).get("id") == owner["id"]


def _dump(owner: dict[str, Any], lifetime_s: float) -> bytes:
    return json.dumps(owner | {"expires": time.time() + lifetime_s}).encode()


def _read(uri: str, retry: Retry = PATIENT) -> dict[str, Any] | None:
    """The lease that is there. One that cannot be read is looked at again: its creator may be writing it just now."""
    lease: dict[str, Any] = {}
    for pause in (0.0, 0.5):
        time.sleep(pause)
        try:
            lease = _parse(storage.read_bytes(uri, retry=retry))
        except FileNotFoundError:
            return None
        if lease:
            break
    return lease


def _parse(data: bytes) -> dict[str, Any]:
    """Empty for half a file of a driver that died while it wrote, and for what is no lease."""
    try:
        found = json.loads(data)
    except ValueError:
        return {}
    is_lease = isinstance(found, dict) and all(isinstance(found.get(name), kind) for name, kind in KEYS.items())
    return found if is_lease else {}


def _stale(held: dict[str, Any]) -> bool:
    if time.time() > held.get("expires", 0):
        return True
    return held.get("host") == socket.gethostname() and held.get("processes") == _processes() and not _lives(held)


def _processes() -> str:
    """What tells the processes seen here from those of another boot or container, whose host name may be the same."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot} {Path('/proc/self/ns/pid').readlink()}"
    except OSError:  # not Linux
        return ""


def _lives(held: dict[str, Any]) -> bool:
    """Whether the holder's process still runs here; a reused process id has another start time."""
    try:
        return abs(psutil.Process(held["pid"]).create_time() - held["process_started"]) < 1
    except (psutil.NoSuchProcess, ValueError, OverflowError):  # the latter of what is no process id
        return False


def _renew(
    uri: str, owner: dict[str, Any], lifetime_s: float, stop: threading.Event, lost: threading.Event, wakes: bool
) -> None:
    """Renew four times in a lifetime, and after a failure soon again. Each turn asks once: a request that were repeated
    for minutes could overwrite the lease of a run that took the folder in between."""
    wait = lifetime_s / 4
    while not stop.wait(wait):
        try:
            if not _is_ours(uri, owner, ONCE):
                lost.set()
                if wakes:
                    signal.pthread_kill(threading.main_thread().ident or 0, LOST)  # wakes it where it waits
                return
            storage.write_bytes(uri, _dump(owner, lifetime_s), retry=ONCE)
            wait = lifetime_s / 4
        except storage.store_errors(uri):
            wait = lifetime_s / 40
