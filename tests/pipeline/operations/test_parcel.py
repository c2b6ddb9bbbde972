"""What goes along to a cluster: code and configurations, never secrets, data or what git does not track."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from pipeline.errors import ConfigError
from pipeline.operations.parcel import checkout, find_files, listing, pack

CODE = (
    "pipeline/__init__.py",
    "pipeline/secrets.py",
    "pipeline/service_account.py",
    "workers/a.py",
    "workers/token.py",
    "model/b.py",
    "configs/c.yaml",
    "configs/tokenizer.json",
    "pyproject.toml",
    "constraints.txt",
)
REFUSED = (
    ".env",
    ".env.prod",
    "configs/server.pem",
    "configs/.aws/config",
    "pipeline/credentials.json",
    "data/photo.jpg",
    "runs/x/part.parquet",
    "pipeline/id_rsa",
    ".docker/config.json",
    ".envrc",
    ".git-credentials",
    ".aws-credentials",
    ".npmrc",
    ".pypirc",
    "configs/accessKeys.csv",
    "configs/aws_credentials.csv",
    "configs/gcp-service-account.json",
    "configs/gcp_service_account.json",
    "configs/hf_token",
    "configs/prod.env",
    "configs/rootkey.csv",
    "configs/secret.yaml",
    "configs/secrets.yaml",
    "configs/terraform.tfvars",
    "configs/token.txt",
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    root = tmp_path / "checkout"
    for name in (*CODE, *REFUSED, "notes.txt"):
        write(root, name)
    return root


def write(root: Path, name: str, content: str = "x") -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_text(content)


def git(root: Path, *arguments: str) -> None:
    subprocess.run(["git", "-C", str(root), *arguments], check=True, capture_output=True)


def test_of_a_checkout_the_tracked_files_but_no_secrets_and_no_data(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "outside").write_text("secret")
    (folder / "link.txt").symlink_to(tmp_path / "outside")
    write(folder, "gone.py")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all", "--force")
    (folder / "gone.py").unlink()
    write(folder, "pipeline/new.py")
    write(folder, "untracked.txt")
    parcel = find_files(folder)
    assert parcel.tracked
    assert parcel.files == tuple(sorted([*CODE, "notes.txt"]))
    assert parcel.left_out == tuple(sorted([*REFUSED, "gone.py", "link.txt"]))
    assert parcel.untracked_code == ("pipeline/new.py",)


def test_a_link_to_what_is_refused_does_not_go(folder: Path) -> None:
    links = {"configs/x.txt": "../.env", "configs/y.jpg": "../data/photo.jpg", "configs/z.yaml": "c.yaml"}
    for name, target in links.items():
        (folder / name).symlink_to(target)
    (folder / "configs/loop").symlink_to("loop")
    git(folder, "init", "--quiet")
    git(folder, "add", "--all", "--force")
    parcel = find_files(folder)
    assert parcel.files == tuple(sorted([*CODE, "configs/z.yaml", "notes.txt"]))
    assert parcel.left_out == tuple(sorted([*REFUSED, "configs/loop", "configs/x.txt", "configs/y.jpg"]))


def test_of_this_checkout_every_tracked_file_goes() -> None:
    parcel = find_files(checkout())
    if not parcel.tracked:
        pytest.skip("no git checkout")
    assert [name for name in parcel.left_out if (parcel.root / name).exists()] == []
    assert "tests/pipeline/store/test_secrets.py" in parcel.files


def test_without_git_the_packages_the_configs_and_the_pins(folder: Path) -> None:
    write(folder, "pipeline/__pycache__/x.pyc")
    parcel = find_files(folder)
    assert not parcel.tracked
    assert "configs/secret.yaml" in parcel.left_out
    assert parcel.files == tuple(sorted(CODE))


def test_too_much_is_refused_and_the_largest_files_are_named(folder: Path) -> None:
    write(folder, "configs/big.bin", "x" * 3_000_000)
    with pytest.raises(ConfigError, match=r"take 2\.9 MiB.*at most 1\.0 MiB.*largest are configs/big\.bin \(2\.9 MiB"):
        find_files(folder, max_bytes=2**20)
    assert find_files(folder, max_bytes=3_000_100).bytes == 3_000_000 + len(CODE)


def test_the_same_files_give_the_same_zip(folder: Path, tmp_path: Path) -> None:
    parcel = find_files(folder)
    pack(parcel, tmp_path / "1.zip", {"submitted.yaml": b"run: here"})
    os.utime(folder / CODE[0], (0, 0))
    pack(parcel, tmp_path / "2.zip", {"submitted.yaml": b"run: here"})
    assert (tmp_path / "1.zip").read_bytes() == (tmp_path / "2.zip").read_bytes()
    with zipfile.ZipFile(tmp_path / "1.zip") as archive:
        assert sorted(archive.namelist()) == sorted([*CODE, "submitted.yaml"])
        assert archive.read("submitted.yaml") == b"run: here"


def test_what_is_sent_of_this_checkout_runs_by_itself(tmp_path: Path) -> None:
    pack(find_files(checkout()), tmp_path / "u2label.zip")
    with zipfile.ZipFile(tmp_path / "u2label.zip") as archive:
        archive.extractall(tmp_path / "job")
    code = "import pipeline.command.cli as cli, model, workers; print(cli.__file__, model.__file__, workers.__file__)"
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path / "job", env=environment, capture_output=True, text=True, check=True
    )
    assert all(file.startswith(str(tmp_path / "job")) for file in found.stdout.split())


def test_a_listing_of_many_names_is_short() -> None:
    assert listing(["a", "b"]) == "a, b"
    assert listing([str(i) for i in range(7)]) == "0, 1, 2, 3, 4 and 2 more"
