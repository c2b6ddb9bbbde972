"""The samples of each step: read and augmented ahead of the device, every one from its own source of chance."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from torch import Tensor

from pipeline.engine.shards import ahead
from pipeline.train.job import TrainJob
from pipeline.train.order import TrainingOrder
from pipeline.train.tokens import TokenCache
from workers.training.augment import augment
from workers.training.augment_tokens import augment_tokens
from workers.training.copy_paste import Crop, InstanceBank, copy_paste, crops_of
from workers.training.samples import Sample, to_target
from workers.training.trainer import Batch

BANK_STEPS = 16  # the bank of a step holds the instances of so many steps before it
DEPTH = 2  # batches read ahead


class Batches:
    """This process's share of every batch: the samples at `places` of it, with tokens if those are kept."""

    def __init__(self, job: TrainJob, places: range, tokens: TokenCache | None = None) -> None:
        self._job, self._places, self._tokens = job, places, tokens
        self._order = TrainingOrder(
            job.photos.parts, job.photos.wide, job.settings.optimisation.batch_size, job.settings.optimisation.seed
        )
        self._recent: dict[int, list[Crop]] = {}

    def between(self, start: int, end: int) -> Iterator[Batch]:
        """The batches of the steps from `start` to before `end`, in order."""
        with ThreadPoolExecutor(max_workers=self._job.threads, thread_name_prefix="samples") as pool:
            loaded = ahead(lambda step: self._load_with_tokens(step, pool), range(start, end), depth=DEPTH)
            for step, (samples, tokens) in enumerate(loaded, start):
                yield self._batch(self._pasted(step, samples, pool), tokens)

    def _load_with_tokens(self, step: int, pool: ThreadPoolExecutor) -> tuple[list[Sample], list[Tensor] | None]:
        samples = self._load(step, pool)
        if self._tokens is None:
            return samples, None
        augmented = pool.map(lambda place, sample: self._with_tokens(step, place, sample), self._places, samples)
        augmented_samples, tokens = zip(*augmented, strict=True)
        return list(augmented_samples), list(tokens)

    def _with_tokens(self, step: int, place: int, sample: Sample) -> tuple[Sample, Tensor]:
        """Augmented together: tokens are kept of the whole photo, as it is, alone."""
        settings = self._job.settings
        assert self._tokens is not None
        return augment_tokens(
            sample,
            self._tokens(to_target(sample)[0]),
            np.random.default_rng([settings.optimisation.seed, 3, step, place]),
            stride=self._tokens.stride,
            flip_probability=settings.flip,
            crop_probability=settings.crop,
        )

    def _load(self, step: int, pool: ThreadPoolExecutor) -> list[Sample]:
        indices = self._order.batch(step)
        return list(pool.map(lambda place: self._sample(step, place, int(indices[place])), self._places))

    def _sample(self, step: int, place: int, index: int) -> Sample:
        settings = self._job.settings
        return augment(
            self._job.photos.sample(index),
            np.random.default_rng([settings.optimisation.seed, 1, step, place]),
            short_sides=settings.short_sides,
            max_side=settings.max_side,
            flip_probability=settings.flip if self._tokens is None else 0,
        )

    def _pasted(self, step: int, samples: list[Sample], pool: ThreadPoolExecutor) -> list[Sample]:
        params = self._job.settings.copy_paste
        if params is None:
            return samples
        bank = None
        if params.semantic_aware > 0:
            bank = self._bank(step, pool)
            self._recent[step] = _crops(samples)
        rng = np.random.default_rng([self._job.settings.optimisation.seed, 2, step, self._places.start])
        return copy_paste(samples, rng, params, bank)

    def _bank(self, step: int, pool: ThreadPoolExecutor) -> InstanceBank:
        """The instances of the last steps; after an interruption these are read again."""
        past = range(max(0, step - BANK_STEPS), step)
        self._recent = {s: self._recent[s] if s in self._recent else _crops(self._load(s, pool)) for s in past}
        bank = InstanceBank()
        for crops in self._recent.values():
            bank.add(crops)
        return bank

    def _batch(self, samples: list[Sample], tokens: list[Tensor] | None) -> Batch:
        images, targets = zip(*map(to_target, samples), strict=True)
        return Batch(images, targets, [sample.image_id for sample in samples], self._places.start, tokens)


def _crops(samples: Iterable[Sample]) -> list[Crop]:
    return [crop for sample in samples for crop in crops_of(sample)]
