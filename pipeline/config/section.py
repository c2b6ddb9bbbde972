"""What all sections of the configuration share: a frozen pydantic model each, unknown keys refused, and URIs.

A field that changes the rows of a stage lives in a section of that stage and enters its fingerprint; `workers` says how
the work is done. A section stands in this room, whichever stage it is of: `labels`, `model` or `workers`.
"""

from __future__ import annotations

import urllib.parse
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict

from pipeline.store import storage


class Section(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True, coerce_numbers_to_str=True)


def _absolute(uri: str) -> str:
    """A local path made absolute, so that workers on the same machine find it from any folder."""
    if not uri:
        raise ValueError("is empty; give a folder, a file or a URL such as s3://bucket/prefix")
    uri = _without_credentials(uri)
    if uri.startswith("file://"):
        uri = urllib.parse.unquote(uri.removeprefix("file://"))
    return uri.rstrip("/") if storage.is_remote(uri) else str(Path(uri).expanduser().absolute())


def _without_credentials(uri: str) -> str:
    """The config is written into every part, so that no secret may be in it."""
    if storage.redact(uri) != uri:
        raise ValueError(storage.NO_CREDENTIALS_IN_URLS)
    return uri


Uri = Annotated[str, AfterValidator(_absolute)]
Weights = Annotated[str, AfterValidator(_without_credentials)]
