"""A bucket's listing in pieces, against one that is listed from its first key to its last."""

from __future__ import annotations

import itertools
import random
import threading
import time
from typing import Any

import pytest

from pipeline.store import s3_walk
from pipeline.store.s3 import list_keys

PAGE = 10  # keys an answer


class Bucket:
    """Answers `list_objects_v2` as S3 does, ten entries a page, and counts; `wait_s` passes before each answer."""

    def __init__(self, keys: list[str], wait_s: float = 0.0, broken: str = "") -> None:
        self.keys = sorted(keys, key=str.encode)
        self.wait_s, self.broken = wait_s, broken
        self.asked = self.most_at_once = self._now = 0
        self._lock = threading.Lock()

    def __call__(self, method: str, **request: Any) -> dict[str, Any]:
        assert method == "list_objects_v2"
        with self._lock:
            self.asked += 1
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
        time.sleep(self.wait_s)
        with self._lock:
            self._now -= 1
        return self._answer(**request)

    def _answer(
        self, Bucket: str, Prefix: str, Delimiter: str = "", StartAfter: str = "", ContinuationToken: str = ""
    ) -> dict[str, Any]:
        after = ContinuationToken or StartAfter
        entries: dict[str, bool] = {}
        for key in self.keys:
            if key.startswith(Prefix):
                name, slash, _ = key.removeprefix(Prefix).partition("/")
                is_folder = bool(Delimiter and slash)
                entry = f"{Prefix}{name}/" if is_folder else key
                if key.encode() > after.encode() and entry.encode() > ContinuationToken.encode():
                    entries[entry] = is_folder
        page = list(itertools.islice(entries, PAGE))
        if self.broken in page:
            raise PermissionError(self.broken)
        answer = {
            "Contents": [{"Key": key, "Size": len(key)} for key in page if not entries[key]],
            "CommonPrefixes": [{"Prefix": key} for key in page if entries[key]],
            "IsTruncated": len(entries) > PAGE,
        }
        return answer | ({"NextContinuationToken": page[-1]} if len(entries) > PAGE else {})


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"HEAD": PAGE, "PAGE": PAGE, "AT_A_TIME": 4, "FOLDERS": 2}.items():
        monkeypatch.setattr(s3_walk, name, value)


def classes(count: int, each: int, above: str = "") -> list[str]:
    return [f"{above}class{c:03d}/{i:03d}.jpg" for c in range(count) for i in range(each)]


LAYOUTS = {
    "nothing": [],
    "flat": [f"{i:04d}.jpg" for i in range(95)],
    "a page": [f"{i:04d}.jpg" for i in range(PAGE)],
    "classes": classes(30, 7),
    "more classes than are looked at": classes(77, 3),
    "one folder above": classes(12, 11, "images/train/"),
    "few folders above": [key for split in "abc" for key in classes(9, 8, f"{split}/")],
    "one large folder": [*classes(1, 90), "z.jpg"],
    "files between folders": [*classes(20, 3), *(f"class{i:03d}.txt" for i in range(25)), *(f"a{i}" for i in range(9))],
    "other bytes": [f"é{i}/ü{j}" for i in range(9) for j in range(9)]
    + [f"~{i}/x" for i in range(9)]
    + ["\U0001f600/x"],
    "one photo a folder": classes(150, 1),
    "markers": [*classes(12, 5), *(f"class{c:03d}/" for c in range(12))],
}


@pytest.mark.parametrize("prefix", ["", "data/"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_all_keys_come_once_and_in_order(layout: str, prefix: str) -> None:
    bucket = Bucket([*(prefix + key for key in LAYOUTS[layout]), *(["before", "dataz/x"] if prefix else [])])
    wanted = list(list_keys(bucket, "bucket", prefix, below=True))
    flat = bucket.asked
    assert list(s3_walk.walk(bucket, "bucket", prefix)) == wanted
    assert len(wanted) == sum(not key.endswith("/") for key in LAYOUTS[layout])
    assert bucket.asked - flat <= 3 * flat + 12


@pytest.mark.parametrize("seed", range(20))
def test_random_trees(seed: int) -> None:
    rng = random.Random(seed)
    keys = {"/".join(rng.choice("ab0~é-.") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(1, 400))}
    bucket = Bucket(sorted(keys))
    wanted = [found.key for found in list_keys(bucket, "bucket", "", below=True)]
    assert [found.key for found in s3_walk.walk(bucket, "bucket", "")] == wanted


@pytest.mark.parametrize("seed", range(20))
def test_the_pieces_between_cuts_are_the_whole(seed: int) -> None:
    rng = random.Random(seed)
    keys = {"/".join(rng.choice("ab0~é-.") for _ in range(rng.randint(1, 5))) for _ in range(rng.randint(1, 400))}
    bucket = Bucket(sorted(keys))
    wanted = list(list_keys(bucket, "bucket", "", below=True))
    last = wanted[len(wanted) // 3].key
    folders = s3_walk.folders_behind(bucket, "bucket", "", last)
    assert folders == sorted(folders, key=str.encode)
    cuts = sorted(rng.sample(folders, min(5, len(folders))), key=str.encode)
    found = [one for one in wanted if one.key.encode() <= last.encode()]
    for after, until in zip([last, *cuts], [*cuts, None], strict=True):
        found += s3_walk.walk(bucket, "bucket", "", after=after, until=until, head=25)
    assert found == wanted


def test_pieces_are_listed_at_the_same_time_and_a_small_bucket_is_asked_once() -> None:
    large, small = Bucket(classes(40, 20), wait_s=0.01), Bucket(["a.jpg", "b/c.jpg"])
    assert len(list(s3_walk.walk(large, "bucket", ""))) == 800
    assert large.most_at_once >= 3
    assert len(list(s3_walk.walk(small, "bucket", ""))) == 2
    assert small.asked == 1


def test_who_stops_early_leaves_no_thread_behind() -> None:
    before = threading.active_count()
    keys = s3_walk.walk(Bucket(classes(40, 20)), "bucket", "")
    assert len(list(itertools.islice(keys, 30))) == 30
    keys.close()
    assert threading.active_count() == before


def test_a_failure_is_raised_where_its_keys_would_have_come() -> None:
    keys = s3_walk.walk(Bucket(classes(40, 20), broken="class030/005.jpg"), "bucket", "")
    found = []
    with pytest.raises(PermissionError, match=r"class030/005\.jpg"):
        found.extend(keys)
