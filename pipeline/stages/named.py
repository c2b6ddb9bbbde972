"""The names of a run's classes: which fits they are of, and those that are stored with the run."""

from __future__ import annotations

import contextlib

from pipeline.clusters.names import NAMES, Counts, Fits, Names, read_names
from pipeline.engine.done import artifact_identity
from pipeline.engine.stage import Stage
from pipeline.errors import ConfigError
from pipeline.stages.base import Run, round_of
from pipeline.stages.run import open_run
from pipeline.store import storage

HOW = "write the page of clusters with u2label report, and give its file to u2label name RUN --from names.yaml"


def fits_of(run: Run) -> tuple[Fits, Counts]:
    """Which fits made the classes of a run, and how many those are."""
    stuff = _identity(run.stages["semantics_fit"]) if run.config.num_stuff else None
    counts = Counts(things=run.config.clusters.k, stuff=run.config.num_stuff)
    return Fits(things=_identity(run.stages["clusters"]), stuff=stuff), counts


def _identity(fit: Stage) -> str:
    """The fingerprint, and what tells the artifact from one that `run --refit` makes under the same: then class 17 is
    another. The fingerprint alone where the artifact is there no more."""
    with contextlib.suppress(FileNotFoundError):
        return f"{fit.fingerprint}-{artifact_identity(fit)}"
    return fit.fingerprint


def check_fits(names: Names, run: Run, where: str) -> None:
    """ConfigError unless the names are of the fits of this run."""
    fits, classes = fits_of(run)
    for kind, theirs, own in (("things", names.fits.things, fits.things), ("stuff", names.fits.stuff, fits.stuff)):
        if theirs != own and f"{theirs}".rpartition("-")[0] != own:
            raise ConfigError(
                f"{where}: its names are of another fit: fits.{kind} is {theirs}, and that of the run in "
                f"{storage.redact(run.uri)} is {own}; {HOW}"
            )
    if names.classes != classes:
        raise ConfigError(
            f"{where}: classes is {names.classes.things} things and {names.classes.stuff} stuff, and the run has "
            f"{classes.things} and {classes.stuff}; {HOW}"
        )


def names_of(run: Run) -> Names:
    """The names that are stored with a run. ConfigError: there are none, they are of other fits, or as `read_names`."""
    where = storage.join(run.uri, NAMES)
    if not storage.exists(where):
        raise ConfigError(f"--names: the run in {storage.redact(run.uri)} has no names; {HOW}")
    names = read_names(where)
    check_fits(names, run, storage.redact(where))
    return names


def names_of_checkpoint(weights: str) -> Names:
    """The names of the run that trained a checkpoint, `<run>/train/<fingerprint>`. ConfigError as of `names_of`, and
    for weights that lie elsewhere."""
    folders = weights.rstrip("/").rsplit("/", 2)
    if len(folders) != 3 or (folders[1] != "train" and not round_of(folders[1])):
        raise ConfigError(
            f"--names: {storage.redact(weights)} is not in the folder of a run (RUN/train/FINGERPRINT), whose names "
            "would be taken; give the weights there"
        )
    return names_of(open_run(folders[0], need=None))
