"""A listing that is held, against the place itself."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.store import held, storage
from pipeline.store.held import Held, Piece
from tests.fault_proxy import FaultProxy


def classes(count: int, each: int) -> list[str]:
    return [f"class{c:02d}/{i:02d}.jpg" for c in range(count) for i in range(each)]


def fill(uri: str, keys: list[str]) -> None:
    for key in keys:
        storage.write_bytes(f"{uri}/{key}", key.encode())


def test_a_folder_is_told_as_it_was_when_it_was_first_listed(tmp_path: Path) -> None:
    fill(str(tmp_path), ["b/é.jpg", "a.png", "b/c/d.txt"])
    (tmp_path / os.fsdecode(b"b/\xff.jpg")).write_bytes(b"x")
    wanted = list(storage.walk(str(tmp_path)))
    assert len(wanted) == 4
    with Held() as listing:
        assert list(listing.walk(str(tmp_path))) == wanted
        (tmp_path / "a.png").unlink()
        assert list(listing.walk(str(tmp_path))) == wanted
        with pytest.raises(ValueError, match="not of /elsewhere"):
            next(listing.walk("/elsewhere"))


def test_a_place_that_is_not_there_is_none(tmp_path: Path) -> None:
    with Held() as listing, pytest.raises(FileNotFoundError, match="nowhere"):
        next(listing.walk(str(tmp_path / "nowhere")))


def test_nothing_is_left_on_the_disk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(str(tmp_path / "photos"), ["a.png"])
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    with Held() as listing:
        assert len(list(listing.walk(str(tmp_path / "photos")))) == 1
        assert any((tmp_path / "temporary").iterdir())
    assert not any((tmp_path / "temporary").iterdir())


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"LARGE": 10, "ROWS": 7, "PIECES": 1}.items():
        monkeypatch.setattr(held, name, value)


@pytest.mark.usefixtures("small")
@pytest.mark.parametrize(
    "keys", [classes(6, 5), [f"{i:02d}.jpg" for i in range(25)], classes(1, 10)], ids=["folders", "flat", "just large"]
)
@pytest.mark.parametrize("processes", [1, 2])
def test_a_large_bucket_is_listed_in_pieces_and_only_once(
    s3_bucket: str, proxy: FaultProxy, keys: list[str], processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = f"{s3_bucket}/some photos"
    fill(uri, keys)
    wanted = list(storage.walk(uri))
    apart = []
    list_apart = held._list_apart
    monkeypatch.setattr(held, "_list_apart", lambda *task: (apart.append(task[2]), list_apart(*task)))
    with Held(processes) as listing:
        assert list(listing.walk(uri)) == wanted
        asked = proxy.requests
        assert list(listing.walk(uri)) == wanted
        assert proxy.requests == asked
    assert len(wanted) == len(keys)
    assert [len(pieces) for pieces in apart] == [1 + processes if len(keys) == 30 else 1]


def pieces(folder: Path) -> list[Piece]:
    return [Piece("a", "b", str(folder / "0.arrow")), Piece("b", None, str(folder / "1.arrow"))]


@pytest.mark.parametrize("processes", [1, 2])
def test_what_a_process_fails_with_is_raised_here(s3_bucket: str, tmp_path: Path, processes: int) -> None:
    with pytest.raises(FileNotFoundError):
        held._list_apart(f"{s3_bucket}-that-is-not-there", False, pieces(tmp_path), processes)


def test_a_process_that_dies_is_told_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match=r"listed s3://bucket ended with 1"):
        held._list_apart("s3://bucket", False, pieces(tmp_path), 2)


def test_a_disk_that_is_full_is_not_taken_for_the_source(tmp_path: Path) -> None:
    fill(str(tmp_path), ["a.jpg"])
    with pytest.raises(ConfigError, match=r"cannot be kept in /dev: .*set TMPDIR"):
        held._write(Path("/dev/full"), storage.walk(str(tmp_path)))


def test_an_error_that_cannot_travel_is_told_in_words() -> None:
    class Odd(Exception):
        def __init__(self, code: int, message: str) -> None:
            super().__init__(message)

    found = pickle.loads(held._pickled(Odd(7, "no")))
    assert isinstance(found, OSError)
    assert str(found) == "Odd: no"
