"""The members of a tar where they lie: listed from its headers alone, and the bytes of sparse ones."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import IO

from pipeline.sources.names import image_id
from pipeline.store import storage

COMPRESSED_MAGIC = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd", b"\x04\x22\x4d\x18")  # gz bz2 xz zst lz4
COMPRESSED_TARS = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tar.lz4")
HEADER_BLOCK = 64 << 10  # bytes read from a remote tar at a time: small against a photo, large against a header
PADDING_BLOCK = 1 << 20  # bytes read at a time behind the end marker of a tar; writers pad with a few KiB
SPARSE_BYTES = 1 << 30  # of a sparse member with its holes; a tar may claim any size


def tar_members(uri: str, size: int, *, anonymous: bool = False) -> Iterator[tarfile.TarInfo]:
    """The members of a tar of `size` bytes from its headers alone. ValueError names a tar that is compressed, truncated
    or corrupt."""
    name, reached = storage.redact(uri), 0
    with storage.open_input(uri, block_size=HEADER_BLOCK, anonymous=anonymous) as stream:
        if uri.lower().endswith(COMPRESSED_TARS) or stream.read(6).startswith(COMPRESSED_MAGIC):
            raise ValueError(
                f"source.uri: {name} is compressed, so that its members cannot be read by offset; decompress it"
            )
        stream.seek(0)
        try:
            with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                while (member := tar.next()) is not None:
                    tar.members.clear()  # type: ignore[attr-defined]  # tarfile would keep them all
                    end = member.offset_data + _stored(member)
                    if not member.offset < member.offset_data <= end <= size:
                        raise tarfile.ReadError(f"member '{image_id(member.name)}' does not end inside the file")
                    reached = end
                    yield member
                _check_end(stream, tar.offset)
        except (tarfile.TarError, ValueError, OverflowError) as error:
            raise ValueError(
                f"source.uri: {name} is truncated or corrupt behind byte {reached} of {size}: {error}. "
                "Copy it again, or take it out of the source"
            ) from error


def _stored(member: tarfile.TarInfo) -> int:
    """The bytes of a member in the tar; of a sparse one without its holes."""
    pieces: list[tuple[int, int]] | None = member.sparse  # type: ignore[assignment]  # (offset, bytes), or None
    return member.size * member.isreg() if pieces is None else sum(size for _, size in pieces)


def _check_end(stream: IO[bytes], offset: int) -> None:
    # tarfile takes a broken header for the end of the archive, and reads nothing behind the end.
    stream.seek(offset)
    block = stream.read(tarfile.BLOCKSIZE)
    if any(block) or 0 < len(block) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError("no tar header where one must be")
    offset += len(block)
    while padding := stream.read(PADDING_BLOCK):
        if data := padding.lstrip(b"\0"):
            raise tarfile.ReadError(
                f"there is data behind the end marker, at byte {offset + len(padding) - len(data)}; if tars were "
                "concatenated by cat, join them by `tar --concatenate` or give them one by one"
            )
        offset += len(padding)


def read_sparse(uri: str, header: int, *, anonymous: bool) -> bytes:
    """A sparse member of a tar, its holes filled with zeros, from the place of its header. FileNotFoundError when it is
    not there any more, or too large."""
    with storage.open_input(uri, block_size=HEADER_BLOCK, anonymous=anonymous) as stream:
        stream.seek(header)
        try:
            with tarfile.open(fileobj=stream, mode="r:", encoding="utf-8", errors="surrogateescape") as tar:
                member = tar.next()
                if member is None or not member.issparse() or member.size > SPARSE_BYTES:
                    raise FileNotFoundError(f"no sparse member of up to {SPARSE_BYTES} bytes at byte {header}")
                content = tar.extractfile(member)
                assert content is not None
                return content.read()
        except tarfile.TarError as error:
            raise FileNotFoundError(f"no sparse member at byte {header}: {error}") from error
