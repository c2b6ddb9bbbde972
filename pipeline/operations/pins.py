"""Whether the packages installed here are those that constraints.txt pins: `python -m pipeline.operations.pins`.

A submitted job begins with it, so that a cluster whose image has other versions says so in a second, and not in the
middle of a stage. Looks at the project's own requirements, not at what these require, and imports nothing else.
"""

from __future__ import annotations

import re
import sys
import tomllib
from importlib import metadata
from pathlib import Path

IN_PLACE_OF = {"faiss-cpu": "faiss-gpu-cu12"}  # of the extra `gpu`, which has the same module
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def requirements(root: Path) -> dict[str, str]:
    """The project's requirements as pyproject.toml writes them, by normalised name."""
    listed = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    return {_normalised(requirement): requirement for requirement in listed}


def pins(root: Path) -> dict[str, str]:
    """The versions that constraints.txt pins, by normalised name."""
    lines = (root / "constraints.txt").read_text().splitlines()
    pinned = (line.split("#")[0].strip().partition("==") for line in lines)
    return {_normalised(name): version for name, equals, version in pinned if equals}


def differences(root: Path) -> list[str]:
    """A line for each requirement whose installed version is not the pinned one."""
    pinned = pins(root)
    found = []
    for name in requirements(root):
        installed = _installed(name)
        if installed is None:
            if name not in IN_PLACE_OF or _installed(IN_PLACE_OF[name]) is None:
                found.append(f"{name} is not installed, constraints.txt pins {pinned.get(name, 'no version')}")
        elif name in pinned and installed.partition("+")[0] != pinned[name]:  # +cpu, +cu130 are builds of one version
            found.append(f"{name} is {installed}, constraints.txt pins {pinned[name]}")
    return found


def _installed(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _normalised(requirement: str) -> str:
    found = NAME.match(requirement)
    if found is None:
        raise ValueError(f"{requirement!r} names no package")
    return re.sub(r"[-_.]+", "-", found[0]).lower()


def main() -> int:
    found = differences(Path(__file__).resolve().parents[2])
    if found:
        listed = "\n  ".join(found)
        print(
            f"u2label: the packages of the cluster ({sys.executable}) are not those of constraints.txt:\n  {listed}\n"
            "install these versions in its image, submit with --environment pip, or take them as they are with "
            "--environment unchecked",
            file=sys.stderr,
        )
    return 2 if found else 0


if __name__ == "__main__":
    sys.exit(main())
