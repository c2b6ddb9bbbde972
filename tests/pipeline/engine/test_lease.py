"""The lease on a run folder: exclusive, renewed, given back, and taken over from the dead."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from pipeline.engine.lease import LOST, run_lease
from pipeline.errors import LeaseHeld


def test_a_second_holder_is_told_who_has_it(tmp_path: Path) -> None:
    with run_lease(str(tmp_path)):
        with (
            pytest.raises(LeaseHeld, match=r"in use by process \d+ on .* choose another run.uri"),
            run_lease(str(tmp_path)),
        ):
            pass
        assert (tmp_path / "lease.json").exists()
    assert not (tmp_path / "lease.json").exists()
    with run_lease(str(tmp_path)):
        pass


def test_it_is_given_back_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), run_lease(str(tmp_path)):
        raise ZeroDivisionError
    assert not (tmp_path / "lease.json").exists()


def test_it_is_renewed_while_held(tmp_path: Path) -> None:
    with run_lease(str(tmp_path), lifetime_s=0.4):
        first = json.loads((tmp_path / "lease.json").read_text())["expires"]
        time.sleep(0.6)
        assert json.loads((tmp_path / "lease.json").read_text())["expires"] > first
        with pytest.raises(LeaseHeld), run_lease(str(tmp_path)):
            pass


def test_a_dead_process_of_this_machine_loses_it_at_once(tmp_path: Path) -> None:
    code = "import os, sys\nfrom pipeline.engine.lease import LOST, run_lease\nwith run_lease(sys.argv[1]): os._exit(9)"
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 9
    assert (tmp_path / "lease.json").exists()
    with run_lease(str(tmp_path)):
        pass


@pytest.mark.parametrize(
    "content",
    [
        b'{"id": "x", "host": "elsewhere", "pid": 1, "process_started": 0, "expires": 5}',
        b'{"id": "x", "ho',
        b"[1]",
        b'{"id": 1}',
        b'{"id": "x", "host": "here", "pid": "one", "process_started": 0, "expires": "never"}',
    ],
    ids=["expired on another machine", "half written", "no lease", "half a lease", "of other types"],
)
def test_a_stale_lease_is_taken_over(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "lease.json").write_bytes(content)
    with run_lease(str(tmp_path)):
        assert json.loads((tmp_path / "lease.json").read_text())["id"] != "x"


@pytest.mark.parametrize("on_ctrl_c", [signal.default_int_handler, signal.SIG_IGN], ids=["foreground", "background"])
def test_a_run_that_lost_its_lease_is_interrupted_and_leaves_it_to_the_other(tmp_path: Path, on_ctrl_c: Any) -> None:
    signal.signal(signal.SIGINT, on_ctrl_c)
    before = signal.getsignal(LOST)
    other = {"id": "x", "host": "elsewhere", "pid": 1, "process_started": 0, "expires": time.time() + 60}
    with pytest.raises(LeaseHeld, match="another run took the folder"), run_lease(str(tmp_path), lifetime_s=0.4):
        (tmp_path / "lease.json").write_text(json.dumps(other))
        time.sleep(10)
    assert json.loads((tmp_path / "lease.json").read_text()) == other
    assert signal.getsignal(LOST) == before
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_a_lost_lease_is_told_of_in_another_thread_when_the_block_ends(tmp_path: Path) -> None:
    other = {"id": "x", "host": "elsewhere", "pid": 1, "process_started": 0, "expires": time.time() + 60}

    def hold() -> None:
        with run_lease(str(tmp_path), lifetime_s=0.4):
            (tmp_path / "lease.json").write_text(json.dumps(other))
            time.sleep(0.5)

    with ThreadPoolExecutor(1) as pool, pytest.raises(LeaseHeld, match="another run took the folder"):
        pool.submit(hold).result()


def test_a_holder_in_another_container_of_the_same_name_is_not_taken_for_dead(tmp_path: Path) -> None:
    """Its process id means nothing here."""
    with run_lease(str(tmp_path)):
        held = json.loads((tmp_path / "lease.json").read_text())
    held |= {"pid": 2**22 + 1, "expires": time.time() + 60}  # no process has that id
    (tmp_path / "lease.json").write_text(json.dumps(held))
    with run_lease(str(tmp_path)):
        pass
    (tmp_path / "lease.json").write_text(json.dumps(held | {"processes": "another"}))
    with pytest.raises(LeaseHeld, match="in use by process 4194305"), run_lease(str(tmp_path)):
        pass


def test_a_living_lease_of_another_machine_is_respected(tmp_path: Path) -> None:
    held = {"id": "x", "host": "elsewhere", "pid": 1, "process_started": 0, "expires": time.time() + 60}
    (tmp_path / "lease.json").write_text(json.dumps(held))
    with pytest.raises(LeaseHeld, match="process 1 on elsewhere"), run_lease(str(tmp_path)):
        pass
