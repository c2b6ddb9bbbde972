"""The panoptic model, trained on the run's labels or on human ones, and trained on in rounds of self-training (U2Seg,
section 3.5; CutLER, section 3.4)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Self

from pipeline.config import Config
from pipeline.engine.fits import device_of_fits, fit_threads
from pipeline.engine.progress import FitProgress
from pipeline.engine.stage import Stage
from pipeline.stages.base import FitStage, Photos, Run, categories, stage_of_round
from pipeline.stages.facts import Content, Facts, require_there, require_weights
from pipeline.stages.labels import learnt_masks, require_predictions
from pipeline.stages.named import names_of
from pipeline.store import storage

if TYPE_CHECKING:
    from pipeline.clusters.names import Names
    from pipeline.config.section import Section
    from pipeline.train.job import TrainSettings
    from pipeline.train.photos import TrainingPhotos
    from workers.training.copy_paste import CopyPaste


# Keys that came later, which enter a fingerprint where they are not what was before.
LATER = ("crop", "optimiser", "schedule", "nested", "nested_most", "soft", "teacher")
LATER_OF_ROUNDS = ("soft", "mixing")
LATER_OF_NETWORK = (
    "backbone",
    "patch_stride",
    "finest_stride",
    "anchor_sizes",
    "class_agnostic",
    "class_agnostic_masks",
    "nms_threshold",
    "soft_nms",
    "mask_scores",
    "photo_outlines",
    "linear_probes",
)


class Train(FitStage):
    name = "train"
    trains = True
    after = ("panoptic",)

    @classmethod
    def of(cls, config: Config) -> Iterable[Self]:
        return [cls(number) for number in range(config.self_training.rounds + 1)] if config.train.steps else []

    def inputs(self, config: Config) -> tuple[str, ...]:
        train = config.train
        if self.round:
            return (f"labels_{self.round}", stage_of_round("train", self.round - 1))
        if train.labels is not None:
            return ()
        return ("panoptic", learnt_masks(config)) if train.whole_masks else ("panoptic",)

    def content(self, config: Config, facts: Facts) -> Content:
        how = {"threads", "checkpoint_every", "picture_every", "cache"}
        # Those that decide go by their checksums.
        files = {"names", "labels", "label_pngs", "label_images", "init", "backbone"}
        unsaid = _unsaid(config.train.network, LATER_OF_NETWORK)
        if not config.train.network.linear_probes:
            how.add("probe_rate")
        left_out = dict.fromkeys(how | files | _unsaid(config.train, LATER), True) | {"network": unsaid}
        fit = {"seed": config.seed, "train": config.train.model_dump(exclude=left_out)}
        if config.train.network.backbone == "vit":
            fit["frozen"] = [facts.teacher, config.backbone.dtype]
            if config.train.cache and config.train.flip:  # kept tokens are mirrored, in place of the photo
                fit["mirrored"] = "tokens"
        if self.round:
            unsaid = _unsaid(config.self_training, LATER_OF_ROUNDS)
            again = config.self_training.model_dump(include={"steps", "rate", *LATER_OF_ROUNDS}, exclude=unsaid)
            return {"self_training": again, **fit}
        train = config.train
        human = {} if train.labels is None else {"labels": facts.checksum("train.labels", train.labels)}
        names = {"names": facts.names()} if train.names else {}
        weights = {
            "init": facts.checksum("train.init", train.init and _identifying_file(train.init)),
            "backbone": facts.checksum("train.backbone", train.backbone),
        }
        return {**fit, **human, **names, **weights}

    def check(self, config: Config, index: Photos | None) -> None:
        train = config.train
        if self.round == 0:
            labels, weights = (
                {f"train.{key}": getattr(train, key) for key in keys}
                for keys in (("labels", "label_images"), ("init", "backbone"))
            )
            beside = train.labels and train.labels.removesuffix(".json")
            require_there({**labels, "train.label_pngs": train.label_pngs or beside, **weights})
            require_weights(weights)

    def fit(self, run: Run, stage: Stage) -> str:
        from pipeline.train.coco_photos import CocoPhotos
        from pipeline.train.fit import fit_panoptic
        from pipeline.train.tokens import FOLDER

        if self.round:
            require_predictions(run, self.round)
        names = names_of(run) if run.config.train.names else None
        photos, settings = self._photos(run, names), self._settings(run)
        train, workers, steps = run.config.train, run.config.workers, settings.optimisation.steps
        with FitProgress(stage.name, steps) as progress, fit_threads(workers) as cpus:
            result = fit_panoptic(
                photos,
                stage.folder,
                settings,
                num_workers=workers.train_workers,
                device=device_of_fits(workers),
                cpus_per_worker=cpus,
                gpus_per_worker=workers.gpus,
                threads=train.threads,
                checkpoint_every=train.checkpoint_every,
                picture_every=train.picture_every,
                tokens=storage.join(run.uri, FOLDER) if train.cache else None,
                config={
                    "categories": photos.categories
                    if isinstance(photos, CocoPhotos)
                    else categories(run.config)
                    if names is None
                    else names.listed
                },
                on_log=lambda entry: progress.update(int(entry["step"]), entry["total"]),
            )
        return f"{steps} steps on {len(photos)} photos, loss {result.loss:.4g}"

    def _photos(self, run: Run, names: Names | None) -> TrainingPhotos:
        """What is learnt from. ConfigError: labels that cannot be read, or names that leave no things."""
        from pipeline.train.coco_photos import CocoPhotos
        from pipeline.train.photos import Labels, PhotosOfLabels

        config, train = run.config, run.config.train
        if train.labels is not None and train.label_images is not None:
            return CocoPhotos(
                train.labels, train.label_images, pngs=train.label_pngs, limits=run.limits, fraction=train.fraction
            )
        panoptic = run.stages[self.inputs(config)[0]]
        whole = (panoptic if self.round else run.stages[learnt_masks(config)]) if train.whole_masks else None
        soft = train.soft or (self.round > 0 and config.self_training.soft)
        nested = train.nested is not None or soft
        identity = f"{panoptic.fingerprint} {whole.fingerprint}" if nested and whole else panoptic.fingerprint
        identity += " soft" if soft else ""
        labels = Labels(panoptic.parts(), whole.parts() if whole else (), identity, nested, soft)
        return PhotosOfLabels(
            run.index,
            labels,
            num_things=config.clusters.k,
            num_stuff=config.num_stuff,
            limits=run.limits,
            fraction=train.fraction,
            renaming=None if names is None else names.renaming,
        )

    def _settings(self, run: Run) -> TrainSettings:
        from pipeline.predict.frozen import FrozenBackbone
        from pipeline.train.job import TrainSettings
        from workers.training.teacher import TeacherParams
        from workers.training.trainer import Optimisation

        train, again, later = run.config.train, run.config.self_training, self.round > 0
        optimisation = Optimisation(
            steps=again.steps if later else train.steps,
            batch_size=train.batch_size,
            rate=again.rate if later else train.rate,
            probe_rate=train.probe_rate,
            weight_decay=train.weight_decay,
            warmup_steps=train.warmup_steps,
            drops=() if later else train.drops,
            drop_factor=train.drop_factor,
            ema=train.ema,
            precision=train.precision,
            seed=run.config.seed,
            optimiser=train.optimiser,
            schedule=train.schedule,
            teacher=None if train.teacher is None else TeacherParams(**train.teacher.model_dump()),
        )
        before = run.stages[stage_of_round("train", self.round - 1)].folder if later else train.init
        return TrainSettings(
            optimisation,
            train.network.model_dump(exclude=_unsaid(train.network, LATER_OF_NETWORK)),
            short_sides=train.short_sides,
            max_side=train.max_side,
            flip=train.flip,
            crop=train.crop,
            copy_paste=_copy_paste(run.config),
            precise_statistics=train.precise_statistics,
            init=before,
            init_classes="same" if later else train.init_classes,
            mixing=again.mixing if later else 1.0,
            backbone=None if later else train.backbone,
            frozen=FrozenBackbone.of(run.config.backbone) if train.network.backbone == "vit" else None,
        )


def _unsaid(section: Section, later: Iterable[str]) -> set[str]:
    """Those of the keys that have their defaults."""
    return {key for key in later if getattr(section, key) == type(section).model_fields[key].default}


def _copy_paste(config: Config) -> CopyPaste | None:
    from workers.training.copy_paste import CopyPaste

    paste = config.train.copy_paste
    if paste.mode == "none":
        return None
    return CopyPaste(paste.rate, paste.ratio, semantic_aware=0.5 if paste.mode == "semantic" else 0.0)


def _identifying_file(uri: str) -> str:
    from pipeline.predict.weights import identifying_file  # loads torch, which a look at a run can do without

    return identifying_file(uri)


STAGES = (Train,)
