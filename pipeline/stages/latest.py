"""`<run>/latest.json`: config, fingerprints and teacher of the last run, for the commands that look at a run, and for
people."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from pipeline.config import Config, parse_config
from pipeline.errors import ConfigError
from pipeline.store import storage

LATEST = "latest.json"


@dataclass(frozen=True, slots=True)
class Latest:
    """The last run of a folder, as plain data. `teacher` is None where an early version wrote the file."""

    config: dict[str, Any]
    fingerprints: dict[str, str]
    teacher: str | None

    def same_labels(self, config: Config) -> bool:
        """Whether that run was of this config, but for where it lies and how the work is done. Keys that it did not
        know yet are as they are by themselves."""
        wanted = config.model_dump(mode="json")
        try:
            known = parse_config({**self.config, "run": wanted["run"]}, origin=LATEST).model_dump(mode="json")
        except ConfigError:
            return False
        if wanted["maskcut"]["score"] == "auto":  # which the run folder decided
            wanted["maskcut"]["score"] = known["maskcut"]["score"]
        return _decisive(known) == _decisive(wanted)

    def same_backbone(self, config: Config) -> bool:
        """Whether the backbone and the file of its weights were named as in this config."""
        keys = {"name", "weights", "sha256"}
        named = self.config.get("backbone")
        wanted = config.backbone.model_dump(include=keys)
        return isinstance(named, dict) and {key: named.get(key) for key in keys} == wanted


def read_latest(run_uri: str) -> Latest | None:
    """What the last run wrote; None where there was none. ConfigError: the file is not what a run writes."""
    where = storage.join(run_uri, LATEST)
    try:
        found = json.loads(storage.read_bytes(where))
        fingerprints = {name: str(value) for name, value in found["fingerprints"].items()}
        return Latest(dict(found.get("config", {})), fingerprints, found.get("teacher"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ConfigError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(f"{storage.redact(where)} is not what u2label run writes ({error!r}); run again") from error


def write_latest(config: Config, fingerprints: dict[str, str], teacher: str) -> None:
    """Errors as the store gives them."""
    content = {"config": config.model_dump(mode="json"), "fingerprints": fingerprints, "teacher": teacher}
    storage.write_bytes(storage.join(config.run.uri, LATEST), json.dumps(content, indent=2).encode())


def _decisive(config: dict[str, Any]) -> dict[str, Any]:
    return {name: section for name, section in config.items() if name not in {"workers", "run"}}
