"""The report of a tiny run made in this process, without Ray, from a source with the worst file names."""

from __future__ import annotations

import base64
import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from PIL import Image

from pipeline.config import parse_config
from pipeline.engine.receipts import Receipt, ReceiptLog
from pipeline.errors import ConfigError
from pipeline.report.write import duration, open_run, percent, size, write_pages, write_report
from pipeline.store import storage
from tests.pipeline.report.tiny_runs import Page, config_of, make_run, report_of, scene, squeezed, table_of

EVIL = '<script>alert(1)</script>&".jpg'  # the slash makes it a folder and a file
EVIL_MEMBER = "../../etc/<img src=x onerror=alert(1)>.jpg"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `photos` (seven good ones, two bad) and the complete `run` of them."""
    root = tmp_path_factory.mktemp("report")
    photos = root / "photos"
    (photos / EVIL).parent.mkdir(parents=True)
    (photos / EVIL).write_bytes(scene(0))
    for number in range(1, 7):
        (photos / f"{number}.jpg").write_bytes(scene(number))
    (photos / "broken<b>.jpg").write_bytes(b"not a photo")
    (photos / "empty.jpg").write_bytes(b"")
    (photos / "raw.dng").write_bytes(b"")
    make_run(config_of(photos, root / "run"))
    return root


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    """A copy of the complete run that a test may change; its photos are those of `finished`."""
    return Path(shutil.copytree(finished / "run", tmp_path / "run"))


def test_the_page_is_complete_and_needs_nothing_else(run: Path) -> None:
    page = report_of(run)
    assert not page.open
    assert not {"script", "link", "iframe", "object", "base", "form", "a"} & set(page.tags)
    sources = page.values("img", "src")
    assert len(sources) >= 14
    for source in sources:
        head, _, data = source.partition(",")
        assert head == "data:image/jpeg;base64"
        with Image.open(io.BytesIO(base64.b64decode(data, validate=True))) as image:
            assert image.height <= 240
    assert all(name not in {"href", "srcset", "onerror", "onload"} for _, name, _ in page.attributes)


def test_the_page_says_what_was_counted(run: Path) -> None:
    text = squeezed(report_of(run).text)
    assert "9 images" in text
    assert "ok 7 77.8 %" in text
    assert "2 classes with members of 3 clusters" in text
    assert "Stuff" not in text and "stuff" not in text.split("Configuration")[0]
    assert "2 images without labels" in text
    assert "9 images, evenly spaced" in text
    assert "Where the time of instances went" in text and "maskcut" in text
    assert "Not complete" not in text
    for stage in table_of(run).values():
        assert stage.fingerprint in text
    assert "undecodable broken<b>.jpg" in text


def test_the_similarities_of_patches_stand_beside_tau(run: Path) -> None:
    page = report_of(run)
    assert "Similarity of two patches" in page.text and "cosine of keys" in page.text
    assert "tau 0.15" in page.text


def test_categories_have_the_names_of_the_parts(run: Path) -> None:
    text = squeezed(report_of(run).text)
    assert "thing one & only cluster 0 5 instances" in text
    assert "class 3 cluster 2 2 instances" in text


def test_files_that_were_not_taken_are_said(run: Path) -> None:
    assert write_pages(str(run), None, naming=False).left_out == {
        ".dng (photos ending in .dng are not read; convert them)": 1
    }
    text = squeezed(report_of(run).text)
    assert "Left out 1 .dng (photos ending in .dng are not read; convert them)" in text


def test_names_are_escaped(run: Path) -> None:
    page = report_of(run)
    html = (run / "report.html").read_text()
    assert EVIL in page.text
    assert EVIL in page.values("img", "alt")
    assert "script" not in page.tags
    assert "<script" not in html
    assert "broken<b>.jpg" in page.text
    assert "b" not in page.tags


def test_members_of_a_tar_are_escaped_and_drawn(tmp_path: Path) -> None:
    source = tmp_path / "photos"
    source.mkdir()
    with tarfile.open(source / "a.tar", "w") as tar:
        for name, data in ((EVIL_MEMBER, scene(1)), ("\u202egpj.jpg", scene(2))):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    make_run(config_of(source, tmp_path / "run"))
    page = report_of(tmp_path / "run")
    assert f"a.tar/{EVIL_MEMBER}" in page.text
    assert f"a.tar/{EVIL_MEMBER}" in page.values("img", "alt")
    assert "x" not in page.values("img", "src")
    assert not [name for _, name, _ in page.attributes if name == "onerror"]
    assert not list(tmp_path.rglob("etc"))


def test_the_same_run_gives_the_same_page(run: Path) -> None:
    report_of(run)
    first = (run / "report.html").read_bytes()
    report_of(run)
    assert (run / "report.html").read_bytes() == first


def test_before_the_panoptic_stage_the_instances_are_shown(run: Path) -> None:
    shutil.rmtree(run / "panoptic")
    shutil.rmtree(run / "clusters")
    page = report_of(run)
    text = squeezed(page.text)
    assert "Not complete: clusters, panoptic." in text
    assert "coloured by the order in which they were found" in text
    assert "The stage clusters is not done yet" in text
    assert len(page.values("img", "src")) == 14


def test_clusters_without_panoptic_parts_have_sizes_and_no_members(run: Path) -> None:
    shutil.rmtree(run / "panoptic")
    text = squeezed(report_of(run).text)
    assert "Not complete: panoptic." in text
    assert "thing one" not in text.split("largest")[-1]
    assert "5 instances" in text


def test_a_panoptic_stage_in_part_is_shown_where_it_is_done(run: Path) -> None:
    panoptic = table_of(run)["panoptic"]
    Path(panoptic.part(0)).unlink()
    text = squeezed(report_of(run).text)
    assert "Not complete: panoptic (2 of 3 shards are there)." in text
    assert "by the order of discovery where the panoptic part is missing" in text


def test_photos_that_are_gone_or_changed_become_tiles(tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    for number in range(3):
        (photos / f"{number}<i>.jpg").write_bytes(scene(number))
    make_run(config_of(photos, tmp_path / "run"))
    (photos / "0<i>.jpg").unlink()
    Image.new("RGB", (50, 40)).save(photos / "1<i>.jpg")
    page = report_of(tmp_path / "run")
    assert "FileNotFoundError" in page.text and "0<i>.jpg" in page.text
    assert "the photo is 50x40, its labels are 96x72" in page.text
    assert page.values("img", "alt")[:2] == ["2<i>.jpg", "2<i>.jpg with its labels"]
    assert page.tags.count("i") == page.values("i", "class").count("dot") > 0  # no name became an element


def test_failed_shards_are_listed_with_their_last_line(run: Path) -> None:
    panoptic = table_of(run)["panoptic"]
    Path(panoptic.part(2)).unlink()
    log = ReceiptLog(str(run), "panoptic", panoptic.fingerprint)
    trace = "Traceback\n  File x\nRuntimeError: <disk> full"
    log.append(Receipt("panoptic", panoptic.fingerprint, 2, False, 1.0, error=trace))
    log.flush()
    text = squeezed(report_of(run).text)
    assert "1 failed shard Run the same command again" in text
    assert "panoptic 2 RuntimeError: <disk> full" in text


def test_fewer_photos_and_no_clusters_can_be_asked_for(run: Path) -> None:
    page = report_of(run, max_photos=2, max_clusters=0)
    assert squeezed(page.text).count("evenly spaced over the data set") == 1
    assert "2 images, evenly spaced" in squeezed(page.text)
    assert len(page.values("img", "src")) <= 4


def test_a_config_file_is_as_good_as_the_folder(finished: Path, tmp_path: Path) -> None:
    config = config_of(finished / "photos", finished / "run")
    (tmp_path / "run.yaml").write_text(config.to_yaml())
    by_config = write_report(str(tmp_path / "run.yaml"), str(tmp_path / "a.html"))
    by_folder = write_report(str(finished / "run"), str(tmp_path / "b.html"))
    assert (by_config, by_folder) == (str(tmp_path / "a.html"), str(tmp_path / "b.html"))
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()


def test_a_run_in_a_bucket_is_reported_there(run: Path, s3_bucket: str) -> None:
    for file in sorted(path for path in run.rglob("*") if path.is_file()):
        storage.write_bytes(storage.join(s3_bucket, "run", file.relative_to(run).as_posix()), file.read_bytes())
    where = write_report(f"{s3_bucket}/run", None)
    assert where == f"{s3_bucket}/run/report.html"
    page = Page(storage.read_bytes(where).decode())
    assert page.values("img", "src") == report_of(run).values("img", "src")
    assert f"{s3_bucket}/run" in page.text


def test_no_weights_are_needed_for_the_last_run(run: Path, tmp_path: Path) -> None:
    latest = json.loads((run / "latest.json").read_text())
    latest["config"]["backbone"] = {"name": "dino_vitb8", "weights": "/nowhere/vit.pth"}
    (run / "latest.json").write_text(json.dumps(latest))
    open_run(str(run))
    config = parse_config({**latest["config"], "run": {"uri": str(run)}}, origin="test")
    latest["config"] = config.model_dump()
    (run / "latest.json").write_text(json.dumps(latest))
    same, other = tmp_path / "same.yaml", tmp_path / "other.YML"
    nine = {**latest["config"], "workers": {**latest["config"]["workers"], "size": 9}}
    same.write_text(parse_config(nine, origin="test").to_yaml())
    other.write_text(config.model_copy(update={"seed": 5}).to_yaml())
    assert open_run(str(same)).stages == open_run(str(run)).stages
    with pytest.raises(ConfigError, match=r"backbone.weights: no file.*\nor give the run folder"):
        open_run(str(other))


def test_credentials_are_not_shown(run: Path) -> None:
    latest = json.loads((run / "latest.json").read_text())
    latest["config"]["source"]["uri"] = "s3://someone:tiger@bucket/photos"  # refused, but not with the secret
    (run / "latest.json").write_text(json.dumps(latest))
    with pytest.raises(ConfigError, match=r"source\.uri: holds credentials.*s3://\*\*\*@bucket/photos") as caught:
        write_report(str(run), None)
    assert "tiger" not in str(caught.value)


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no run in .*latest\.json"):
        write_report(str(tmp_path), None)
    with pytest.raises(ConfigError, match="no run in"):
        write_report(str(tmp_path / "nowhere"), None)
    with pytest.raises(ConfigError, match="no config file"):
        write_report(str(tmp_path / "nowhere.yaml"), None)


def test_a_run_with_nothing_done_is_refused(run: Path, tmp_path: Path) -> None:
    shutil.rmtree(run / "instances")
    with pytest.raises(ConfigError, match=r"nothing is done yet.*no part of the stage instances"):
        write_report(str(run), None)
    shutil.rmtree(run / "index")
    with pytest.raises(ConfigError, match="nothing is done yet"):
        write_report(str(run), None)


def test_a_damaged_record_of_the_run_is_refused(run: Path) -> None:
    (run / "latest.json").write_text('{"config": {')
    with pytest.raises(ConfigError, match="not what u2label run writes"):
        write_report(str(run), None)


def test_a_place_that_cannot_be_written_is_refused(run: Path) -> None:
    with pytest.raises(ConfigError, match="--output: cannot write"):
        write_report(str(run), str(run / "latest.json" / "report.html"))


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0214, "21.4 ms"),
        (7.126, "7.13 s"),
        (59.96, "60 s"),
        (71.6, "1 min 12 s"),
        (119.8, "2 min 0 s"),
        (9000, "2.5 h"),
    ],
)
def test_times_are_short(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("count", "text"), [(12, "12 B"), (5480, "5.35 KiB"), (1010 * 1024, "1010 KiB"), (2**31, "2 GiB")]
)
def test_sizes_are_short(count: int, text: str) -> None:
    assert size(count) == text


@pytest.mark.parametrize(
    ("share", "text"),
    [
        (0, "0.0 %"),
        (0.0001, "< 0.1 %"),
        (0.0005, "0.1 %"),
        (0.1234, "12.3 %"),
        (0.9994, "99.9 %"),
        (0.99951, "> 99.9 %"),
        (1, "100.0 %"),
    ],
)
def test_shares_are_never_rounded_to_nothing_or_all(share: float, text: str) -> None:
    assert percent(share) == text
