"""Whether what is installed is what is pinned."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from pipeline.operations import pins


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "pyproject.toml").write_text(
        '[project]\ndependencies = ["torch>=2", "Scikit_Network", "ray[data]>=2"]\n'
    )
    (tmp_path / "constraints.txt").write_text("# pins\ntorch==2.15.0\nscikit-network==0.33.5\nmoto==5.0\nray==2.60.0\n")
    return tmp_path


def installed(monkeypatch: pytest.MonkeyPatch, **versions: str) -> None:
    def version(name: str) -> str:
        if name not in versions:
            raise metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(metadata, "version", version)


def test_requirements_and_pins_are_matched_by_name(root: Path) -> None:
    assert pins.requirements(root) == {"torch": "torch>=2", "scikit-network": "Scikit_Network", "ray": "ray[data]>=2"}
    assert pins.pins(root)["scikit-network"] == "0.33.5"


def test_a_build_of_the_pinned_version_will_do(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, **{"torch": "2.15.0+cu130", "scikit-network": "0.33.5", "ray": "2.60.0"})
    assert pins.differences(root) == []


def test_other_versions_and_missing_packages_are_told(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed(monkeypatch, torch="2.11.0", ray="2.60.0")
    assert pins.differences(root) == [
        "torch is 2.11.0, constraints.txt pins 2.15.0",
        "scikit-network is not installed, constraints.txt pins 0.33.5",
    ]


def test_faiss_for_gpus_takes_the_place_of_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "pyproject.toml").write_text('[project]\ndependencies = ["faiss-cpu>=1.9"]\n')
    (tmp_path / "constraints.txt").write_text("faiss-cpu==1.15.1\n")
    installed(monkeypatch, **{"faiss-gpu-cu12": "1.14.0"})
    assert pins.differences(tmp_path) == []


def test_it_ends_with_code_2(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(pins, "differences", lambda root: ["torch is 2.11.0, constraints.txt pins 2.15.0"])
    assert pins.main() == 2
    assert "torch is 2.11.0" in capsys.readouterr().err
    monkeypatch.setattr(pins, "differences", lambda root: [])
    assert pins.main() == 0
