"""The training loop of STEGO, one process of any number that share each batch.

Everything random in step t is drawn from (seed, t) for the whole batch; each process computes its rows of it. Codes are
gathered so that negatives come from the whole batch, and gradients are added up, so the weights do not depend on the
number of processes but for rounding. A checkpoint holds all that the next step needs: a fit that was killed goes on
from the last one to the same weights, bit for bit on CPU with the same number of processes.

Shapes: N items, B items a batch (b of them in this process), C channels, (h, w) patches, D code channels.
"""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from model.ranks import Ranks, SharedModule
from model.stego import (
    ClusterProbe,
    Correspondence,
    StegoHead,
    correspondence_loss,
    derangement,
    drop_channels,
)
from pipeline.engine.board import Board
from pipeline.engine.fit_progress import Entry, write_progress
from pipeline.semantics.stego_classes import lost_early, probe_sizes
from pipeline.semantics.stego_features import open_features, some_patches
from pipeline.semantics.stego_job import StegoSettings, TrainJob, read_checkpoint, read_neighbours, write_checkpoint

log = logging.getLogger(__name__)

BINS = 50  # of the histograms of cosines, over [-1, 1]
KINDS = ("intra", "inter", "negative")
CPU = torch.device("cpu")


class Draws(NamedTuple):
    """Everything random in one step, for the whole batch, on CPU."""

    items: Tensor  # (B,)
    positives: Tensor  # (B,) one of the neighbours of each
    masks: Tensor  # (3, B, C) dropped channels of the items, and
    masks_pos: Tensor  # of the positives
    coords1: Tensor  # (B, m, m, 2)
    coords2: Tensor
    neg_perms: Tensor  # (R, B)


def draw_step(settings: StegoSettings, step: int, neighbours_NK: NDArray[np.int32], head: StegoHead) -> Draws:
    """The draws of a step, counted from 0: a function of the seed and the step alone.

    Items come in an order that is new in every epoch; what is left over at its end is skipped, so that no item is
    twice in a batch.
    """
    batch, count = settings.batch_size, len(neighbours_NK)
    epoch, place = divmod(step, count // batch)
    items = _order(settings.seed, epoch, count)[place * batch : (place + 1) * batch]
    state = np.random.SeedSequence([settings.seed, 1, step]).generate_state(1, np.uint64)
    generator = torch.Generator().manual_seed(int(state[0]))
    chosen = torch.randint(neighbours_NK.shape[1], (batch,), generator=generator).numpy()
    field = (batch, settings.points, settings.points, 2)
    return Draws(
        items=torch.from_numpy(items),
        positives=torch.from_numpy(neighbours_NK[items, chosen].astype(np.int64)),
        masks=head.draw_masks(batch, generator),
        masks_pos=head.draw_masks(batch, generator),
        coords1=torch.rand(field, generator=generator) * 2 - 1,
        coords2=torch.rand(field, generator=generator) * 2 - 1,
        neg_perms=torch.stack([derangement(batch, generator) for _ in range(settings.negatives)]),
    )


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> NDArray[np.int64]:
    return np.random.default_rng([seed, 0, epoch]).permutation(count)


def read_items(mapped_NChw: NDArray[np.float16], items: Tensor, device: torch.device = CPU) -> Tensor:
    """(n, C, h, w) float32 of these items."""
    return torch.from_numpy(mapped_NChw[items.numpy()]).to(device).float()


class Trainer:
    """Head, probe and their optimisers, after `step` steps."""

    def __init__(self, settings: StegoSettings, channels: int, device: torch.device) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self.head = StegoHead(channels, settings.dim, settings.dropout).to(device)
            self.probe = ClusterProbe(settings.dim, settings.classes).to(device)
        self.settings = settings
        self.device = device
        self.step = 0
        self._optimisers = [
            torch.optim.Adam(self.head.parameters(), lr=settings.head_rate),
            torch.optim.Adam(self.probe.parameters(), lr=settings.probe_rate),
        ]

    def advance(
        self, mapped_NChw: NDArray[np.float16], neighbours_NK: NDArray[np.int32], ranks: Ranks
    ) -> tuple[Correspondence, Tensor, Tensor]:
        """One step. Returns the losses of the own rows, the cluster loss, and the (b, S, h, w) assignment."""
        draws = draw_step(self.settings, self.step, neighbours_NK, self.head)
        head, probe = SharedModule(self.head), SharedModule(self.probe)
        code, found = self._correspondence(draws, mapped_NChw, head, ranks)
        cluster_loss, assignment = probe(code)
        ((found.total(self.settings.terms) + cluster_loss) / ranks.size).backward()
        for shared, optimiser in zip((head, probe), self._optimisers, strict=True):
            shared.set_gradients(ranks)
            optimiser.step()
        self.step += 1
        return found, cluster_loss.detach(), assignment

    def _correspondence(
        self, draws: Draws, mapped_NChw: NDArray[np.float16], head: SharedModule, ranks: Ranks
    ) -> tuple[Tensor, Correspondence]:
        """Code (b, D, h, w) and losses of the own rows."""
        settings, own = self.settings, ranks.rows(self.settings.batch_size)
        masks, masks_pos = (drawn.to(self.device) for drawn in (draws.masks, draws.masks_pos[:, own]))
        feats, feats_pos = (
            read_items(mapped_NChw, items, self.device) for items in (draws.items, draws.positives[own])
        )
        code, code_pos = head(feats[own], masks[:, own]), head(feats_pos, masks_pos)
        teacher, teacher_pos = drop_channels(feats, masks[2]), drop_channels(feats_pos, masks_pos[2])
        found = correspondence_loss(
            teacher[own],
            teacher_pos,
            code,
            code_pos,
            coords1=draws.coords1[own].to(self.device),
            coords2=draws.coords2[own].to(self.device),
            neg_perms=draws.neg_perms[:, own].to(self.device),
            terms=settings.terms,
            pointwise=settings.pointwise,
            zero_clamp=settings.zero_clamp,
            stabilise=settings.stabilise,
            pool=(teacher, ranks.gather(code)),
            batch_mean=ranks.mean,
        )
        return code, found

    def state(self) -> dict[str, Any]:
        modules = {"head": self.head.state_dict(), "probe": self.probe.state_dict()}
        return modules | {"step": self.step, "optimisers": [each.state_dict() for each in self._optimisers]}

    def load(self, state: dict[str, Any]) -> None:
        self.head.load_state_dict(state["head"])
        self.probe.load_state_dict(state["probe"])
        for optimiser, values in zip(self._optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(values)
        self.step = state["step"]


def train(
    job: TrainJob,
    ranks: Ranks,
    device: torch.device,
    on_log: Callable[[Entry], None] | None = None,
) -> None:
    """Train to the last step, from the checkpoint in `job.out` if there is one, and leave the checkpoint there.

    A fit that has lost its classes is left where that shows. `on_log` is called in every process at the same steps,
    with the entry of the history.
    """
    settings = job.settings
    mapped = open_features(job.features, job.features_file)
    neighbours = read_neighbours(job)
    assert neighbours is not None
    trainer = Trainer(settings, mapped.shape[1], device)
    record = resume(job, trainer)
    board = Board(job.out, record) if ranks.rank == 0 else None
    while trainer.step < settings.steps and not lost_early(record["history"], settings.classes):
        found, cluster_loss, assignment = trainer.advance(mapped, neighbours, ranks)
        if _is_due(trainer.step, settings.log_every, settings.steps):
            entry = _entry(trainer.step, found, cluster_loss, assignment, settings, ranks)
            record["history"].append(entry)
            if board is not None:
                board.add_losses(entry)
                write_progress(job.out, settings.steps, entry)
            if on_log is not None:
                on_log(entry)
        if _is_due(trainer.step, settings.histogram_every, settings.steps):
            record["histograms"].append(_histogram(trainer.step, found, ranks))
            if board is not None:
                board.add_histogram(record["histograms"][-1])
        if board is not None and trainer.step % job.checkpoint_every == 0:
            keep(job, trainer, record)
            board.publish()
    if board is not None:
        if trainer.step == settings.steps and "probe_sizes" not in record:
            rows = some_patches(mapped, settings.seed)
            record["probe_sizes"] = probe_sizes(trainer.head.eval(), trainer.probe, rows)
        keep(job, trainer, record)
        board.publish()
        board.close()


def _is_due(step: int, every: int, last: int) -> bool:
    return step == 1 or step % every == 0 or step == last


def _entry(
    step: int,
    found: Correspondence,
    cluster_loss: Tensor,
    assignment: Tensor,
    settings: StegoSettings,
    ranks: Ranks,
) -> dict[str, float]:
    """Losses of the whole batch, and how many classes the probe gave to any patch of it."""
    losses = torch.stack([found.intra, found.inter, found.negative, found.total(settings.terms), cluster_loss])
    values = ranks.sum(losses.detach().double()) / ranks.size
    used = ranks.sum(assignment.sum((0, 2, 3))) > 0
    named = dict(zip(("intra", "inter", "negative", "correspondence", "cluster"), values.tolist(), strict=True))
    return {"step": step, **named, "classes_used": int(used.sum())}


def _histogram(step: int, found: Correspondence, ranks: Ranks) -> dict[str, Any]:
    """Counts of the cosines of codes, of the whole batch, in BINS equal bins from -1 to 1."""
    cosines = (found.intra_cosines, found.inter_cosines, found.negative_cosines)
    counts = torch.stack([torch.histc(values.clamp(-1, 1), BINS, -1, 1).long() for values in cosines])
    return {"step": step, **dict(zip(KINDS, ranks.sum(counts).tolist(), strict=True))}


def keep(job: TrainJob, trainer: Trainer, record: dict[str, Any]) -> None:
    """Write the checkpoint."""
    write_checkpoint(job, trainer.state() | {"record": json.dumps(record)})


def resume(job: TrainJob, trainer: Trainer) -> dict[str, Any]:
    """Bring the trainer to the checkpoint, if there is one; the history and the histograms up to there."""
    state = read_checkpoint(job)
    if state is None:
        return {"history": [], "histograms": []}
    trainer.load(state)
    if 0 < trainer.step < job.settings.steps:
        log.info("STEGO goes on after step %d", trainer.step)
    record: dict[str, Any] = json.loads(state["record"])
    return record
