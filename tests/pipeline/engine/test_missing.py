"""Photos that a store refuses or does not find for a moment."""

from __future__ import annotations

import numpy as np
import pytest

from pipeline.engine.missing import HOPELESS, PAUSES_S, AskAgain
from pipeline.sources.fetch import Fetcher, load_photo
from pipeline.sources.scan import scan
from tests.fault_proxy import Answer, FaultProxy, Rule
from tests.pipeline.sources.image_sources import put, tar
from tests.workers.pictures import encode, photo
from workers.decode import DecodeLimits
from workers.images import LoadedImage
from workers.records import GONE, ImageRecord, Status

MISSING = LoadedImage("a.jpg", None, Status.MISSING, "403")
FOUND = LoadedImage("a.jpg", np.zeros((8, 8, 3), np.uint8))


def asked(record: ImageRecord, *answers: LoadedImage) -> tuple[LoadedImage, list[float]]:
    pauses: list[float] = []
    left = iter(answers)
    image = AskAgain(pauses.append)(lambda: next(left), record)
    assert not list(left)
    return image, pauses


def test_a_photo_of_a_store_is_asked_for_again_with_pauses_that_grow() -> None:
    record = ImageRecord("a.jpg", "s3://bucket/a.jpg", 0, 9)
    image, pauses = asked(record, MISSING, MISSING, FOUND)
    assert image is FOUND
    assert [most / 2 <= pause <= most for pause, most in zip(pauses, PAUSES_S, strict=False)] == [True, True]
    assert asked(record, *[MISSING] * 4)[0] is MISSING


@pytest.mark.parametrize("uri", ["/photos/a.jpg", "https://example.org/a.jpg"])
def test_what_is_known_at_once_is_not_asked_again(uri: str) -> None:
    assert asked(ImageRecord("a.jpg", uri, 0, 9), MISSING) == (MISSING, [])
    assert asked(ImageRecord("a.jpg", "s3://bucket/a.jpg", 0, 9, version=GONE), MISSING) == (MISSING, [])


def test_after_many_in_vain_no_photo_is_asked_for_again() -> None:
    ask, calls = AskAgain(lambda _: None), 0

    def load() -> LoadedImage:
        nonlocal calls
        calls += 1
        return MISSING

    for _ in range(HOPELESS + 5):
        ask(load, ImageRecord("a.jpg", "s3://bucket/a.jpg", 0, 9))
    assert calls == HOPELESS * (1 + len(PAUSES_S)) + 5


def test_a_range_of_an_object_that_was_just_read_is_not_missing(s3_bucket: str, proxy: FaultProxy) -> None:
    data = encode(photo(), "JPEG")
    put(s3_bucket, {"a.tar": tar([("0.jpg", data), ("1.jpg", data)])})
    fetcher, (first, second) = Fetcher(), list(scan(s3_bucket))
    assert load_photo(fetcher, first, DecodeLimits()).pixels is not None
    proxy.plan([Rule(Answer(403, "AccessDenied"), method="GET", key="a.tar", times=1)])
    with pytest.raises(PermissionError, match="other photos of this file were just read"):
        load_photo(fetcher, second, DecodeLimits())
    proxy.plan([Rule(Answer(403, "AccessDenied"), method="GET", key="a.tar", times=2)])
    pauses: list[float] = []
    image = AskAgain(pauses.append)(lambda: load_photo(fetcher, second, DecodeLimits()), second)
    assert image.pixels is not None and len(pauses) == 2
    proxy.plan([Rule(Answer(403, "AccessDenied"), method="GET", key="a.tar", times=None)])
    with pytest.raises(PermissionError, match="other photos of this file were just read"):
        AskAgain(pauses.append)(lambda: load_photo(fetcher, second, DecodeLimits()), second)
