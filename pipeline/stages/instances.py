"""Photos -> masks with a score and an embedding each: by MaskCut (CutLER, arXiv 2301.11320), or from merge trees of
superpixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from model.backbone.cards import card_of
from model.backbone.names import embedding_dim, patch_size
from pipeline.config import Config
from pipeline.engine.receipts import Receipt, add_histograms, add_up
from pipeline.engine.shards import PhotoShards
from pipeline.errors import ConfigError
from pipeline.stages.base import Photos, ShardStage
from pipeline.stages.facts import Content, Facts, sections
from workers.records import Status, instances_schema

if TYPE_CHECKING:
    import pyarrow as pa

    from workers.instances.found import MaskGenerator

BEYOND_DOUBT = (32, 0.95)  # readable photos, and the share of them without a mask, at which the stage need not go on
GO_ON = "Raise run.max_empty to go on all the same"
MEND = {  # of photos that cannot be read, by what became of them
    Status.MISSING: "Bring them back, or give the workers access to the source",
    Status.EMPTY: "They hold no byte: bring them to the source again",
    Status.UNDECODABLE: "They are damaged, or no photos of a known format: see that source.uri is the right one",
    Status.TOO_LARGE: "Raise decode.max_pixels",
    Status.TOO_SMALL: "Lower decode.min_side",
    Status.CRASHED: "Give the workers more memory (workers.memory_gb)",
    Status.CHANGED: "They were replaced while the run went on",
}


class InstanceShards(PhotoShards):
    """Holds the backbone; fetches, finds masks and embeds them."""

    side_by_side = True

    def make_worker(self) -> Any:
        from workers.instances import InstanceWorker

        nested = self.config.instances.method == "merge_tree"
        generator = self._trees() if nested else self._cuts()
        return InstanceWorker(generator, batch_size=self.config.workers.batch_size, flow=self.flow)

    def _cuts(self) -> MaskGenerator:
        from workers.crf import CrfParams
        from workers.instances.cuts import CutParams, MaskCuts

        config, backbone = self.config, self.load_backbone()
        params = CutParams(
            **config.maskcut.model_dump(),
            crf=CrfParams(**config.crf.model_dump(exclude={"min_iou"})),
            min_iou=config.crf.min_iou,
            crop_size=round(config.embedding.crop_size / backbone.patch_size) * backbone.patch_size,
        )
        return MaskCuts(backbone, params, device=config.workers.device, crop_batch=config.workers.crop_batch)

    def _trees(self) -> MaskGenerator:
        from workers.instances.trees import MergeTrees, TreeInputs
        from workers.tree_masks import TreeParams

        settings, whole = self.config.merge_tree, card_of(self.config.backbone.name).whole
        params = TreeParams(**settings.model_dump(exclude={"image_size", "features", "embedding"}))
        inputs = TreeInputs(settings.image_size, tuple(settings.features), "tokens", settings.embedding, whole, params)
        return MergeTrees(self.load_backbone(), inputs, device=self.config.workers.device)


class Instances(ShardStage):
    name = "instances"
    watched = True

    def content(self, config: Config, facts: Facts) -> Content:
        if config.instances.method == "merge_tree":
            return facts.photos() | {"method": "merge_tree"} | sections(config, "merge_tree")
        content = facts.photos() | sections(config, "maskcut", "crf", "embedding")
        if content["maskcut"]["features"] == "keys":  # what was cut before there was a choice
            del content["maskcut"]["features"]
        if not content["crf"]["fast"]:  # likewise
            del content["crf"]["fast"]
        if content["maskcut"]["score"] != "objectness":  # likewise
            del content["maskcut"]["score"]
        return content

    def settle(self, config: Config, begun: Callable[[Config], bool]) -> Config:
        if config.instances.method != "maskcut" or config.maskcut.score != "auto":
            return config
        before, now = (
            config.model_copy(update={"maskcut": config.maskcut.model_copy(update={"score": score})})
            for score in ("crf_iou", "objectness")
        )
        return before if begun(before) and not begun(now) else now

    def check(self, config: Config, index: Photos | None) -> None:
        patch = patch_size(config.backbone.name)
        sizes = {"merge_tree.image_size": config.merge_tree.image_size}
        if config.instances.method == "maskcut":
            sizes = {
                "maskcut.image_size": config.maskcut.image_size,
                "embedding.crop_size": config.embedding.crop_size,
            }
        for key, size in sizes.items():
            if size < 2 * patch:
                raise ConfigError(
                    f"{key}: {size} px is less than 2 patches of {config.backbone.name} ({patch} px); raise it"
                )

    def schema(self, config: Config) -> pa.Schema:
        return instances_schema(embedding_dim(config.backbone.name), nested=config.instances.method == "merge_tree")

    def actor(self) -> type[InstanceShards]:
        return InstanceShards

    def complaint(self, config: Config, receipts: Sequence[Receipt], *, final: bool) -> str | None:
        """No photo can be read, or most readable ones have no mask."""
        empty, readable = count_empty(receipts)
        if final and not readable:
            return _nothing_readable(receipts)
        least, share = (1, config.run.max_empty) if final else BEYOND_DOUBT
        if readable < least or empty <= max(share, config.run.max_empty) * readable:
            return None
        return f"{empty} of {readable} readable photos have no mask. {_why(config, receipts)}{GO_ON}"


def count_empty(receipts: Sequence[Receipt]) -> tuple[int, int]:
    """Readable photos without a mask, and all readable ones."""
    rows = add_up(receipt.rows for receipt in receipts)
    empty = rows.get(Status.NO_MASKS, 0)
    return empty, empty + rows.get(Status.OK, 0)


def _nothing_readable(receipts: Sequence[Receipt]) -> str | None:
    rows = add_up(receipt.rows for receipt in receipts)
    if not rows:
        return None
    counts = ", ".join(f"{count} {status}" for status, count in rows.items())
    remedy = MEND[Status(next(iter(rows)))]  # of the commonest
    return (
        f"none of the {sum(rows.values())} photos can be read: {counts}. {remedy}, then run with --retry; the column "
        "`error` says why"
    )


def _why(config: Config, receipts: Sequence[Receipt]) -> str:
    """What the graphs of MaskCut were like, and what would cut them."""
    graphs, cosines = add_histograms(receipts, "graphs"), add_histograms(receipts, "cosines")
    if config.instances.method != "maskcut" or not sum(cosines):
        return ""
    cut, complete, empty = graphs
    edges = [-1 + 2 * i / len(cosines) for i in range(len(cosines) + 1)]
    tau = float(config.maskcut.tau)
    joined = sum(count for count, edge in zip(cosines, edges[1:], strict=True) if edge > tau) / sum(cosines)
    median = next(edge for i, edge in enumerate(edges[1:]) if 2 * sum(cosines[: i + 1]) >= sum(cosines))
    return (
        f"Of the graphs of {config.maskcut.features}, {complete} are complete, {empty} have no edge and {cut} can be "
        f"cut: the median cosine of two patches is {median:.2f}, and {100 * joined:.3g} % are above maskcut.tau "
        f"{tau:g}. With a tau near {median:.2f} half of them would be joined; maskcut.features auto takes what can be "
        "cut of this backbone. "
    )


STAGES = (Instances,)
