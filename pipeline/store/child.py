"""Modules of this program that run as processes of their own, whatever has started this one."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]  # of the packages


def start(module: str, *arguments: str, **options: Any) -> subprocess.Popen[str]:
    """`python -m module arguments`, which finds the packages wherever it stands; `options` of subprocess.Popen."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    env = os.environ | {"PYTHONPATH": path, "PYTHONUTF8": "1"}  # names that are not UTF-8 travel as they are
    command = [sys.executable, "-m", module, *arguments]
    return subprocess.Popen(command, env=env, encoding="utf-8", errors="surrogateescape", **options)
