"""What `pipeline.store` needs of S3 beyond fsspec: a client that tries once, listings page by page, whole
uploads, fresh credentials.
"""

from __future__ import annotations

import contextlib
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from typing import Any, NamedTuple

import fsspec

from pipeline.store.retries import status_and_code

OPTIONS = {
    "use_listings_cache": False,
    "max_concurrency": 1,  # otherwise reading an object costs a HEAD beside the GET
    "skip_instance_cache": True,  # nobody else's filesystem gets our attempts
}
CLIENT = {"max_pool_connections": 64}  # botocore's 10 would hold back a fetch pool
PIECES = 8  # of a folder, listed at a time
PART_BYTES = 64 << 20  # of a larger object; a smaller one is a single PUT
# A HEAD has no body that could name the reason of its 400.
EXPIRED = frozenset({"ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired", "RequestExpired", "400"})
TAKEN = frozenset({"PreconditionFailed", "412"})
LISTING, BEGINNING = b"<ListBucketResult", 500  # bytes of an answer within which it says what it is
Ask = Callable[..., Any]  # ask(method, **parameters) -> botocore's answer, with retries

_renewal = threading.Lock()


class Listed(NamedTuple):
    """An object of a listing: its bytes, when it was last written (seconds since 1970, 0 where that is not told), and
    its ETag, which changes with its bytes."""

    key: str
    size: int
    modified: float
    etag: str


def connect(*, anonymous: bool = False, attempts: int = 1) -> Any:
    """An s3fs filesystem. Endpoint, region and credentials come from the standard AWS variables and profiles.

    One attempt, so that `pipeline.store.retries` alone decides, as it says; or so many, by botocore.
    """
    retries = {"retries": {"total_max_attempts": attempts, "mode": "standard"}}
    fs = fsspec.filesystem("s3", anon=anonymous, **OPTIONS, config_kwargs=CLIENT | retries, session=_session())
    fs.retries = 1
    return fs


def _session() -> Any:
    """A session whose answers are read fast: of a listing, most of the time would be the parsing of dates."""
    from aiobotocore.session import AioSession  # type: ignore[import-untyped]

    session = AioSession()
    session.get_component("response_parser_factory").set_parser_defaults(timestamp_parser=parse_time)
    _read_listings_once(session.get_component("event_emitter"))
    return session


def _read_listings_once(events: Any) -> None:
    """botocore reads a whole answer a first time to see whether it is an error: a quarter of a listing's time. Of one
    that begins as a listing it need not."""
    from botocore import handlers  # type: ignore[import-untyped]

    look_for_error = getattr(handlers, "_handle_200_error", None)
    if look_for_error is None:  # another botocore, which has its own way
        return

    def look(operation_model: Any, response_dict: dict[str, Any], **others: Any) -> None:
        if operation_model.name != "ListObjectsV2" or LISTING not in response_dict["body"][:BEGINNING]:
            look_for_error(operation_model=operation_model, response_dict=response_dict, **others)

    events.unregister("before-parse.s3.*", look_for_error)
    events.register_first("before-parse.s3.*", look)


def parse_time(value: Any) -> datetime:
    """A time of an answer: ISO 8601, as listings have it, at once, and all others as botocore does."""
    from botocore.utils import parse_timestamp  # type: ignore[import-untyped]

    with contextlib.suppress(ValueError, TypeError):
        parsed = datetime.fromisoformat(value)
        if parsed.tzinfo is not None:
            return parsed
    found: datetime = parse_timestamp(value)
    return found


def errors() -> tuple[type[Exception], ...]:
    """What s3fs raises when the store is at fault or refuses."""
    from aiohttp import ClientError
    from botocore.exceptions import BotoCoreError  # type: ignore[import-untyped]
    from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]

    return (OSError, BotoCoreError, ClientError, ResponseParserError)


def with_fresh_credentials(fs: Any, function: Callable[[], Any]) -> Any:
    """`function()`, once more with credentials that are read anew when those in use have expired."""
    if fs.session is None:
        fs.connect()
    session = fs.session
    try:
        return function()
    except OSError as error:
        if fs.anon or status_and_code(error)[1] not in EXPIRED:
            raise
    with _renewal:
        if fs.session is session:  # else another thread was faster
            fs.session = _session()  # the credentials lie in it
            fs.connect(refresh=True)
    return function()


def list_keys(
    ask: Ask, bucket: str, prefix: str, *, below: bool, after: str = "", until: str | None = None
) -> Iterator[Listed]:
    """Objects whose keys begin with `prefix`, in the byte order of keys; without `below` only those with no slash
    after it. Of them those behind the key `after`, up to the key `until` and with it.

    Memory: one page of 1000. The marker that consoles leave for an empty folder is left out.
    """
    request = {"Bucket": bucket, "Prefix": prefix, **({} if below else {"Delimiter": "/"})}
    last, end = b"", None if until is None else until.encode()
    request |= {"StartAfter": after} if after else {}
    while True:
        page = ask("list_objects_v2", **request)
        for entry in page.get("Contents", ()):
            if entry["Key"].encode() <= last:
                raise OSError(f"s3://{bucket} does not list its keys in byte order (a directory bucket?)")
            last = entry["Key"].encode()
            if end is not None and last > end:
                return
            if not entry["Key"].endswith("/"):
                yield _listed(entry)
        if not page.get("IsTruncated") or last == end:
            return
        request["ContinuationToken"] = page["NextContinuationToken"]


def _listed(entry: dict[str, Any]) -> Listed:
    modified = entry.get("LastModified")
    seconds = 0.0 if modified is None else modified.timestamp()
    return Listed(entry["Key"], int(entry["Size"]), seconds, entry.get("ETag", "").strip('"'))


def list_in_pieces(ask: Ask, bucket: str, prefix: str, cuts: Sequence[str]) -> Iterator[Listed]:
    """The keys directly below `prefix` as `list_keys` gives them, in pieces that end at the keys `cuts` and are listed
    side by side: page after page alone costs a second for every 10,000 keys."""
    ends = sorted(cuts, key=str.encode)

    def piece(after: str, until: str | None) -> list[Listed]:
        return list(list_keys(ask, bucket, prefix, below=False, after=after, until=until))

    with ThreadPoolExecutor(PIECES) as pool:
        for found in pool.map(piece, ["", *ends], [*ends, None]):
            yield from found


def remove_all(ask: Ask, bucket: str, prefix: str) -> None:
    """Delete every object whose key begins with `prefix`, a thousand a request. OSError names one that stays."""
    keys = (found.key for found in list_keys(ask, bucket, prefix, below=True))
    while batch := [{"Key": key} for key in itertools.islice(keys, 1000)]:
        answer = ask("delete_objects", Bucket=bucket, Delete={"Objects": batch, "Quiet": True})
        for refused in answer.get("Errors", ()):
            raise OSError(f"cannot delete s3://{bucket}/{refused.get('Key')}: {refused.get('Message')}")


def create(ask: Ask, bucket: str, key: str, data: bytes) -> bool:
    """A conditional PUT; False when an object is there."""
    try:
        ask("put_object", Bucket=bucket, Key=key, Body=data, IfNoneMatch="*")
    except OSError as error:
        if not isinstance(error, FileExistsError) and status_and_code(error)[1] not in TAKEN:
            raise
        return False
    return True


def upload(
    ask: Ask, abort: Ask, bucket: str, key: str, read: Callable[[int, int], bytes], size: int, part_bytes: int
) -> None:
    """Put an object of `size` bytes, `read(start, length)`: in one PUT, or above `part_bytes` in parts, all of which
    are thrown away, by `abort`, unless they become the object."""
    place = {"Bucket": bucket, "Key": key}
    if size <= part_bytes:
        ask("put_object", **place, Body=read(0, size))
        return
    place["UploadId"] = ask("create_multipart_upload", **place)["UploadId"]
    try:
        parts = []
        for number, start in enumerate(range(0, size, part_bytes), start=1):
            body = read(start, min(part_bytes, size - start))
            answer = ask("upload_part", **place, PartNumber=number, Body=body)
            parts.append({"PartNumber": number, "ETag": answer["ETag"]})
        _complete(ask, place, parts, size)
    except BaseException:
        with contextlib.suppress(*errors()):  # the first error tells more; `abort_uploads` has another go
            abort("abort_multipart_upload", **place)
        raise


def _complete(ask: Ask, place: dict[str, str], parts: list[dict[str, Any]], size: int) -> None:
    try:
        ask("complete_multipart_upload", **place, MultipartUpload={"Parts": parts})
    except FileNotFoundError:  # no such upload: it may be complete, and only the answer was lost
        found = ask("head_object", Bucket=place["Bucket"], Key=place["Key"])
        if found["ContentLength"] != size or not found["ETag"].strip('"').endswith(f"-{len(parts)}"):
            raise


def abort_uploads(ask: Ask, bucket: str, prefix: str) -> None:
    """Throw away the parts of uploads directly below `prefix` whose writers were killed. Stores that do not list
    uploads, or not to this user, keep them until their own rule for incomplete uploads."""
    try:
        page = ask("list_multipart_uploads", Bucket=bucket, Prefix=prefix, Delimiter="/")
    except OSError as error:
        if status_and_code(error)[0] in (403, 405, 501):
            return
        raise
    for upload in page.get("Uploads", ()):
        if "/" not in upload["Key"].removeprefix(prefix):  # not every store heeds the delimiter
            ask("abort_multipart_upload", Bucket=bucket, Key=upload["Key"], UploadId=upload["UploadId"])
