"""Where a URI leads: to which filesystem, what its errors are, how often it is asked, and what of it may be shown.

A URI is a local path, taken as it is, a percent-encoded `file://` URI (the form of a path that is not valid UTF-8), or
`scheme://...`. Filesystems are made in the process that uses them and are never pickled; `anonymous` ones sign nothing,
for public buckets. Other rooms find all this in `pipeline.store.storage`.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import re
import urllib.parse
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from pipeline.errors import ConfigError
from pipeline.store import s3
from pipeline.store.retries import Retry

T = TypeVar("T")

S3 = frozenset({"s3", "s3a"})
NO_CREDENTIALS_IN_URLS = "holds credentials; give them by AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or AWS_PROFILE"
# A password may hold `/` up to the first `@`, and more `@` up to the next `/`. A word without `@` is matched too, or
# each `://` in it would search it to its end again.
USER_AND_PASSWORD = re.compile(r"://[^/@:\s]*:[^@\s]*(@(?:[^/@\s]*@)*)?")
USER = re.compile(r"(?i)(?<!\baz)(?<!\babfs)(?<!\babfss)://(?:[^/@\s]+@)+")
SECRET_VALUES = re.compile(
    r"(?i)((?:AccountKey|SharedAccessSignature)=)[^;\s]+"
    r"|((?:X-(?:Amz|Goog)-[A-Z-]{1,64}|AWSAccessKeyId|Signature|[?&](?:sig|token|access_token))=)[^&\s]+"
)
PACKAGES = {"gs": "gcsfs", "gcs": "gcsfs", "az": "adlfs", "abfs": "adlfs", "abfss": "adlfs"}
PACKAGES |= {"http": "aiohttp", "https": "aiohttp"}
WEB_SECONDS = 60  # for the whole answer of a web server
ANONYMOUS: dict[str, dict[str, Any]] = {"gcsfs": {"token": "anon"}, "adlfs": {"anon": True}}
ERRORS = {  # what these packages raise beside OSError
    "gcsfs": ("aiohttp.ClientError", "google.auth.exceptions.GoogleAuthError", "gcsfs.retry.HttpError"),
    "adlfs": ("azure.core.exceptions.AzureError",),
    "aiohttp": ("aiohttp.ClientError",),
}


def is_remote(uri: str) -> bool:
    return protocol_of(uri) != "file"


def protocol_of(uri: str) -> str:
    scheme = re.match(r"([A-Za-z][A-Za-z0-9+.-]*)://", uri)
    return scheme[1].lower() if scheme else "file"


def local_uri(path: str) -> str:
    """The absolute path, or its percent-encoded `file://` URI when the name is not valid UTF-8."""
    path = os.path.abspath(path)  # noqa: PTH100 (pathlib keeps `..`)
    try:
        path.encode()
    except UnicodeEncodeError:
        return "file://" + urllib.parse.quote(os.fsencode(path))
    return path


def join(uri: str, *names: str) -> str:
    return "/".join([uri.rstrip("/"), *names])


def redact(text: str) -> str:
    """`text` without credentials inside URLs (`scheme://user:secret@host`, signed query strings) and inside connection
    strings of Azure. `container@account` of an Azure URL is none. Takes time linear in the text."""
    text = USER_AND_PASSWORD.sub(lambda url: "://***@" if url[1] else url[0], text)
    return SECRET_VALUES.sub(r"\1\2***", USER.sub("://***@", text))


@functools.lru_cache(maxsize=16)
def _filesystem(protocol: str, anonymous: bool, process: int) -> Any:
    if protocol in S3:
        return s3.connect(anonymous=anonymous)
    if PACKAGES.get(protocol) == "aiohttp":
        from aiohttp import ClientTimeout

        options = {"timeout": ClientTimeout(total=WEB_SECONDS), "trust_env": True}
        return fsspec.filesystem(protocol, client_kwargs=options)
    options = ANONYMOUS.get(PACKAGES.get(protocol, ""), {}) if anonymous else {}
    if protocol in PACKAGES:  # a listing that is kept would not show what other processes wrote
        options = {**options, "use_listings_cache": False, "skip_instance_cache": True}
    return fsspec.filesystem(protocol, **options)


def filesystem(uri: str, *, anonymous: bool = False) -> tuple[Any, str]:
    """The fsspec filesystem of a URI and the path in it.

    ConfigError names the scheme when it is unknown, and its package when that is missing; it refuses keys in a URL.
    """
    protocol = protocol_of(uri)
    if protocol in S3 and redact(uri) != uri:
        raise ConfigError(f"{redact(uri)}: {NO_CREDENTIALS_IN_URLS}")
    try:
        fs = _filesystem(protocol, anonymous, os.getpid())
    except (ImportError, ValueError) as error:  # no such package; no such scheme, or no credentials for it
        missing = isinstance(error, ImportError) and protocol in PACKAGES
        remedy = f"; pip install {PACKAGES[protocol]}" if missing else ""
        raise ConfigError(f"{redact(uri)}: cannot open '{protocol}://': {error}{remedy}") from error
    if protocol == "file" and "://" in uri[:7]:
        return fs, os.fsdecode(urllib.parse.unquote_to_bytes(uri[7:]))
    return fs, fs._strip_protocol(uri)


def store_errors(uri: str) -> tuple[type[Exception], ...]:
    """What a read or listing of `uri` raises when the store is at fault or refuses: remote ones have more than
    OSError."""
    protocol = protocol_of(uri)
    return s3.errors() if protocol in S3 else (OSError, *_errors_of(PACKAGES.get(protocol, "")))


@functools.cache
def _errors_of(package: str) -> tuple[type[Exception], ...]:
    found = []
    for name in ERRORS.get(package, ()):
        module, _, error = name.rpartition(".")
        with contextlib.suppress(ImportError):  # then nothing can raise it
            found.append(getattr(importlib.import_module(module), error))
    return tuple(found)


@contextlib.contextmanager
def failures_as(failure: type[Exception], uri: str, remedy: str) -> Iterator[None]:
    """What the store of `uri` raises in the block, and nothing in it has dealt with, as another error with a remedy.
    A system's error of another kind looks the same, so that the message says what was raised."""
    try:
        yield
    except store_errors(uri) as error:
        raise failure(f"{redact(uri)}: {type(error).__name__}: {redact(str(error))}; {remedy}") from error


def lacks_credentials(error: BaseException) -> bool:
    """Whether a store was not asked at all, because nothing says who asks."""
    return type(error).__name__ == "NoCredentialsError"  # botocore's, which takes long to import


def asking(fs: Any, uri: str, function: Callable[[], T], retry: Retry) -> T:
    """`function()`, which asks the store of `uri`; a remote one again when the failure may pass."""
    if isinstance(fs, LocalFileSystem):
        return function()
    if protocol_of(uri) in S3:
        function = functools.partial(s3.with_fresh_credentials, fs, function)
    return retry.call(function, redact(uri), store_errors(uri))


def s3_calls(fs: Any, uri: str, retry: Retry) -> s3.Ask:
    """Botocore's methods by name, asked as all others."""
    return lambda method, **parameters: asking(fs, uri, lambda: fs.call_s3(method, **parameters), retry)
