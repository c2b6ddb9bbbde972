"""The page on which classes get their names: what it shows, and that it fits into a mail."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.clusters.names import NAMES
from pipeline.report.members import FOUND, pick_examples, sample_members
from pipeline.report.naming import LEAST_BYTES, NamingPage, Near, Row, _datus_fit, describe_naming, room, scripts
from pipeline.report.pictures import Crop
from pipeline.report.rows import Member
from pipeline.report.write import render_naming, write_pages
from pipeline.stages.parts import PanopticParts, find_parts
from pipeline.stages.run import open_run
from tests.pipeline.report.named_runs import fit_name, make_named_run, write_names
from tests.pipeline.report.tiny_runs import Page, config_of, make_run, report_of, scene
from workers import overlay

K, STUFF = 10, 2


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of ten classes of things, twelve instances each, and two of stuff."""
    root = tmp_path_factory.mktemp("naming")
    make_named_run(root, k=K, stuff=STUFF, photos=10, shard_size=3)
    return root


@pytest.fixture(scope="module")
def described(finished: Path) -> NamingPage:
    page = describe_naming(open_run(str(finished / "run")))
    assert page is not None
    return page


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def test_each_class_has_typical_untypical_and_random_instances(described: NamingPage) -> None:
    assert sorted(row.category for row in described.things) == list(range(1, K + 1))
    assert [row.size for row in described.things] == [12] * K
    for row in described.things:
        assert [title for title, _ in row.rows] == ["most typical", "least typical", "at random"]
        assert all(crop.picture for _, crops in row.rows for crop in crops)
        assert [len(crops) for _, crops in row.rows] == [3, 3, 3]
    # Instance n of the run is of cluster n % 10, the less alike the later; a photo has twelve.
    typical, least, random = (
        [crop.image_id for crop in crops] for _, crops in min(described.things, key=lambda row: row.category).rows
    )
    assert typical == ["0000.jpg", "0000.jpg", "0001.jpg"]
    assert least == ["0009.jpg", "0008.jpg", "0007.jpg"]
    assert len(random) == 3 and set(random) <= {f"000{n}.jpg" for n in range(2, 8)}


def test_no_instance_is_shown_twice(finished: Path) -> None:
    sampled = sample_members(open_run(str(finished / "run")), 3)
    assert sampled.images == 10 and (sampled.parts_read, sampled.parts) == (4, 4)
    for examples in sampled.examples.values():
        assert len(set(examples.all)) == len(examples.all)
    assert sampled.examples[1].typical[0] == Member(0, 0, segment=1)


def test_stuff_goes_by_its_size(described: NamingPage, finished: Path) -> None:
    assert [row.name for row in described.stuff] == ["stuff 1", "stuff 2"]
    for row in described.stuff:
        assert [title for title, _ in row.rows] == ["largest", "smallest"]
        assert row.size == 5 and 0.05 < row.share < 0.5
    assert described.stuff[0].share >= described.stuff[1].share
    labels = PanopticParts(find_parts(str(finished / "run")))
    labelled = np.mean([labels.read(name).ids > 0 for name in labels.names])  # all photos are of one size
    assert sum(row.share for row in [*described.things, *described.stuff]) == pytest.approx(labelled)


def test_specks_of_stuff_are_shown_only_where_there_is_nothing_else() -> None:
    found = np.zeros(8, FOUND)
    found["row"], found["score"], found["draw"] = range(8), range(8, 0, -1), 0.5
    found["share"] = [0.5, 0.4, 0.3, 0.2, 0.1, 0.001, 0.001, 0.001]
    shown = pick_examples(found, 2)
    assert [[member.row for member in kind] for kind in (shown.typical, shown.least, shown.random)] == [
        [0, 1],
        [4, 3],
        [2],
    ]
    assert [member.row for member in pick_examples(found[4:], 2).all] == [4, 5, 7, 6]


def test_the_nearest_classes_are_those_of_the_centroids(described: NamingPage, finished: Path) -> None:
    folder = open_run(str(finished / "run")).stages["clusters"].folder
    cosines = (centroids := np.load(Path(folder) / "centroids.npy")) @ centroids.T
    for row in described.things:
        order = [other for other in np.argsort(-cosines[row.category - 1]) + 1 if other != row.category][:4]
        assert [near.category for near in row.nearest] == order
        assert row.nearest[0].similarity == pytest.approx(cosines[row.category - 1, order[0] - 1], abs=1e-6)
    assert [near.category for near in described.stuff[0].nearest] == [K + 2]


def test_the_page_needs_nothing_else_and_runs_no_other_script(run: Path) -> None:
    written = write_pages(str(run), None, max_photos=1, max_clusters=0)
    assert written.clusters == f"{run}/clusters.html"
    html = Path(written.clusters).read_text(encoding="utf-8")
    assert "clusters.html" in Path(written.report).read_text(encoding="utf-8")
    (policy,) = re.findall(r'Content-Security-Policy" content="([^"]*)"', html)
    digests = [base64.b64encode(hashlib.sha256(text.encode()).digest()).decode() for text in scripts()]
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    assert policy == f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src {allowed}"
    assert re.findall(r"<script>(.*?)</script>", html, re.DOTALL) == scripts()
    page = Page(re.sub(r"<script>.*?</script>", "", html, flags=re.DOTALL))
    assert {"link", "iframe", "object", "base", "script"} & set(page.tags) == set()
    assert all(source.startswith("data:image/webp;base64,") for source in page.values("img", "src"))
    assert not [name for _, name, _ in page.attributes if name.startswith("on")]
    assert page.values("input", "aria-label").count("Name of thing 7") == 1


def test_the_page_knows_the_fits_and_begins_with_the_names_that_are_stored(run: Path, finished: Path) -> None:
    table = open_run(str(run)).stages
    fits = {"things": fit_name(table["clusters"]), "stuff": fit_name(table["semantics_fit"])}
    names = {3: {"name": 'a "<b>cat</b>"'}, 4: {"merge": 3}}
    write_names(run / NAMES, table, K, STUFF, names)
    page = describe_naming(open_run(str(run)))
    assert page is not None and page.note is None
    assert (json.loads(page.fits), json.loads(page.classes)) == (fits, {"things": K, "stuff": STUFF})
    entries = {row.category: json.loads(row.entry) for row in page.things if row.entry != "{}"}
    assert entries == names
    assert "<b>" not in render_naming(page)


def test_the_report_calls_classes_by_their_names(run: Path) -> None:
    table = open_run(str(run)).stages
    write_names(run / NAMES, table, K, STUFF, {3: {"name": "cat & dog"}, 4: {"merge": 3}, K + 1: {"name": "sky"}})
    text = " ".join(report_of(run, max_photos=3, max_clusters=K).text.split())
    assert "cat & dog cluster 2 12 instances" in text and "cat & dog cluster 3 12 instances" in text
    assert "thing 5 cluster 4" in text and "sky" in text and "stuff 2" in text
    assert "thing 4" not in text and "stuff 1" not in text


def test_names_of_another_fit_are_left_alone_and_that_is_said(run: Path) -> None:
    table = open_run(str(run)).stages
    file = run / NAMES
    write_names(file, table, K, STUFF, {1: {"name": "cat"}})
    file.write_text(file.read_text().replace(table["clusters"].fingerprint, "0" * 12))
    page = describe_naming(open_run(str(run)))
    assert page is not None and "its names are of another fit" in str(page.note)
    assert all(row.entry == "{}" for row in page.things)
    assert "its names are of another fit" in render_naming(page)


def test_classes_without_an_instance_are_left_out_and_counted(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    for number in range(3):
        (tmp_path / "photos" / f"<{number}>.jpg").write_bytes(scene(number))
    make_run(config_of(tmp_path / "photos", tmp_path / "run"))  # its second cluster is empty
    page = describe_naming(open_run(str(tmp_path / "run")))
    assert page is not None
    assert [row.category for row in page.things] == [1, 3] and page.empty == 1 and not page.stuff
    assert "1 without an instance is not shown" in " ".join(Page(render_naming(page)).text.split())


def test_there_is_no_page_before_there_are_labels(run: Path) -> None:
    shutil.rmtree(run / "panoptic")
    written = write_pages(str(run), None, max_photos=1, max_clusters=0)
    assert written.clusters is None and not (run / "clusters.html").exists()
    assert "clusters.html" not in Path(written.report).read_text(encoding="utf-8")


def test_the_page_lies_beside_the_report_whatever_that_is_called(run: Path, tmp_path: Path) -> None:
    written = write_pages(str(run), str(tmp_path / "mine.html"), max_photos=1, max_clusters=0)
    assert written.clusters == str(tmp_path / "mine-clusters.html")
    assert Path(written.clusters).is_file()


def test_eight_hundred_classes_are_less_than_15_mb(described: NamingPage) -> None:
    """With pictures of all the bytes that they may have, and long names."""
    _, most = room(800)
    crop = Crop(f"{'folder' * 8}/photo.jpg", "data:image/webp;base64," + base64.b64encode(bytes(most)).decode())
    near = [Near(category, f"thing {category}", 0.5) for category in range(1, 5)]
    kinds = [(title, [crop] * 3) for title in ("most typical", "least typical", "at random")]
    rows = [Row(number, f"thing {number}", True, "#aabbcc", 12345, 0.5, kinds, near, "{}") for number in range(1, 801)]
    page = NamingPage(**{name: getattr(described, name) for name in NamingPage.__slots__} | {"things": rows})
    assert 11e6 < len(render_naming(page).encode()) < 15e6


@settings(max_examples=10, deadline=None)
@given(st.integers(LEAST_BYTES, 6000), st.integers(0, 2**32 - 1))
def test_a_picture_has_no_more_bytes_than_it_may(most: int, seed: int) -> None:
    noise = np.random.default_rng(seed).integers(0, 256, (144, 100, 3), np.uint8)
    data = overlay.webp_data_uri(noise, most).removeprefix("data:image/webp;base64,")
    assert len(base64.b64decode(data, validate=True)) <= most


def test_fewer_classes_have_larger_pictures() -> None:
    assert [room(classes) for classes in (1, 100, 300, 800, 5000)] == [
        (144, 6000),
        (144, 6000),
        (112, 3333),
        (80, 1250),
        (80, LEAST_BYTES),
    ]


def test_a_fit_of_datus_as_published_has_a_cluster_a_class(tmp_path: Path) -> None:
    np.save(tmp_path / "centroids.npy", np.eye(3, dtype=np.float32))
    centroids, classes = _datus_fit(str(tmp_path))
    assert (centroids.shape, classes.tolist()) == ((3, 3), [0, 1, 2])
    np.save(tmp_path / "classes.npy", np.array([1, 0, 0]))
    assert _datus_fit(str(tmp_path))[1].tolist() == [1, 0, 0]
