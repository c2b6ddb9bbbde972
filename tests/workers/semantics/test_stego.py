"""Teacher features, neighbours and class maps of STEGO in one worker."""

from __future__ import annotations

import io

import numpy as np
import pyarrow as pa
import pytest
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from model.backbone import load_backbone
from model.stego import ClusterProbe, StegoHead
from workers.crf import STEGO
from workers.images import LoadedImage
from workers.overlap import Flow, Overlapped
from workers.phases import Phases
from workers.records import SEMANTICS_SCHEMA, Status
from workers.semantics import stego
from workers.semantics.stego import (
    FEATURES_SCHEMA,
    ClassMapParams,
    StegoWorker,
    TeacherParams,
    TeacherWorker,
    descriptor,
    nearest_neighbours,
    read_features,
    teacher_views,
)


class ColourBackbone:
    """Tokens are the mean colour of each 8 x 8 patch, less grey, and a constant channel."""

    patch_size, dim = 8, 4

    def __init__(self) -> None:
        self.batches: list[int] = []

    def tokens(self, images: Tensor) -> Tensor:
        self.batches.append(len(images))
        colours = F.avg_pool2d(images, 8) - 0.5
        return F.pad(colours, (0, 0, 0, 0, 0, 1), value=0.1).flatten(2).mT

    keys = tokens

    def cls(self, images: Tensor) -> Tensor:
        return self.tokens(images).mean(1)


def identity_head(dim: int = 4) -> StegoHead:
    """A head whose code is its input."""
    head = StegoHead(dim, dim)
    for parameter in head.parameters():
        parameter.data.zero_()
    head.linear.weight.data = torch.eye(dim)
    return head


def colour_probe(*colours: tuple[float, float, float]) -> ClusterProbe:
    probe = ClusterProbe(4, len(colours))
    probe.clusters.data = torch.tensor([[c - 0.5 for c in colour] + [0.1] for colour in colours])
    return probe


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def decoded(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


RED, GREEN, BLUE = (0.9, 0.1, 0.1), (0.1, 0.9, 0.1), (0.1, 0.1, 0.9)
BAD = LoadedImage("bad", None, Status.UNDECODABLE, "cut short")


def stripes(height: int, width: int) -> np.ndarray:
    """Red to the left, green in the middle, blue to the right, in the proportions 1 : 2 : 1."""
    image = np.zeros((height, width, 3), np.uint8)
    for (start, stop), colour in zip(((0, 1), (1, 3), (3, 4)), (RED, GREEN, BLUE), strict=True):
        image[:, width * start // 4 : width * stop // 4] = np.multiply(255, colour)
    return image


def test_every_image_gives_a_row_of_features_and_a_bad_one_its_reason() -> None:
    backbone = ColourBackbone()
    worker = TeacherWorker(backbone, TeacherParams(image_size=60), device="cpu", batch_size=2)
    images = [LoadedImage("a", photo(70, 90)), BAD, LoadedImage("b", photo(8, 300, seed=1))]
    table = worker.process(images, Phases())
    assert table.schema == FEATURES_SCHEMA
    rows = table.to_pylist()
    assert [row["image_id"] for row in rows] == ["a", "bad", "b"]
    assert [row["status"] for row in rows] == ["ok", "undecodable", "ok"]
    assert (rows[1]["error"], rows[1]["shape"], rows[1]["features"]) == ("cut short", None, None)
    assert rows[0]["shape"] == [1, 4, 8, 8]  # 60 pixels are 7.5 patches
    views = teacher_views(photo(70, 90), 64, "centre")
    tokens = backbone.tokens(torch.from_numpy(views).permute(0, 3, 1, 2) / 255)
    assert read_features(rows[0])[0] == pytest.approx(tokens[0].T.reshape(4, 8, 8).numpy(), abs=1e-3)
    assert backbone.batches[:2] == [1, 1]  # the bad one shares its batch with "a"


def test_five_crops_are_corners_and_centre_and_share_a_forward_pass() -> None:
    image = np.zeros((80, 120, 3), np.uint8)
    for number, (y, x) in enumerate([(0, 0), (0, 60), (40, 0), (40, 60)], start=1):
        image[y : y + 40, x : x + 60] = 50 * number
    views = teacher_views(image, 16, "five")
    assert views.shape == (5, 16, 16, 3)
    assert [int(view[8, 8, 0]) for view in views[:4]] == [50, 100, 150, 200]
    assert views[4][[2, 2, 13, 13], [2, 13, 2, 13], 0].tolist() == [50, 100, 150, 200]
    backbone = ColourBackbone()
    worker = TeacherWorker(backbone, TeacherParams(16, "five"), device="cpu", batch_size=3)
    table = worker.process([LoadedImage(name, photo(20, 30)) for name in "abc"], Phases())
    assert table["shape"].to_pylist() == [[5, 4, 2, 2]] * 3
    assert backbone.batches == [15]


def test_the_centre_crop_is_that_of_the_resized_photo_and_does_not_alias() -> None:
    image = photo(64, 64).repeat(4, 0).repeat(6, 1)  # 256 x 384
    resized = np.asarray(Image.fromarray(image).resize((192, 128), Image.Resampling.LANCZOS))
    assert np.abs(teacher_views(image, 128, "centre")[0].astype(int) - resized[:, 32:160]).max() <= 1
    checkers = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (200, 200))[..., None].repeat(3, 2)
    inner = teacher_views(checkers, 40, "centre")[0, 2:-2, 2:-2].astype(int)
    assert np.abs(inner - 127).max() < 3  # the nearest pixel would be 0 or 255


def test_stored_features_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match=r"a: 6 bytes of features are not \(1, 2, 2, 2\) in float16"):
        read_features({"image_id": "a", "shape": [1, 2, 2, 2], "features": b"123456"})


def test_constant_images_give_finite_features_and_descriptors() -> None:
    worker = TeacherWorker(load_backbone("patch-dct", "random:0"), TeacherParams(64), device="cpu")
    images = [LoadedImage(str(v), np.full((50, 60, 3), v, np.uint8)) for v in (0, 128, 255)]
    rows = worker.process(images, Phases()).to_pylist()
    vectors = np.concatenate([descriptor(read_features(row)) for row in rows])
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1, abs=1e-3)
    assert descriptor(np.zeros((1, 3, 2, 2), np.float16)).tolist() == [[0, 0, 0]]


@pytest.mark.parametrize("block", [5, 2048])
def test_neighbours_are_the_most_similar_others(block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stego, "NEIGHBOUR_ROWS", block)
    rows = np.random.default_rng(0).standard_normal((23, 6)).astype(np.float32)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    similarity = rows @ rows.T
    np.fill_diagonal(similarity, -np.inf)
    assert (nearest_neighbours(rows, 4, threads=1) == np.argsort(-similarity, axis=1)[:, :4]).all()


def test_a_row_is_not_its_own_neighbour_among_copies() -> None:
    found = nearest_neighbours(np.ones((12, 3), np.float32) / np.sqrt(3, dtype=np.float32), 3, threads=1)
    assert all(number not in row and len(set(row)) == 3 for number, row in enumerate(found.tolist()))
    with pytest.raises(ValueError, match="7 neighbours need at least 8 rows, got 7"):
        nearest_neighbours(np.eye(7, dtype=np.float32), 7, threads=1)


def test_class_maps_cover_the_whole_photo_at_its_size() -> None:
    worker = StegoWorker(
        ColourBackbone(), identity_head(), colour_probe(RED, GREEN, BLUE), ClassMapParams(image_size=64), device="cpu"
    )
    image = stripes(100, 200)
    table = worker.process([LoadedImage("wide", image), BAD, LoadedImage("tall", np.rot90(image).copy())], Phases())
    assert table.schema == SEMANTICS_SCHEMA
    rows = table.to_pylist()
    wide, tall = decoded(rows[0]["labels"]), decoded(rows[2]["labels"])
    wanted = np.repeat([0, 1, 2], [50, 100, 50])[None].repeat(100, 0)
    assert wide.shape == (100, 200)
    assert (wide == wanted).mean() > 0.97  # patches lie across the borders
    assert (tall == np.rot90(wanted)).mean() > 0.97
    assert (rows[1]["status"], rows[1]["error"], rows[1]["labels"]) == ("undecodable", "cut short", None)


def test_the_code_is_averaged_with_that_of_the_mirrored_photo() -> None:
    class Lopsided(ColourBackbone):
        def tokens(self, images: Tensor) -> Tensor:
            tokens = super().tokens(images).clone()
            tokens[:, 0] += 1  # the first patch sees what is not there
            return tokens

    images = photo(8, 24)[None]
    code = (torch.from_numpy(images).permute(0, 3, 1, 2) / 255).reshape(1, 3, 1, 8, 3, 8).mean((3, 5)) - 0.5
    code = F.pad(code, (0, 0, 0, 0, 0, 1), value=0.1)
    probe = colour_probe(RED, GREEN, BLUE)
    for flip, extra in ((True, (0.5, 0, 0.5)), (False, (1.0, 0, 0))):
        worker = StegoWorker(Lopsided(), identity_head(), probe, ClassMapParams(flip=flip), device="cpu")
        wanted = probe.log_probs(code + torch.tensor(extra), alpha=2.0)
        assert worker.log_probs(images, Phases()).detach().numpy() == pytest.approx(wanted.detach().numpy(), abs=1e-5)


@pytest.mark.usefixtures("either_way")
def test_the_crf_cleans_the_map_of_a_noisy_head() -> None:
    image = stripes(64, 128)
    scores = colour_probe(RED, GREEN, BLUE)

    class Noisy(ColourBackbone):
        def tokens(self, images: Tensor) -> Tensor:
            tokens = super().tokens(images)
            noise = torch.randn(tokens.shape, generator=torch.Generator().manual_seed(1))
            return tokens + 1.0 * noise

    def share(params: ClassMapParams) -> float:
        worker = StegoWorker(Noisy(), identity_head(), scores, params, device="cpu")
        labels = decoded(worker.process([LoadedImage("a", image)], Phases())["labels"][0].as_py())
        return float((labels == np.repeat([0, 1, 2], [32, 64, 32])[None]).mean())

    plain = share(ClassMapParams(image_size=64))
    refined = share(ClassMapParams(image_size=64, crf=STEGO))
    assert plain < 0.9 < refined


def test_photos_of_one_shape_share_a_forward_pass_and_batching_changes_nothing() -> None:
    images = [LoadedImage(f"{i}", photo(40, 60 if i < 3 else 40, seed=i)) for i in range(5)]

    def run(batch_size: int, flow: Flow | None = None) -> tuple[pa.Table, list[int]]:
        backbone = ColourBackbone()
        worker = StegoWorker(
            backbone,
            identity_head(),
            colour_probe(RED, GREEN, BLUE),
            ClassMapParams(image_size=40),
            device="cpu",
            batch_size=batch_size,
            flow=flow,
        )
        return worker.process(images, Phases()), backbone.batches

    (alone, _), (together, batches), (overlapped, _) = run(1), run(5), run(2, Overlapped(2))
    assert alone.equals(together)
    assert alone.equals(overlapped)
    assert batches == [3, 3, 2, 2]  # both directions of each


def test_a_failure_names_its_images_and_a_head_of_another_backbone_is_refused() -> None:
    class Broken(ColourBackbone):
        def tokens(self, images: Tensor) -> Tensor:
            raise MemoryError("no room")

    with pytest.raises(RuntimeError, match="MemoryError on a, b: no room"):
        TeacherWorker(Broken(), TeacherParams(16), device="cpu", batch_size=2).process(
            [LoadedImage("a", photo(9, 9)), LoadedImage("b", photo(9, 9))], Phases()
        )
    with pytest.raises(ValueError, match="the head takes 5 channels, the backbone gives 4"):
        StegoWorker(ColourBackbone(), StegoHead(5), colour_probe(RED), ClassMapParams(), device="cpu")
