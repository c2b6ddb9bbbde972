"""What a fit of STEGO takes from the features before its first step: shifts of the loss, and where the head starts.

A shift is the similarity above which two patches are taken for one class. How alike they are by chance is told by
patches of unrelated photos, which are the negatives of the loss: a pair is pulled together that is more alike than
nine in ten of them, and of themselves only one in a hundred is. The numbers follow offset and spread of any features.
For features like DINO's they lie near Cityscapes' published shifts, above those for COCO-Stuff.
"""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from numpy.typing import NDArray

from model.stego import StegoHead, teacher_similarities
from model.stego_terms import LossTerms
from pipeline.semantics.stego_features import open_features, some_patches
from pipeline.semantics.stego_job import StegoSettings, TrainJob, read_checkpoint, read_neighbours
from pipeline.semantics.stego_train import CPU, Trainer, draw_step, keep, read_items
from workers.conditioning import Moments, principal_axes

PULL, PUSH = 0.90, 0.99  # quantiles of the negatives' similarities: shift of the positives, and of the negatives
BATCHES, PAIRS = 20, 1 << 23  # looked at, at most


@dataclass(frozen=True, slots=True)
class Similarities:
    """Of teacher features, centred as the loss centres them: means of the three terms, and the negatives' quantiles."""

    intra: float
    inter: float
    negative: float
    pull: float
    push: float


def begin(job: TrainJob) -> TrainJob:
    """The job with its shifts settled. A fit that starts from more than the seed has its start, and the similarities
    of the features, in the checkpoint of step 0: every process reads it, and so does a fit that goes on."""
    settings = job.settings
    if not (settings.auto_shifts or settings.conditioned):
        return job
    if read_checkpoint(job) is None:
        _write_start(job)
    state = read_checkpoint(job)
    assert state is not None
    found = Similarities(**json.loads(state["record"])["similarities"])
    terms = settled_terms(settings.terms, settings.auto_shifts, found)
    return replace(job, settings=replace(settings, terms=terms))


def look(job: TrainJob) -> Similarities:
    """At the features of the job, whose neighbours are found."""
    mapped, neighbours = open_features(job.features, job.features_file), read_neighbours(job)
    assert neighbours is not None
    head = Trainer(job.settings, mapped.shape[1], CPU).head
    return measure_similarities(mapped, neighbours, job.settings, head)


def _write_start(job: TrainJob) -> None:
    settings = job.settings
    trainer = Trainer(settings, job.features.shape[1], CPU)
    if settings.conditioned:
        rows = some_patches(open_features(job.features, job.features_file), settings.seed)
        moments = Moments(rows.shape[1])
        moments.add(rows)
        trainer.head.start_near(torch.from_numpy(principal_axes(moments, settings.dim)))
    keep(job, trainer, {"history": [], "histograms": [], "similarities": asdict(look(job))})


def measure_similarities(
    mapped_NChw: NDArray[np.float16], neighbours_NK: NDArray[np.int32], settings: StegoSettings, head: StegoHead
) -> Similarities:
    """Over the batches that the fit begins with, without dropout: the same for any number of workers."""
    pairs = settings.batch_size * settings.points**4
    found = [
        _of_step(mapped_NChw, neighbours_NK, settings, head, step)
        for step in range(max(1, min(BATCHES, PAIRS // pairs)))
    ]
    intra, inter, negative = (np.concatenate(values) for values in zip(*found, strict=True))
    pull, push = np.quantile(negative, (PULL, PUSH))
    means = [float(values.mean(dtype=np.float64)) for values in (intra, inter, negative)]
    return Similarities(means[0], means[1], means[2], float(pull), float(push))


def settled_terms(terms: LossTerms, auto: tuple[str, ...], found: Similarities) -> LossTerms:
    """The terms with shifts from the similarities in place of those named in `auto`."""
    shifts = {"intra": found.pull, "inter": found.pull, "negative": found.push}
    return replace(terms, **{f"{name}_shift": shifts[name] for name in auto})


def margin(terms: LossTerms, found: Similarities) -> float:
    """Sum over the terms of weight * (shift - mean similarity). Below 0, codes that are all alike score better than
    codes at right angles."""
    return (
        terms.intra_weight * (terms.intra_shift - found.intra)
        + terms.inter_weight * (terms.inter_shift - found.inter)
        + terms.negative_weight * (terms.negative_shift - found.negative)
    )


def _of_step(
    mapped_NChw: NDArray[np.float16],
    neighbours_NK: NDArray[np.int32],
    settings: StegoSettings,
    head: StegoHead,
    step: int,
) -> tuple[NDArray[np.float32], ...]:
    """Flat similarities of each term."""
    draws = draw_step(settings, step, neighbours_NK, head)
    feats, feats_pos = (read_items(mapped_NChw, items) for items in (draws.items, draws.positives))
    terms: tuple[torch.Tensor, ...] = teacher_similarities(
        feats,
        feats_pos,
        coords1=draws.coords1,
        coords2=draws.coords2,
        negatives=draws.neg_perms[0],
        pointwise=settings.pointwise,
    )
    return tuple(values.flatten().numpy() for values in terms)
