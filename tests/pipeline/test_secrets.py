"""A key that somebody wrote into a URL is refused by every command, and shown by none."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from pipeline import storage
from pipeline.cli import app

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
    ],
)
def test_signed_addresses(text: str, shown: str) -> None:
    assert storage.redact(text) == shown
