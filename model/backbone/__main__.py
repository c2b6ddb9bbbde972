"""`python -m model.backbone NAME FILE`: whether a file of weights fits, in a process of its own.

torch stays in the memory of the process that has imported it, of which a driver, that computes nothing, has no use.
What is wrong with the file is printed, and the exit status is 2.
"""

from __future__ import annotations

import sys
from pathlib import Path

from model.backbone.build import check_file

if __name__ == "__main__":
    name, path = sys.argv[1:]
    try:
        check_file(name, Path(path))
    except (OSError, ValueError) as error:
        print(error)
        raise SystemExit(2) from None
