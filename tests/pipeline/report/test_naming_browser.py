"""The page of clusters in a real browser, by keyboard alone: three hundred classes, named, merged, saved, and used.

Chromium and its driver are the distribution's (`apt-get install chromium chromium-driver`); without them this is
skipped.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.common.by import By
from selenium.webdriver.common.keys import Keys
from selenium.webdriver.support.ui import WebDriverWait

from pipeline.clusters.names import read_names
from pipeline.export.coco import export_coco
from pipeline.operations.name import name_classes
from pipeline.report.write import write_pages
from pipeline.stages.named import names_of
from pipeline.stages.run import open_run
from tests.pipeline.report.named_runs import make_named_run

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")
K, STUFF = 300, 3

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason="there is no chromium with a chromedriver here")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("browser")
    make_named_run(folder, k=K, stuff=STUFF, photos=25, shard_size=25)
    write_pages(str(folder / "run"), None, max_photos=1, max_clusters=0)
    return folder / "run"


class Browser:
    """A page that is open, and what was said or asked of it."""

    def __init__(self, driver: webdriver.Chrome, downloads: Path) -> None:
        self.driver, self.downloads = driver, downloads

    def open(self, page: Path) -> None:
        self.driver.get(page.as_uri())
        WebDriverWait(self.driver, 20).until(lambda _: "to go" in self.text("#counts"))

    def text(self, selector: str) -> str:
        return self.driver.find_element(By.CSS_SELECTOR, selector).text

    def press(self, *keys: str) -> None:
        """Whatever has the focus gets the keys."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def where(self) -> int:
        """The class that has the focus."""
        return int(self.driver.execute_script("return document.activeElement.closest('.row').id.slice(1)"))

    def at(self, category: int) -> str:
        """Leave a field, and take the focus to a class by finding it: its own name."""
        name = f"thing {category}" if category <= K else f"stuff {category - K}"
        self.press(Keys.ESCAPE, "/")
        self.press(name + Keys.ENTER)
        assert self.where() == category
        return name

    def said(self) -> str:
        return self.text("#said")

    def saved(self) -> Path:
        """The file that `w` saves."""
        file = self.downloads / "names.yaml"
        file.unlink(missing_ok=True)
        self.press(Keys.ESCAPE, "w")
        WebDriverWait(self.driver, 20).until(lambda _: file.exists() and file.stat().st_size)
        return file

    def requests(self) -> list[str]:
        """The addresses that were asked for."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        sent = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
        return [params["request"]["url"] for params in sent]


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    downloads = tmp_path_factory.mktemp("downloads")
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "window-size=1400,1000"):
        options.add_argument(f"--{argument}")
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND")
    options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    chrome = webdriver.Chrome(options, Service(DRIVER))
    yield Browser(chrome, downloads)
    chrome.quit()


@pytest.fixture
def page(driver: Browser, run: Path) -> Browser:
    """The page as if it were opened for the first time."""
    driver.driver.get((run / "clusters.html").as_uri())
    driver.driver.execute_script("localStorage.clear()")
    driver.open(run / "clusters.html")
    return driver


def entries(names: Path) -> dict[int, dict[str, Any]]:
    return {number: entry.model_dump(exclude_defaults=True) for number, entry in read_names(str(names)).names.items()}


def test_three_hundred_classes_are_named_merged_saved_and_used(page: Browser, run: Path, tmp_path: Path) -> None:
    assert page.text("#counts") == "0 named, 0 merged, 0 noise; 303 to go (0 % of the instances)"
    page.press("g", Keys.ENTER)
    order = []
    for number in range(12):
        order.append(page.where())
        page.press(("cat" if number in {0, 5, 9} else f"class {number} “é”") + Keys.ENTER)
    first, *rest = order
    page.press(Keys.ESCAPE)  # the thirteenth; all keys now
    noise = [page.where()]
    page.press("x")
    noise.append(page.where())
    page.press("x")
    as_stuff = page.where()
    page.press("s", Keys.ENTER, "grass" + Keys.ENTER)
    page.press(Keys.ESCAPE)
    near = page.where()
    nearest = int(page.driver.execute_script("return document.activeElement.querySelector('.near li').dataset.id"))
    page.press("1")
    by_name = page.where()
    page.press("m", "cat" + Keys.ENTER)
    page.at(K + 1)
    page.press("m", "grass" + Keys.ENTER)
    expected: dict[int, dict[str, Any]] = {one: {"name": f"class {n} “é”"} for n, one in enumerate(rest, start=1)}
    expected |= {first: {"name": "cat"}, order[5]: {"merge": first}, order[9]: {"merge": first}}
    expected |= {one: {"noise": True} for one in noise} | {as_stuff: {"name": "grass", "stuff": True}}
    expected |= {by_name: {"merge": first}, K + 1: {"merge": as_stuff}}
    expected[near] = {"merge": expected.get(nearest, {}).get("merge", nearest)}
    page.driver.refresh()  # what was typed is kept
    WebDriverWait(page.driver, 20).until(lambda _: "to go" in page.text("#counts"))
    assert page.text("#counts").startswith("11 named, 5 merged, 2 noise; 285 to go (6 %")
    file = page.saved()
    assert entries(file) == expected
    assert file.read_bytes() == read_names(str(file)).to_yaml()
    assert not [url for url in page.requests() if not url.startswith(("file:", "data:", "blob:"))]
    assert page.driver.get_log("browser") == []

    named = name_classes(str(run), str(file))
    assert (named.things, named.stuff, named.noise, named.merged) == (K - 2 - 1 - 4, STUFF, 2, 5)
    exported = export_coco(
        str(run), str(run), output=str(tmp_path / "out"), classes=names_of(open_run(str(run))).written
    )
    assert exported.whole_masks and exported.categories == {"things": K - 7, "stuff": STUFF}
    document = json.loads((tmp_path / "out" / "panoptic_train.json").read_text())
    listed = {category["name"]: category["id"] for category in document["categories"]}
    assert {"cat", "grass", "stuff 2"} <= listed.keys() and "stuff 1" not in listed
    cats = [s for a in document["annotations"] for s in a["segments_info"] if s["category_id"] == listed["cat"]]
    assert len(cats) == 4  # one instance a class


def test_a_change_is_taken_back_and_what_cannot_be_is_refused(page: Browser) -> None:
    page.at(7)
    page.press(Keys.ENTER, "dog" + Keys.ESCAPE)
    page.at(9)
    page.press(Keys.ENTER, "DOG " + Keys.ENTER)
    assert page.said() == "thing 9 is the same as dog (thing 7)"
    assert page.text("#c9 .state") == "the same as dog (thing 7)" and page.text("#c7 .state") == "with thing 9"
    page.at(7)
    page.press("m", "9" + Keys.ENTER)
    assert page.text("#merging .fault") == "thing 9 is dog (thing 7) already"
    page.press(Keys.ESCAPE)
    page.at(K + 1)
    page.press(Keys.ENTER, "dog" + Keys.ENTER)
    assert page.said() == "stuff 1 is stuff, and dog (thing 7) are things: mark those as stuff first"
    assert page.driver.switch_to.active_element.get_attribute("aria-invalid") == "true"
    page.press(Keys.CONTROL + "a", Keys.BACKSPACE, Keys.ESCAPE)
    assert entries(page.saved()) == {7: {"name": "dog"}, 9: {"merge": 7}}
    page.press("u")
    assert entries(page.saved()) == {7: {"name": "dog"}}
    page.at(7)
    page.press(Keys.BACKSPACE)
    assert page.said() == "thing 7: nothing is said of it"
    page.press("u", "x", "u")
    assert entries(page.saved()) == {7: {"name": "dog"}}


def test_an_earlier_file_is_opened_and_one_of_another_run_refused(page: Browser, tmp_path: Path) -> None:
    page.at(7)
    page.press(Keys.ENTER, "dog" + Keys.ENTER)
    file = Path(shutil.copy(page.saved(), tmp_path / "mine.yaml"))
    content = file.read_text()
    page.driver.execute_script("localStorage.clear()")
    page.driver.refresh()
    field = page.driver.find_element(By.ID, "file")
    other = tmp_path / "other.yaml"
    for old, new, said in (
        ('"things": "', '"things": "0', "The file is of another run: its fits is"),
        ("  7:", "  999:", "Line 5: there is no class 999 (there are 1 to 303)"),
        (
            '{"name": "dog"}',
            "{name: dog}",
            "Line 5 is not as this page writes it; u2label name RUN --from FILE reads it",
        ),
        ('{"name": "dog"}', '{"merge": 7}', "The file merges 7 in a circle"),
    ):
        other.write_text(content.replace(old, new))
        field.send_keys(str(other))
        WebDriverWait(page.driver, 20).until(lambda _, said=said: said in page.said())
        assert page.text("#counts").startswith("0 named")
    field.send_keys(str(file))
    WebDriverWait(page.driver, 20).until(lambda _: page.said() == "Opened mine.yaml")
    assert page.text("#counts").startswith("1 named") and page.saved().read_text() == content


def test_everything_has_a_name_for_those_who_do_not_see_it(page: Browser) -> None:
    row = page.driver.find_element(By.ID, "c7")
    controls = row.find_elements(By.CSS_SELECTOR, "input, button, a")
    labels = [control.accessible_name for control in controls]
    assert labels[0] == "Name of thing 7" and all(labels)
    assert sum(label.startswith("Merge thing 7 with ") for label in labels) == 4
    assert all(image.get_attribute("alt") for image in row.find_elements(By.CSS_SELECTOR, ".kinds img"))
    head = page.driver.find_elements(By.CSS_SELECTOR, "header button, header select, header input:not([hidden])")
    assert [control.accessible_name for control in head] == ["Show", "Find", "Undo", "Keys", "Open…", "Save names.yaml"]


def test_classes_are_found_and_those_without_a_name_shown_alone(page: Browser) -> None:
    page.at(12)
    page.press(Keys.ENTER, "bird" + Keys.ESCAPE)
    shown = "return [...document.querySelectorAll('.row')].filter((row) => !row.hidden).map((row) => row.id)"
    page.press("/", "bird")
    assert page.driver.execute_script(shown) == ["c12"]
    page.press(Keys.ENTER)
    assert page.where() == 12
    page.driver.find_element(By.ID, "show").send_keys("without")
    assert len(page.driver.execute_script(shown)) == K + STUFF - 1
    page.press(Keys.TAB, "bird")
    assert page.driver.execute_script(shown) == []
    assert page.text("#none") == "No class is like that."
