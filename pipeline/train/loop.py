"""The training loop of the panoptic model, in one process of any number that share each batch.

A checkpoint holds weights, optimiser and step; the order of the images and all chance follow from the step. A training
that was killed goes on from the last checkpoint to the same weights, bit for bit on a CPU with as many processes.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from model.ranks import Ranks
from pipeline.engine.board import Board
from pipeline.engine.fit_progress import Entry, write_progress
from pipeline.store import storage
from pipeline.train.batches import Batches
from pipeline.train.job import PREDICTIONS, TrainJob, build_model, read_progress_of, write_checkpoint
from pipeline.train.pictures import draw_predictions
from pipeline.train.tokens import TokenCache
from workers.training.trainer import PanopticTrainer, mix_weights, precise_statistics, weights_of

log = logging.getLogger(__name__)

LOG_EVERY = 20  # steps


def train(
    job: TrainJob, ranks: Ranks, device: torch.device, on_log: Callable[[Entry], None] | None = None
) -> tuple[PanopticTrainer, dict[str, Any]]:
    """Train to the last step, from the checkpoint in `job.out` if there is one, and leave the last one there.

    Returns the trainer and the record: `history`, a mapping of losses, rate and images a second each (and of
    `taught`, see `PanopticTrainer.advance`). `on_log` gets
    each entry of the first process.
    """
    settings = job.settings.optimisation
    trainer = PanopticTrainer(build_model(job, str(device)), settings, device=device, ranks=ranks)
    first = weights_of(trainer.model) if job.settings.mixing < 1 else None
    record = _resume(job, trainer)
    share = ranks.rows(settings.batch_size)
    batches = Batches(job, range(share.start, share.stop), _kept_tokens(job, trainer))
    log_ = _Log(job, record, on_log) if ranks.rank == 0 else None
    for batch in batches.between(trainer.step, settings.steps):
        losses = trainer.advance(batch)
        if log_ is not None:
            log_.add(trainer, losses)
        if trainer.step % job.checkpoint_every == 0 and trainer.step < settings.steps and ranks.rank == 0:
            write_checkpoint(job, trainer.state(), record)
    if first is not None and not record["finished"]:
        mix_weights(trainer.best_model(), first, share=job.settings.mixing)
    if job.settings.precise_statistics and not record["finished"]:
        following = batches.between(settings.steps, settings.steps + job.settings.precise_statistics)
        precise_statistics(trainer.best_model(), (list(batch.images) for batch in following), ranks)
    record["finished"] = True
    if log_ is not None:
        write_checkpoint(job, trainer.state(), record)
        log_.close(trainer)
    return trainer, record


def _kept_tokens(job: TrainJob, trainer: PanopticTrainer) -> TokenCache | None:
    backbone, frozen = job.settings.frozen, trainer.model.frozen
    if job.tokens is None or backbone is None or frozen is None:
        return None
    return TokenCache(job.tokens, frozen, backbone, device=str(trainer.device))


def _resume(job: TrainJob, trainer: PanopticTrainer) -> dict[str, Any]:
    found = read_progress_of(job)
    if found is None:
        return {"history": [], "window": [], "finished": False}
    state, record = found
    trainer.load_state(state)
    log.info("the training goes on after step %d", trainer.step)
    return record


class _Log:
    """What the first process writes down: the history, TensorBoard, and pictures of what the model sees."""

    def __init__(self, job: TrainJob, record: dict[str, Any], on_log: Callable[[Entry], None] | None) -> None:
        self._job, self._record, self._on_log = job, record, on_log
        self._board = Board(job.out, record)
        self._steps_here = 0  # of the window, since this process began
        self._since = time.perf_counter()

    def add(self, trainer: PanopticTrainer, losses: dict[str, float]) -> None:
        window = self._record["window"]  # kept in checkpoints, so that the curve goes on as if it had not stopped
        window.append(losses)
        self._steps_here += 1
        settings = self._job.settings.optimisation
        step, last = trainer.step, trainer.step == settings.steps
        if step == 1 or step % LOG_EVERY == 0 or last:
            seconds = time.perf_counter() - self._since
            means = {name: float(np.mean([entry[name] for entry in window])) for name in losses}
            rate = self._steps_here * settings.batch_size / max(seconds, 1e-9)
            entry = {"step": step, **means, "rate": settings.rate_at(step - 1), "images_per_s": rate}
            self._record["history"].append(entry)
            self._board.add_losses(entry)
            write_progress(self._job.out, settings.steps, entry)
            if self._on_log is not None:
                self._on_log(entry)
            window.clear()
            self._steps_here, self._since = 0, time.perf_counter()
        if step % self._job.picture_every == 0 and not last:
            self.draw(trainer)
        if step % self._job.checkpoint_every == 0:
            self._board.publish()

    def draw(self, trainer: PanopticTrainer) -> None:
        picture = draw_predictions(self._job, trainer.best_model())
        storage.write_bytes(storage.join(self._job.out, PREDICTIONS, f"step-{trainer.step:06d}.jpg"), picture)

    def close(self, trainer: PanopticTrainer) -> None:
        self.draw(trainer)
        self._board.publish()
        self._board.close()
