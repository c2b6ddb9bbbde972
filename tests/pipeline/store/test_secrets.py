"""A key that somebody wrote into a URL is refused by every command, and shown by none."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from typer.testing import CliRunner

from pipeline.command.cli import app
from pipeline.config.labels import SourceConfig
from pipeline.store import places, storage

SECRET = "hush/hush"
URL = f"s3://AKIAKEY:{SECRET}@bucket/x"
REFINED = ["semantics.method=datus", "semantics.refine=deeplabv3"]


@pytest.mark.parametrize(
    "command",
    [
        ["run", f"{URL}.yaml"],
        ["config", "show", f"{URL}.yaml"],
        *(["run", "CONFIG", "--set", f"{key}={URL}"] for key in ("source.uri", "run.uri", "train.init", "no.such")),
        *(["run", "CONFIG", "--set", f"{key}={URL}"] for key in ("maskcut.tau", "maskcut", "backbone.weights")),
        ["run", "CONFIG", *(a for s in [*REFINED, f"semantics.refine_backbone={URL}"] for a in ("--set", s))],
        ["run", "CONFIG", "--set", URL],
        ["run", "CONFIG", "--stages", URL],
        ["report", URL],
        ["export", "coco", URL, "--output", "OUT"],
        ["evaluate", "panoptic", URL, URL],
        ["evaluate", "semantic", URL, "OUT"],
        ["evaluate", "masks", URL, URL],
        ["predict", "--weights", "OUT", "--input", URL, "--output", "OUT"],
        ["predict", "--weights", URL, "--input", "PHOTO", "--output", "OUT"],
    ],
    ids=lambda command: " ".join(command).replace(URL, "URL"),
)
def test_no_command_takes_or_shows_a_secret(command: list[str], tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        f"source: {{uri: {tmp_path}}}\nrun: {{uri: {tmp_path}/out}}\nbackbone: {{name: patch-dct}}\n"
    )
    (tmp_path / "a.jpg").write_bytes(b"photo")
    places = {"CONFIG": "c.yaml", "OUT": "out", "PHOTO": "a.jpg"}
    result = CliRunner().invoke(app, [str(tmp_path / places[a]) if a in places else a for a in command])
    assert result.exit_code == 2, result.output
    assert SECRET not in result.output
    assert "AKIAKEY" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://host/a?X-Goog-Signature=abc&x=1", "https://host/a?X-Goog-Signature=***&x=1"),
        ("az://c/a?sv=2024&sig=ab%2Fc", "az://c/a?sv=2024&sig=***"),
        (
            "https://h/a?AWSAccessKeyId=AK&Signature=abc&Expires=1",
            "https://h/a?AWSAccessKeyId=***&Signature=***&Expires=1",
        ),
        ("s3://bucket/design=1&sig.jpg", "s3://bucket/design=1&sig.jpg"),
        ("https://h/a?token=abc&x=1 b", "https://h/a?token=***&x=1 b"),
        ("https://h/a?x=1&access_token=abc", "https://h/a?x=1&access_token=***"),
        ("s3://bucket/token=1/a.jpg", "s3://bucket/token=1/a.jpg"),
        (
            "AccountName=n;AccountKey=ab/c+d==;EndpointSuffix=core",
            "AccountName=n;AccountKey=***;EndpointSuffix=core",
        ),
        ("SharedAccessSignature=sv=2024&sig=ab%2Fc;X=1", "SharedAccessSignature=***;X=1"),
    ],
)
def test_signed_addresses(text: str, shown: str) -> None:
    assert storage.redact(text) == shown


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("s3://AKIA:p@ssword@bucket/x", "s3://***@bucket/x"),
        ("s3://AKIA:p@ss@word@bucket/a@b.jpg", "s3://***@bucket/a@b.jpg"),
        ("s3://AKIA:p/a@ss@bucket/x and me@host", "s3://***@bucket/x and me@host"),
        ("redis://:hush@host", "redis://***@host"),
        ("https://to@ken@host/a@b", "https://***@host/a@b"),
        ("abfss://user:hush@account/x", "abfss://***@account/x"),
        ("xaz://name@host", "xaz://***@host"),
        ("http://host:9000/a.jpg", "http://host:9000/a.jpg"),
    ],
)
def test_user_and_password(text: str, shown: str) -> None:
    assert storage.redact(text) == shown


@pytest.mark.parametrize("scheme", ["abfss", "abfs", "az", "ABFSS"])
def test_the_container_of_an_azure_url_is_no_secret(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    url = f"{scheme}://container@account.dfs.core.windows.net/x"
    assert storage.redact(f"no folder {url}") == f"no folder {url}"
    assert SourceConfig(uri=url).uri == url
    monkeypatch.setattr(places, "_filesystem", lambda *_: MemoryFileSystem())
    assert storage.filesystem(url)[1].endswith("container@account.dfs.core.windows.net/x")


@pytest.mark.parametrize("piece", ["a", "://", "://a:", "://a", "@", "a@", ":", "X-Amz-", "://a:b@", "Signature"])
def test_a_long_text_is_searched_in_linear_time(piece: str) -> None:
    start = time.process_time()
    storage.redact(piece * (1_000_000 // len(piece)))
    assert time.process_time() - start < 3  # about 0.1; of quadratic time, minutes
