"""What a job takes to the cluster: the checkout that this package was imported from, as one zip file.

Of a git checkout the files that git tracks, as they are now; else the packages, the configurations and the pins. Names
that look like secrets and folders of data or runs never go along, tracked or not. The same files give the same bytes,
so that the cluster unpacks them once.
"""

from __future__ import annotations

import fnmatch
import subprocess
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from pipeline.errors import ConfigError

PACKAGES = ("model", "workers", "pipeline")
PLAIN = (*PACKAGES, "configs", "pyproject.toml", "constraints.txt")  # what goes along without git
MAX_BYTES = 50 * 2**20  # unpacked; Ray itself refuses packages of 512 MiB
SECRET_NAMES = (
    "*.env",
    ".env.*",
    ".envrc",
    "*.pem",
    "*.key",
    "*.p12",
    "*.pfx",
    "*.kdbx",
    "*.keytab",
    "id_rsa*",
    "id_dsa*",
    "id_ecdsa*",
    "id_ed25519*",
    "credentials",
    "credentials.*",
    "*.tfvars",
    ".netrc",
    ".npmrc",
    ".pypirc",
    ".pgpass",
    ".boto",
    ".s3cfg",
)
SECRET_WORDS = (  # in names of anything but Python code
    "*credential*",
    "*secret*",
    "*service[-_]account*",
    "*accesskey*",
    "rootkey*",
    "token",
    "token.*",  # and no `token*`, which is `tokenizer.json` too
    "tokens.*",
    "*[-_]token",
    "*[-_]token.*",
)
SECRET_FOLDERS = frozenset({".git", ".venv", "__pycache__", ".aws", ".azure", ".docker", ".gnupg", ".kube", ".ssh"})
DATA_FOLDERS = frozenset({"runs", "data", "datasets", "weights"})  # at the top of the checkout


@dataclass(frozen=True, slots=True)
class Parcel:
    """The files of a checkout that a job gets, by their path in it, sorted; `left_out` are refused ones."""

    root: Path
    files: tuple[str, ...]
    left_out: tuple[str, ...]
    tracked: bool  # told by git
    untracked_code: tuple[str, ...] = ()  # modules of the packages that git does not know, which the job will lack

    @property
    def bytes(self) -> int:
        return sum((self.root / name).stat().st_size for name in self.files)


def checkout() -> Path:
    """The folder that this package was imported from."""
    return Path(__file__).resolve().parents[2]


def find_files(root: Path, *, max_bytes: int = MAX_BYTES) -> Parcel:
    """The files of `root` that may go to a cluster. ConfigError when they are too large, with the largest of them."""
    listed = _git(root, "ls-files", "-z")
    found = sorted(_plain_files(root) if listed is None else listed)
    files = [name for name in found if not _refused(name) and _may_be_read(root, name)]
    left_out = sorted(set(found).difference(files))
    code = _untracked_code(root) if listed is not None else ()
    parcel = Parcel(root, tuple(files), tuple(left_out), listed is not None, code)
    if parcel.bytes > max_bytes:
        raise ConfigError(_too_large(parcel, max_bytes))
    return parcel


def pack(parcel: Parcel, target: Path, extra: Mapping[str, bytes] | None = None) -> None:
    """Write the zip file: the files and, at paths of their own, the contents of `extra`. Times are left out."""
    contents = dict.fromkeys(parcel.files) | dict(extra or {})
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in sorted(contents.items()):
            data = (parcel.root / name).read_bytes() if content is None else content
            archive.writestr(zipfile.ZipInfo(name), data, compress_type=zipfile.ZIP_DEFLATED)


def _git(root: Path, *arguments: str) -> list[str] | None:
    """What git lists, or None when `root` is no checkout of its own (a package that was installed inside one)."""
    if not (root / ".git").exists():  # a folder, or a file in a worktree
        return None
    command = ["git", "-C", str(root), *arguments]
    try:
        listed = subprocess.run(command, capture_output=True, check=True).stdout
    except FileNotFoundError as error:
        raise ConfigError(f"{root} is a git checkout, but there is no git to list its files; install it") from error
    except subprocess.CalledProcessError as error:
        said = error.stderr.decode(errors="replace").strip()
        raise ConfigError(f"cannot list the files of {root} by git: {said}") from error
    return [name.decode(errors="surrogateescape") for name in listed.split(b"\0") if name]


def _untracked_code(root: Path) -> tuple[str, ...]:
    patterns = [f"{package}/*.py" for package in PACKAGES]
    return tuple(_git(root, "ls-files", "-z", "--others", "--exclude-standard", "--", *patterns) or ())


def _plain_files(root: Path) -> Iterator[str]:
    for name in PLAIN:
        path = root / name
        for file in (path,) if path.is_file() else path.rglob("*"):
            if file.is_file():
                yield file.relative_to(root).as_posix()


def _refused(name: str) -> bool:
    *folders, file = PurePosixPath(name).parts
    if SECRET_FOLDERS.intersection(folders) or DATA_FOLDERS.intersection(folders[:1]):
        return True
    file = file.lower()
    patterns = SECRET_NAMES if file.endswith(".py") else SECRET_NAMES + SECRET_WORDS
    return any(fnmatch.fnmatchcase(file, pattern) for pattern in patterns)


def _may_be_read(root: Path, name: str) -> bool:
    """Whether a regular file is there; one that was deleted is not, nor a link that leads out of the checkout or to a
    file that is refused."""
    path, root = root / name, root.resolve()
    if not path.is_file() or not path.resolve().is_relative_to(root):
        return False
    return not _refused(str(path.resolve().relative_to(root)))


def _too_large(parcel: Parcel, max_bytes: int) -> str:
    sizes = {name: (parcel.root / name).stat().st_size for name in parcel.files}
    largest = ", ".join(f"{name} ({_mib(sizes[name])})" for name in _largest(sizes, 5))
    return (
        f"{parcel.root}: its {len(sizes)} files take {_mib(parcel.bytes)}, a job takes at most {_mib(max_bytes)} to "
        f"the cluster; the largest are {largest}: take them out of git, or put data into a bucket"
    )


def _largest(sizes: Mapping[str, int], count: int) -> Sequence[str]:
    return sorted(sizes, key=lambda name: -sizes[name])[:count]


def _mib(size: int) -> str:
    return f"{size / 2**20:.1f} MiB"


def listing(names: Iterable[str], most: int = 5) -> str:
    """Some names in a line, for a message."""
    listed = list(names)
    return ", ".join(listed[:most]) + (f" and {len(listed) - most} more" if len(listed) > most else "")
