"""`u2label submit`: a run as a job of a Ray cluster, through the job server of its head (port 8265).

The job gets the checkout (see `pipeline.operations.parcel`) and the configuration with all overrides in it, and runs
`u2label run` on the head. Credentials never go along: drivers and workers have those of their own nodes.
"""

from __future__ import annotations

import hashlib
import os
import shlex
import tempfile
import urllib.parse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from model.backbone.weights import NAMED
from pipeline.engine.heap import ONE_HEAP
from pipeline.errors import ConfigError
from pipeline.operations import pins
from pipeline.operations.parcel import Parcel, listing, pack
from pipeline.operations.server import Job, head_errors
from pipeline.store import storage

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

    from pipeline.config import Config

Environment = Literal["image", "pip", "unchecked"]
INSTALL_S = 3600  # torch and its CUDA packages are gigabytes
CONFIG_NAME = "submitted.yaml"  # in the job's folder


def submit(
    client: JobSubmissionClient,
    parcel: Parcel,
    config: Config,
    options: Sequence[str] = (),
    *,
    environment: Environment = "image",
    variables: Sequence[str] = (),
    global_options: Sequence[str] = (),
) -> Job:
    """Send the checkout and start `u2label run` with `options` there.

    Args:
        environment: `image`: the packages of the cluster's image, whose versions are checked first; `pip`: the pinned
            ones, installed by every node for this job; `unchecked`: whatever is there.
        variables: names of environment variables whose values the job and its workers get.
        global_options: those that stand before the command.
    """
    address = client.get_address()
    with tempfile.TemporaryDirectory() as folder:
        package = Path(folder) / "u2label.zip"
        pack(parcel, package, {CONFIG_NAME: with_absolute_paths(config).to_yaml().encode()})
        runtime_env = _runtime_env(parcel.root, environment, variables) | {"working_dir": str(package)}
        with head_errors(address):
            submission_id = client.submit_job(
                entrypoint=entrypoint(options, environment, global_options),
                runtime_env=runtime_env,
                metadata={"run": storage.redact(config.run.uri)},
            )
    return Job(submission_id, address)


def entrypoint(options: Sequence[str], environment: Environment, global_options: Sequence[str] = ()) -> str:
    """The shell command of the job."""
    run = ["python", "-m", "pipeline", *global_options, "run", CONFIG_NAME, *options, "--address", "auto"]
    check = "python -m pipeline.operations.pins && " if environment == "image" else ""
    return f"{check}exec {shlex.join(run)}"  # exec: signals reach the run and not a shell


def _runtime_env(root: Path, environment: Environment, variables: Sequence[str]) -> dict[str, Any]:
    missing = [name for name in variables if name not in os.environ]
    if missing:
        raise ConfigError(f"--env: {', '.join(missing)} is not set here; export it, or leave it out")
    wanted: dict[str, Any] = {"env_vars": ONE_HEAP | {name: os.environ[name] for name in variables}}
    if environment != "unchecked" and not all((root / name).exists() for name in ("pyproject.toml", "constraints.txt")):
        raise ConfigError(
            f"--environment: {root} is no checkout, it has no pyproject.toml and constraints.txt to tell the versions; "
            "submit from a clone, or with --environment unchecked"
        )
    if environment == "pip":
        wanted["pip"] = {"packages": _pinned_packages(root), "pip_check": False}
        wanted["config"] = {"setup_timeout_seconds": INSTALL_S}
    return wanted


def _pinned_packages(root: Path) -> list[str]:
    """Lines of a requirements file: everything that the project requires but Ray, which is the cluster's own.

    Ray keeps an environment by these lines alone, so the pins of what they require enter it as a comment.
    """
    pinned, digest = pins.pins(root), hashlib.sha256((root / "constraints.txt").read_bytes()).hexdigest()[:16]
    lines = [f"# constraints.txt {digest}", "-c ${RAY_RUNTIME_ENV_CREATE_WORKING_DIR}/constraints.txt"]
    for name, requirement in pins.requirements(root).items():
        if name != "ray":
            lines.append(f"{name}=={pinned[name]}" if name in pinned else requirement)
    return lines


def with_absolute_paths(config: Config) -> Config:
    """The config as a process in another folder must read it; the places of `source`, `run` and `train` are so."""
    backbone, semantics = config.backbone, config.semantics
    weights, refine = backbone.weights, semantics.refine_backbone
    if _local_file(weights):
        backbone = backbone.model_copy(update={"weights": str(Path(weights).expanduser().absolute())})
    if refine is not None and _local_file(refine):
        semantics = semantics.model_copy(update={"refine_backbone": str(Path(refine).expanduser().absolute())})
    return config.model_copy(update={"backbone": backbone, "semantics": semantics})


def local_places(config: Config) -> dict[str, str]:
    """The keys of the config that name local paths, which every node of the cluster must see."""
    train = config.train
    places = {
        "source.uri": config.source.uri,
        "run.uri": config.run.uri,
        "backbone.weights": config.backbone.weights,
        "semantics.refine_backbone": config.semantics.refine_backbone,
        "train.labels": train.labels,
        "train.label_pngs": train.label_pngs,
        "train.label_images": train.label_images,
        "train.init": train.init,
        "train.backbone": train.backbone,
    }
    return {key: uri for key, uri in places.items() if uri is not None and _local_file(uri)}


def _local_file(uri: str) -> bool:
    return uri not in NAMED and not uri.startswith("random:") and not storage.is_remote(uri)


def is_loopback(address: str) -> bool:
    """Whether the head is this machine itself."""
    return urllib.parse.urlsplit(address).hostname in {"localhost", "127.0.0.1", "::1"}


def remarks(config: Config, parcel: Parcel, address: str, variables: Sequence[str] = ()) -> list[str]:
    """What is worth knowing before the job starts, a line each."""
    how = "tracked by git" if parcel.tracked else "of the packages, configs and pins; no git checkout"
    said = [f"sending {len(parcel.files)} files of {parcel.root} ({parcel.bytes / 2**20:.1f} MiB, {how})"]
    if parcel.left_out:
        said.append(f"not sent, as they look like secrets or data or are no files: {listing(parcel.left_out)}")
    if parcel.untracked_code:
        said.append(f"not sent, as git does not track them: {listing(parcel.untracked_code)}; git add what a run needs")
    places = local_places(config)
    if places and not is_loopback(address):
        shown = ", ".join(f"{key} ({uri})" for key, uri in places.items())
        said.append(f"every node of the cluster must see these local paths: {shown}; s3:// needs no shared disk")
    secret = [name for name in variables if "SECRET" in name or "TOKEN" in name or "KEY" in name or "PASSWORD" in name]
    if secret:
        said.append(f"{', '.join(secret)}: whoever may talk to the job server can read the values that a job gets")
    return said
