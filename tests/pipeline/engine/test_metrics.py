"""What Prometheus sees of a stage, and that the dashboard asks for nothing else."""

from __future__ import annotations

import json
import re
import time
import urllib.request
from pathlib import Path

import pytest

from pipeline.engine import metrics
from pipeline.engine.metrics import StageMetrics, exported_names, in_ascii
from pipeline.engine.receipts import Receipt

DASHBOARD = Path(__file__).resolve().parents[3] / "docker" / "grafana-dashboard.json"


def receipts() -> list[Receipt]:
    done = Receipt(
        "instances",
        "abc",
        0,
        True,
        9.0,
        rows={"ok": 5, "undecodable": 1},
        seconds={"crf": 2.5, "write": 0.0},
        instances=11,
        bytes=1000,
        peak_memory_mb=700.0,
    )
    failed = Receipt("instances", "abc", 1, False, 1.0, error="boom", peak_memory_mb=650.0)
    return [done, failed]


class Recorded:
    """In place of Ray's counters and gauges: the totals by name and tags."""

    totals: dict[tuple[str, ...], float]
    runs: set[str]

    def __init__(self, name: str, description: str, tag_keys: tuple[str, ...]) -> None:
        self.name, self.keys = name, tag_keys

    def _key(self, tags: dict[str, str]) -> tuple[str, ...]:
        assert set(tags) == set(self.keys)
        assert all(value.isascii() for value in tags.values())  # as Ray demands
        self.runs.add(tags["run"])
        return (self.name, *(tags[key] for key in self.keys if key != "run"))

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0  # as Ray demands
        key = self._key(tags)
        self.totals[key] = self.totals.get(key, 0) + value

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.totals[self._key(tags)] = value


def test_receipts_are_counted_by_stage_status_and_phase(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.util.metrics.Counter", Recorded)
    monkeypatch.setattr("ray.util.metrics.Gauge", Recorded)
    Recorded.totals, Recorded.runs = {}, set()
    stage = StageMetrics("s3://bucket/run", "instances", done=3, pending=4)
    for receipt in receipts():
        stage.add(receipt)
    assert Recorded.totals == {
        ("u2label_images", "instances", "ok"): 5,
        ("u2label_images", "instances", "undecodable"): 1,
        ("u2label_seconds", "instances", "crf"): 2.5,
        ("u2label_instances", "instances"): 11,
        ("u2label_bytes", "instances"): 1000,
        ("u2label_shards", "instances", "ok"): 1,
        ("u2label_shards", "instances", "failed"): 1,
        ("u2label_shards_done", "instances"): 4,
        ("u2label_shards_pending", "instances"): 3,
        ("u2label_peak_memory_mb", "instances"): 700.0,
    }


def test_a_run_folder_that_is_not_ascii_is_named_by_its_percent_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("ray.util.metrics.Counter", Recorded)
    monkeypatch.setattr("ray.util.metrics.Gauge", Recorded)
    Recorded.totals, Recorded.runs = {}, set()
    StageMetrics("/data/müller/1 %", "instances", done=0, pending=1).add(receipts()[0])
    assert Recorded.runs == {"/data/m%C3%BCller/1 %"}
    assert in_ascii("not\udcfcutf-8") == "not%FCutf-8"


@pytest.mark.usefixtures("ray_session")
def test_ray_exports_them_under_the_names_that_we_say() -> None:
    import ray

    stage = StageMetrics("run-of-the-test", "instances", done=3, pending=4)
    for receipt in receipts():
        stage.add(receipt)
    (node,) = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + 60  # Ray reports every 10 s
    exported: dict[str, float] = {}
    while len(exported) < 10 and time.monotonic() < deadline:
        time.sleep(0.5)
        lines = urllib.request.urlopen(url, timeout=10).read().decode().splitlines()
        ours = [line.rsplit(" ", 1) for line in lines if 'run="run-of-the-test"' in line]
        exported = {f"{name.split('{')[0]} {_own_tags(name)}": float(value) for name, value in ours}
    assert {name.split()[0] for name in exported} == exported_names()
    assert exported["ray_u2label_images_total undecodable"] == 1
    assert exported["ray_u2label_shards_pending "] == 3


def _own_tags(name: str) -> str:
    return ",".join(re.findall(r'(?:status|phase|outcome)="(\w+)"', name))


def test_the_dashboard_asks_for_names_and_tags_that_exist() -> None:
    dashboard = json.loads(DASHBOARD.read_text())
    expressions = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    variables = [variable["query"] for variable in dashboard["templating"]["list"] if variable["type"] == "query"]
    asked = set(re.findall(r"ray_\w+", " ".join(expressions + variables)))
    assert asked == exported_names()  # and everything that is exported can be seen
    keys = {f"ray_{name}": keys for name, (_, keys) in {**metrics.COUNTERS, **metrics.GAUGES}.items()}
    for expression in expressions:
        for name, tags in re.findall(r"(ray_\w+)\{([^}]*)\}", expression):
            named = set(re.findall(r"(\w+)[=!]", tags))
            assert named <= set(keys[name.removesuffix("_total")]), expression
        assert expression.count("(") == expression.count(")")
    assert len({panel["id"] for panel in dashboard["panels"]}) == len(dashboard["panels"])
