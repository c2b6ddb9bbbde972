"""Names that mean the same image, in whatever form of Unicode a disk gives them back."""

from __future__ import annotations

import unicodedata
from pathlib import Path

import pytest

from pipeline.evaluate.labels import open_labels
from pipeline.sources.names import ImageNames
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
