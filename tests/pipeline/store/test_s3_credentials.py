"""Who asks a store: credentials, profiles, public buckets, and the stores of other packages."""

from __future__ import annotations

import pickle
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow.parquet as pq
import pytest

from pipeline.predict.photos import find_photos
from pipeline.sources.fetch import Fetcher
from pipeline.sources.index import build_index, check_source
from pipeline.store import places, storage
from tests.conftest import KEYS, forget_filesystems
from tests.fault_proxy import (
    EXPIRED_TOKEN,
    FaultProxy,
    Rule,
)
from tests.pipeline.sources.image_sources import parquet, put, tar


def test_credentials_that_expire_are_read_anew(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = tmp_path / "credentials"
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(keys))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    forget_filesystems()
    write_profile(keys, "first")
    put(s3_bucket, {"a.jpg": b"photo", "x.parquet": parquet({"image": [b"y" * 9000] * 9})})
    with storage.open_input(f"{s3_bucket}/x.parquet", block_size=0) as stream:
        write_profile(keys, "second")
        proxy.forget()
        proxy.plan([Rule(EXPIRED_TOKEN)])
        assert storage.read_bytes(f"{s3_bucket}/a.jpg") == b"photo"
        assert pq.read_table(stream).num_rows == 9  # opened before, read with what is valid now
    assert [key_of(request.headers) for request in proxy.requests[:3]] == ["first", "second", "second"]

    proxy.plan([Rule(EXPIRED_TOKEN)])
    forget_filesystems()
    assert storage.exists(f"{s3_bucket}/a.jpg")  # the very first request of a process may meet it too

    proxy.forget()
    proxy.plan([Rule(EXPIRED_TOKEN, times=None)])
    with pytest.raises(PermissionError, match="ExpiredToken"):
        storage.read_bytes(f"{s3_bucket}/a.jpg")
    assert proxy.count() == 2


def test_a_public_bucket_is_read_unsigned_beside_a_signed_run_folder(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path
) -> None:
    put(s3_bucket, {"photos/x.tar": tar([("a.jpg", b"a" * 600)]), "photos/y.parquet": parquet({"image": [b"b"]})})
    publish(s3_bucket, "photos/x.tar", "photos/y.parquet")
    for kind, image in (("tar", b"a" * 600), ("parquet", b"b")):
        proxy.forget()
        folder = f"{s3_bucket}/run/index-{kind}"
        check_source(f"{s3_bucket}/photos", kind, anonymous=True)
        index = build_index(folder, f"{s3_bucket}/photos", kind, anonymous=True)
        (record,) = pickle.loads(pickle.dumps(index)).records(0)
        assert index.fetcher().fetch(record) == image
        assert proxy.count("GET", "photos/") > 2
        for request in proxy.requests:
            of_source = "photos" in request.place
            assert ("authorization" in request.headers) is not of_source, request.place


def test_photos_to_predict_in_a_public_bucket_are_read_without_credentials(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_bucket, {"a/1.jpg": b"one", "b/x.tar": tar([("2.jpg", b"two")])})
    publish(s3_bucket, "a/1.jpg", "b/x.tar")
    without_keys(monkeypatch, tmp_path)
    proxy.forget()
    inputs = [f"{s3_bucket}/a/*.jpg", f"{s3_bucket}/a/1.jpg", f"{s3_bucket}/b"]
    found = find_photos(inputs, output=str(tmp_path), anonymous=True)
    fetcher = Fetcher(anonymous=True)
    assert [(record.image_id, fetcher.fetch(record)) for record in found] == [
        ("a/1.jpg", b"one"),
        ("b/x.tar/2.jpg", b"two"),
    ]
    assert proxy.requests and not any("authorization" in request.headers for request in proxy.requests)


def test_without_credentials_the_key_for_public_buckets_is_named(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(s3_bucket, {"a.jpg": b"photo"})
    publish(s3_bucket, "a.jpg")
    without_keys(monkeypatch, tmp_path)
    with pytest.raises(ValueError, match=r"source\.uri: cannot read s3://.*source\.anonymous: true"):
        check_source(s3_bucket)
    assert check_source(s3_bucket, anonymous=True).image_id == "a.jpg"


def test_a_profile_gives_keys_and_endpoint(
    proxy: FaultProxy, s3_bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_keys(monkeypatch, tmp_path)
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    config = tmp_path / "config"
    config.write_text(
        f"[profile lab]\nendpoint_url = {proxy.url}\nregion = eu-west-3\n"
        "aws_access_key_id = of-profile\naws_secret_access_key = secret\n"
    )
    monkeypatch.setenv("AWS_CONFIG_FILE", str(config))
    monkeypatch.setenv("AWS_PROFILE", "lab")
    storage.write_bytes(f"{s3_bucket}/a", b"1")
    (request,) = proxy.requests
    assert key_of(request.headers) == "of-profile"
    assert "/eu-west-3/s3/" in request.headers["authorization"]


@pytest.mark.parametrize(
    ("uri", "package"), [("gs://bucket/a", "gcsfs"), ("az://bucket/a", "adlfs"), ("abfs://bucket/a", "adlfs")]
)
def test_other_stores_name_the_package_they_need(uri: str, package: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, package, None)  # as if it were not installed
    forget_filesystems()
    with pytest.raises(ValueError, match=rf"{uri}: cannot open .*pip install {package}"):
        storage.read_bytes(uri)


def test_errors_of_other_stores_are_their_packages_own(monkeypatch: pytest.MonkeyPatch) -> None:
    class AzureError(Exception):
        pass

    monkeypatch.setattr(places, "_errors_of", places._errors_of.__wrapped__)
    monkeypatch.setitem(sys.modules, "azure.core.exceptions", SimpleNamespace(AzureError=AzureError))
    assert storage.store_errors("az://bucket/a") == (OSError, AzureError)
    monkeypatch.setitem(sys.modules, "azure.core.exceptions", None)  # not installed
    assert storage.store_errors("az://bucket/a") == (OSError,)
    assert storage.store_errors("/a") == (OSError,)


def test_keys_inside_a_url_are_refused_and_not_shown() -> None:
    with pytest.raises(ValueError, match=r"s3://\*\*\*@bucket/a: holds credentials; .*AWS_PROFILE"):
        storage.read_bytes("s3://key:secret@bucket/a")


def test_what_crosses_to_other_processes_holds_no_filesystem(s3_bucket: str) -> None:
    put(s3_bucket, {"photos/a.jpg": b"photo"})
    index = build_index(f"{s3_bucket}/index", f"{s3_bucket}/photos")
    index.fetcher().fetch(index.records(0)[0])
    content = pickle.dumps(index)
    assert index.folder.encode() in content
    for word in ("fsspec", "s3fs", "botocore", KEYS["AWS_SECRET_ACCESS_KEY"]):
        assert word.encode() not in content
    assert pickle.loads(content).records(0) == index.records(0)


def publish(bucket: str, *keys: str) -> None:
    """Let everybody read these objects."""
    fs, path = storage.filesystem(bucket)
    for key in keys:
        fs.call_s3("put_object_acl", Bucket=path, Key=key, ACL="public-read")


def write_profile(path: Path, key: str) -> None:
    path.write_text(f"[default]\naws_access_key_id = {key}\naws_secret_access_key = secret\n")


def without_keys(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    for name in KEYS:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(folder / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(folder / "none"))
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    forget_filesystems()


def key_of(headers: object) -> str:
    return headers["authorization"].split("Credential=")[1].split("/")[0]  # type: ignore[index]
