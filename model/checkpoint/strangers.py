"""What a file is that was given for weights and is none, told by its first bytes: a page that a server sent in its
place, a pointer to it, nothing at all."""

from __future__ import annotations

import zipfile
from pathlib import Path

HEAD = 128  # bytes that are looked at
ZIP = b"PK\x03\x04"  # how torch.save's files begin
LFS_POINTER = b"version https://git-lfs.github.com/spec/"
BLANK = b"\xef\xbb\xbf \t\r\n"  # what may stand before the first tag of a page
AGAIN = "fetch it again"


def stranger(head: bytes) -> tuple[str, str] | None:
    """What a file that begins like this is, if it cannot be weights of any format, and what to do."""
    if not head:
        return "is empty", AGAIN
    if head.startswith(LFS_POINTER):
        return "is a Git LFS pointer and not the weights", "run `git lfs pull` in the clone, or download the file"
    if head.lstrip(BLANK).startswith(b"<"):
        return "is a web page and not the weights", f"{AGAIN}; its address may want a login or an accepted licence"
    return None


def looks(head: bytes, size: int) -> str:
    """How a file of `size` bytes begins, for messages."""
    return f"{size:,} bytes, the first are {head[:16]!r}"


def unreadable(path: Path, what: str, remedy: str) -> ValueError:
    """The error of a file that `what` is wrong with."""
    return ValueError(f"{path} {what} ({looks(head_of(path), path.stat().st_size)}); {remedy}")


def head_of(path: Path) -> bytes:
    with path.open("rb") as stream:
        return stream.read(HEAD)


def require_weights(path: Path) -> None:
    """ValueError for a file that is no weights, for an archive that is cut off, and for one of a program: torch would
    take that for weights and warn."""
    head = head_of(path)
    problem = stranger(head)
    if problem is not None:
        raise unreadable(path, *problem)
    if not head.startswith(ZIP):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except zipfile.BadZipFile:
        raise unreadable(path, "is cut off or damaged", AGAIN) from None
    if any(name.endswith("constants.pkl") for name in names):
        raise unreadable(path, "is a TorchScript program and not weights", "save the state_dict() of its model alone")
