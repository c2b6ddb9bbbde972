"""Names that mean the same image, in whatever form of Unicode a disk gives them back."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from pipeline.evaluate.labels import open_labels
from pipeline.sources.names import ImageNames, OutputNames
from tests.pipeline.sources.image_sources import label_map, png, put

NFC, NFD = (unicodedata.normalize(form, "Zürich/é 例.jpg") for form in ("NFC", "NFD"))


@pytest.mark.parametrize(("run", "truth"), [(NFC, NFD), (NFD, NFC), (NFD, NFD)])
def test_composed_and_decomposed_names_are_the_same_image(run: str, truth: str, tmp_path: Path) -> None:
    assert ImageNames([run, "other.jpg"], "the run").find(truth) == run
    assert ImageNames([run], "the run").find(truth.rpartition("/")[2].replace(".jpg", ".png")) == run
    put(str(tmp_path), {truth.replace(".jpg", ".png"): png(label_map())})
    assert open_labels(str(tmp_path)).claim(run) == truth.replace(".jpg", ".png")


def test_two_images_that_differ_in_form_alone_are_two() -> None:
    with pytest.raises(ValueError, match="could be any of 2 of the run"):
        ImageNames([NFC, NFD], "the run").find(NFC)


def test_rows_of_a_parquet_file_and_members_that_come_again_are_images_of_their_own(tmp_path: Path) -> None:
    names = ["two.parquet#0", "two.parquet#1", "a.tar/x.jpg", "a.tar/x.jpg~2"]
    known = ImageNames(names, "the run")
    assert [known.find(name) for name in names] == names
    assert known.find("two_parquet#1.jpg") == "two.parquet#1"  # a copy
    assert known.find("a.tar/x.png") == "a.tar/x.jpg"
    put(str(tmp_path), {"two.parquet#1.png": png(label_map())})
    assert open_labels(str(tmp_path)).claim("two.parquet#1") == "two.parquet#1.png"
    assert open_labels(str(tmp_path)).claim("two.parquet#0") is None


def test_files_get_names_below_their_folder_that_no_other_has() -> None:
    names = OutputNames()
    claimed = [names.claim(name) for name in ("IMG.JPG", "IMG.jpeg", "img.png", NFC, NFD, "a.png/b.jpg", "../up.jpg")]
    assert claimed == ["IMG", "IMG.jpeg", "img.png", NFC.removesuffix(".jpg"), NFD, "a.png_/b", "_/up"]
    long = [names.claim(f"{'ü' * 120}{i}.jpg") for i in range(2)]
    assert long[0] != long[1] and all(len(name.encode()) <= 200 for name in long)
    assert OutputNames(dots=False).claim("x.tar/photo.v2.jpg") == "x_tar/photo_v2"
    without = OutputNames(folder="images")
    assert [without.claim(name) for name in ("images/a.jpg", "b/images/images.jpg")] == [
        "images_/a",
        "b/images_/images",
    ]
