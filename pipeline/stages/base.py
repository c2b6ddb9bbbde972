"""What a stage says of itself. One class a stage; the modules of this package list theirs as `STAGES`.

    name, kind           of its folder in the run, and whether it has a part a shard or one artifact
    of(config)           which of it a config asks for: none, one, or one for each round of self-training
    inputs(config)       the stages it reads
    content(...)         what of the config, the source and the weights decides its content: it enters the fingerprint
    settle(config, ...)  what only the run folder can decide of the config
    version              raised when the code gives other content for the same
    schema, actor | fit  what it writes, and how it is done

Nothing here computes: torch and the methods are imported by those who do.
"""

from __future__ import annotations

import functools
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, Self

from pipeline.config import Config
from pipeline.engine.done import FitChanges, Look
from pipeline.engine.receipts import Receipt
from pipeline.engine.stage import Kind, Stage
from pipeline.sources.index import Index
from pipeline.stages.facts import Content, Facts
from workers.decode import DecodeLimits

if TYPE_CHECKING:
    import pyarrow as pa

    from pipeline.engine.shards import ShardActor


@dataclass(frozen=True)
class Run:
    """A run, resolved once: what it was asked for, its photos, and its stages by name, in the order they run. `teacher`
    is the backbone with its weights in a line, None where that is not known."""

    config: Config
    index: Index
    definitions: dict[str, Definition]
    stages: dict[str, Stage]
    teacher: str | None

    @property
    def uri(self) -> str:
        return self.config.run.uri

    @functools.cached_property
    def look(self) -> Look:
        """What is done, as it was when this was first asked for."""
        return Look(self.stages.values())

    @functools.cached_property
    def done(self) -> dict[str, frozenset[int]]:
        """The shards of each shard stage that can be read, likewise."""
        return {name: self.look.usable(stage) for name, stage in self.stages.items() if stage.kind == "shard"}

    @property
    def fitted(self) -> bool:
        """Whether the clusters are."""
        return bool(self.look.usable(self.stages["clusters"]))

    @property
    def things(self) -> Stage:
        """The stage that `thing_stage` names."""
        return self.stages[thing_stage(self.config)]

    @property
    def limits(self) -> DecodeLimits:
        return DecodeLimits(max_pixels=self.config.decode.max_pixels, min_side=self.config.decode.min_side)


class Photos(Protocol):
    """How many photos a source has: its index, or a look at it."""

    @property
    def images(self) -> int: ...


class Definition(ABC):
    """A stage of the table. It holds nothing but the round of self-training that it belongs to, 0 for none."""

    name: ClassVar[str]  # without the number of the round
    kind: ClassVar[Kind]
    version: ClassVar[int] = 1
    after: ClassVar[tuple[str, ...]] = ()  # stages that run before it where there are any, though it reads none of them

    def __init__(self, round: int = 0) -> None:
        self.round = round

    @property
    def full_name(self) -> str:
        return stage_of_round(self.name, self.round)

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        """Those that the config asks for."""
        return [cls()]

    def inputs(self, config: Config) -> tuple[str, ...]:
        """The stages it reads, by their full names."""
        return ()

    @abstractmethod
    def content(self, config: Config, facts: Facts) -> Content:
        """Plain data: everything that decides its content beside its inputs. What is `auto` for `settle` is as it was
        in the first version that had this stage."""

    def settle(self, config: Config, begun: Callable[[Config], bool]) -> Config:
        """The config with what only the run folder can decide: something became better than it was, and a run that a
        version began which knew the old way alone goes on with that. `begun`: whether the run has this stage as a
        config says."""
        return config

    def check(self, config: Config, index: Photos | None) -> None:  # noqa: B027 (most stages have nothing to say)
        """Raise ConfigError, with key, value and remedy, for what is bound to fail and can be seen before any work;
        `index` is None where it is not known how many photos there are."""


class ShardStage(Definition):
    """A stage with a part for each shard of the source."""

    kind = "shard"
    holds_labels: ClassVar[bool] = False  # panoptic labels, with a list of categories in each part
    watched: ClassVar[bool] = False  # whether there can be a `complaint`

    def images(self, config: Config, index: Index) -> int:
        """How many photos of the source it looks at."""
        return index.images

    @abstractmethod
    def schema(self, config: Config) -> pa.Schema:
        """Of its parts."""

    @abstractmethod
    def actor(self) -> type[ShardActor]:
        """What computes a part. Ray's workers import it by name."""

    def complaint(self, config: Config, receipts: Sequence[Receipt], *, final: bool) -> str | None:
        """What is wrong with the rows that these receipts tell of, as a whole, and what to do; None where nothing is.
        Not `final`: the stage is at work, and only what is beyond doubt is said."""
        return None

    def categories(self, run: Run) -> list[dict[str, Any]]:
        """Of the labels in its parts: those of the run."""
        return categories(run.config)


class FitStage(Definition):
    """A stage with one artifact: a reduction over all parts of its inputs."""

    kind = "fit"
    trains: ClassVar[bool] = False  # a network, with `workers.train_workers` processes of Ray Train where there are any

    @abstractmethod
    def fit(self, run: Run, stage: Stage) -> str:
        """Write the artifact into the stage's folder -> a line that says what came out.

        ValueError, RuntimeError or an error of the store ends the run; what was kept on the way is gone on from.
        """

    def came_to_nothing(self, stage: Stage) -> bool:
        """Whether a finished fit had nothing to be made of, so that it is not kept when something comes."""
        return False

    def drift(self, run: Run, stage: Stage, changes: FitChanges) -> str:
        """What a fit that is kept means for the parts that it was not made of, in words; empty where nothing is known.
        ValueError: a part that cannot be read."""
        return ""


def stage_of_round(base: str, number: int) -> str:
    """The name of a stage in a round of self-training; 0 is before it."""
    return f"{base}_{number}" if number else base


def round_of(stage: str) -> int:
    """The round of self-training that a stage belongs to, by its name; 0 for none."""
    base, _, number = stage.rpartition("_")
    return int(number) if base and number.isdecimal() else 0


def thing_stage(config: Config) -> str:
    """The stage whose parts hold the masks that clusters and labels are made of: nested ones need a choice first."""
    return "things" if config.instances.method == "merge_tree" else "instances"


def categories(config: Config) -> list[dict[str, Any]]:
    """The category list of the panoptic labels: things 1..K, stuff K+1..K+S."""
    k, stuff = config.clusters.k, config.num_stuff
    things = [{"id": i, "name": f"thing {i}", "isthing": 1} for i in range(1, k + 1)]
    return things + [{"id": k + i, "name": f"stuff {i}", "isthing": 0} for i in range(1, stuff + 1)]
