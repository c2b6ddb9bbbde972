"""Photos -> overlays and COCO panoptic files; bad photos, names, bad outputs."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from model.checkpoint.files import save_checkpoint
from pipeline.clusters.names import FORMAT, Names
from pipeline.errors import ConfigError
from pipeline.predict import load_predictor, predict_photos
from pipeline.predict.run import PhotoResult, PredictSummary, print_header, print_photo, print_summary
from pipeline.sources.coco import CocoPanoptic
from pipeline.sources.names import OutputNames
from pipeline.store import storage
from tests.pipeline.label_files import categories
from tests.pipeline.sources.image_sources import put, tar
from tests.tiny_panoptic import KEYWORDS, STUFF, THINGS, scene, tiny_model
from workers.records import Status


def png(height: int, width: int, seed: int = 0) -> bytes:
    stream = io.BytesIO()
    Image.fromarray(scene(height, width, seed)).save(stream, format="PNG")
    return stream.getvalue()


PHOTOS = {"a/1.png": png(60, 80), "b/1.png": png(60, 80, 1), "bad.jpg": b"text", "c.png": png(70, 50, 2)}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("weights") / "checkpoint"
    config = {"num_things": THINGS, "num_stuff": STUFF, "model": KEYWORDS, "short": 96}
    save_checkpoint(folder, tiny_model().state_dict(), config)
    return str(folder)


def predict(weights: str, source: str, **arguments: Any) -> PredictSummary:
    """Of `source`/photos to `source`/out."""
    inputs, output = storage.join(source, "photos"), storage.join(source, "out")
    return predict_photos(weights, inputs, output, **arguments)


def test_every_photo_has_an_overlay_and_a_label_that_readers_open(weights: str, source: str) -> None:
    put(storage.join(source, "photos"), PHOTOS)
    results: list[PhotoResult] = []
    summary = predict(weights, source, batch_size=2, on_photo=results.append)
    assert summary.photos == 3 and [one.image_id for one in summary.failed] == ["bad.jpg"]
    assert [one.image_id for one in results] == list(PHOTOS)

    labels = CocoPanoptic(summary.files["panoptic.json"])
    assert labels.names == ["a/1.png", "b/1.png", "c.png"]
    assert {c.id: c.is_thing for c in labels.categories.values()} == {1: True, 2: True, 3: True, 4: False, 5: False}
    for result in results:
        if result.status == Status.OK:
            read = labels.read(result.image_id)  # ids, segments, categories and sizes are checked there
            assert (result.things, result.stuff) == tuple(
                sum((s.category <= THINGS) is k for s in read.segments) for k in (True, False)
            )
            assert result.overlay is not None and result.seconds > 0
            with Image.open(io.BytesIO(storage.read_bytes(result.overlay))) as overlay:
                assert overlay.size == read.ids.shape[::-1]


def test_the_files_say_what_a_call_of_the_predictor_says(weights: str, tmp_path: Path) -> None:
    put(str(tmp_path / "photos"), PHOTOS)
    predict(weights, str(tmp_path), score=0.4, batch_size=4)
    read = CocoPanoptic(str(tmp_path / "out" / "panoptic.json")).read("b/1.png")
    ids, segments = load_predictor(weights, score=0.4)(scene(60, 80, 1)).panoptic()
    assert np.array_equal(read.ids, ids.numpy())
    assert [(s.id, s.category) for s in read.segments] == [(s.id, s.category) for s in segments]


def test_areas_and_boxes_in_the_json_are_those_of_the_png(weights: str, tmp_path: Path) -> None:
    put(str(tmp_path / "photos"), PHOTOS)
    predict(weights, str(tmp_path))
    document = json.loads((tmp_path / "out" / "panoptic.json").read_text())
    assert [image["id"] for image in document["images"]] == [1, 2, 4], "the bad photo has its place, and no label"
    for annotation in document["annotations"]:
        with Image.open(tmp_path / "out" / "panoptic" / annotation["file_name"]) as picture:
            rgb = np.asarray(picture).astype(int)
        ids = rgb[..., 0] + 256 * rgb[..., 1] + 65536 * rgb[..., 2]
        for segment in annotation["segments_info"]:
            ys, xs = np.nonzero(ids == segment["id"])
            assert segment["area"] == len(ys)
            assert segment["bbox"] == [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert ("score" in segment) == (segment["category_id"] <= THINGS)


def test_the_same_prediction_again_replaces_its_files_with_the_same(weights: str, tmp_path: Path) -> None:
    put(str(tmp_path / "photos"), PHOTOS)

    def contents() -> dict[str, bytes]:
        predict(weights, str(tmp_path))
        return {str(f): f.read_bytes() for f in (tmp_path / "out").rglob("*") if f.is_file()}

    assert contents() == contents()


def test_an_output_with_something_else_in_it_is_refused(weights: str, tmp_path: Path) -> None:
    put(str(tmp_path / "photos"), PHOTOS)
    predict(weights, str(tmp_path))
    with pytest.raises(ConfigError, match=r"predictions of other weights, photos or settings .* give another folder"):
        predict(weights, str(tmp_path), score=0.9)
    with pytest.raises(ConfigError, match="holds other files; give a new or an empty folder"):
        predict_photos(weights, str(tmp_path / "photos"), str(tmp_path / "photos" / "a"))
    with pytest.raises(ConfigError, match="is a file; give a folder"):
        predict_photos(weights, str(tmp_path / "photos"), str(tmp_path / "photos" / "c.png"))


def test_an_output_that_cannot_be_written_is_refused(weights: str, tmp_path: Path) -> None:
    put(str(tmp_path / "photos"), PHOTOS)
    with pytest.raises(ConfigError, match=r"--output: cannot write to .*; give a folder that can be written"):
        predict_photos(weights, str(tmp_path / "photos"), str(tmp_path / "photos" / "c.png" / "below"))


def test_nothing_is_written_when_weights_or_inputs_are_wrong(weights: str, tmp_path: Path) -> None:
    put(str(tmp_path / "photos"), PHOTOS)
    with pytest.raises(ConfigError, match="--weights"):
        predict(str(tmp_path / "nowhere"), str(tmp_path))
    with pytest.raises(ConfigError, match="--input"):
        predict_photos(weights, str(tmp_path / "photos" / "*.gif"), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_an_input_that_is_the_output_is_refused(weights: str, tmp_path: Path) -> None:
    put(str(tmp_path / "photos"), PHOTOS)
    with pytest.raises(ConfigError, match="lie in the output folder"):
        predict_photos(weights, str(tmp_path / "photos"), str(tmp_path))


def test_names_are_drawn_and_listed(weights: str, tmp_path: Path) -> None:
    put(str(tmp_path / "photos"), {"1.png": PHOTOS["a/1.png"]})
    summary = predict(weights, str(tmp_path), names={2: "duck", 5: "lake"})
    named = [c.name for c in CocoPanoptic(summary.files["panoptic.json"]).categories.values()]
    assert named == ["thing 1", "duck", "thing 3", "stuff 1", "lake"]


def test_named_classes_are_merged_and_noise_is_left_out(tmp_path: Path) -> None:
    put(str(tmp_path / "photos"), PHOTOS)
    config = {"num_things": THINGS, "num_stuff": STUFF, "model": KEYWORDS, "short": 96}
    listed = categories(THINGS, STUFF)
    save_checkpoint(tmp_path / "weights", tiny_model().state_dict(), config | {"categories": listed})
    said = {1: {"name": "duck"}, 2: {"merge": 1}, 3: {"noise": True}, 4: {"name": "lake"}}
    counts = {"things": THINGS, "stuff": STUFF}
    names = Names.model_validate({"format": FORMAT, "fits": {"things": "x"}, "classes": counts, "names": said})

    def maps(out: str, **arguments: Any) -> dict[str, np.ndarray]:
        arguments |= {"score": 0.3}
        summary = predict_photos(str(tmp_path / "weights"), str(tmp_path / "photos"), str(tmp_path / out), **arguments)
        labels = CocoPanoptic(summary.files["panoptic.json"])
        images = [labels.read(name) for name in labels.names]
        lists = ({0: 0} | {one.id: one.category for one in image.segments} for image in images)
        found = {i.name: np.vectorize(of.get)(i.ids) for i, of in zip(images, lists, strict=True)}
        return found | {"names": np.array([labels.categories[c].name for c in sorted(labels.categories)])}

    plain, named = maps("plain"), maps("named", classes=names)
    assert named.pop("names").tolist() == ["duck", "lake", "stuff 2"] and len(plain.pop("names")) == THINGS + STUFF
    assert {1, 2, 3} & set(np.unique(np.concatenate([found.ravel() for found in plain.values()])))
    for name, found in plain.items():
        assert (named[name] == np.array([0, 1, 1, 0, 2, 3])[found]).all()
    with pytest.raises(ConfigError, match="holds predictions of other weights, photos or settings"):
        maps("named", classes=Names.model_validate(names.model_dump() | {"names": said | {2: {"noise": True}}}))
    other = names.model_copy(update={"classes": names.classes.model_copy(update={"things": 9})})
    with pytest.raises(ConfigError, match=r"weights has 5 categories, which are neither the 9 things and 2 stuff"):
        maps("other", classes=other)


def test_photos_with_too_many_pixels_are_not_decoded(weights: str, tmp_path: Path) -> None:
    put(str(tmp_path / "photos"), {"1.png": PHOTOS["a/1.png"]})
    summary = predict(weights, str(tmp_path), max_pixels=60 * 80 - 1)
    assert [(one.image_id, one.status) for one in summary.failed] == [("1.png", Status.TOO_LARGE)]


def test_a_photo_that_leads_out_of_the_output_stays_in_it(weights: str, tmp_path: Path) -> None:
    put(str(tmp_path), {"photos.tar": tar([("../../../1.png", PHOTOS["a/1.png"]), ("/etc/2.png", PHOTOS["c.png"])])})
    predict_photos(weights, str(tmp_path / "photos.tar"), str(tmp_path / "x" / "out"))
    written = sorted(str(f.relative_to(tmp_path)) for f in tmp_path.rglob("*.png"))
    assert written == ["x/out/panoptic/photos.tar/_/_/_/1.png", "x/out/panoptic/photos.tar/etc/2.png"]


# Names of files


def test_names_of_photos_that_differ_in_their_ending_alone() -> None:
    names = OutputNames()
    photos = ["a/1.jpg", "b/1.jpg", "a/1.png", "A/1.JPG", "rows.parquet#3", "t.tar/x.jpg~2", "a/1.png"]
    expected = ["a/1", "b/1", "a/1.png", "A/1.JPG", "rows.parquet#3", "t.tar/x.jpg~2", "a/1.png~2"]
    assert [names.claim(photo) for photo in photos] == expected


@given(st.lists(st.text(st.sampled_from("aB./~#"), max_size=8), max_size=12))
def test_names_never_meet_and_never_leave_the_folder(photos: list[str]) -> None:
    names = OutputNames()
    claimed = [names.claim(photo) for photo in photos]
    assert len({name.lower() for name in claimed}) == len(photos)
    for name in claimed:
        assert name and not name.startswith("/") and not {"", ".", ".."} & set(name.split("/"))


# What is printed


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    print_header()
    print_photo(PhotoResult("a/1.png", Status.OK, None, things=3, stuff=12, seconds=1.234))
    bad = PhotoResult("bad.jpg", Status.UNDECODABLE, "not an image")
    print_photo(bad)
    print_summary(PredictSummary({"overlays": "out/overlays"}, photos=1, failed=[bad]))
    assert capsys.readouterr().out.splitlines() == [
        "things  stuff  seconds  image",
        "     3     12     1.23  a/1.png",
        "     -      -        -  bad.jpg: undecodable: not an image",
        "1 photos, 1 could not be read",
        "out/overlays",
    ]
