"""The configuration: defaults, overrides, and errors that name the key, the value and the remedy."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.config import Config, load_config
from pipeline.errors import ConfigError

ROOT = Path(__file__).resolve().parents[3]


def write(folder: Path, text: str) -> str:
    path = folder / "c.yaml"
    path.write_text(text)
    return str(path)


def test_defaults_are_the_published_ones(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "source: {uri: photos}\nrun: {uri: out}\n"))
    assert (config.maskcut.tau, config.maskcut.max_masks, config.maskcut.image_size) == (0.15, 3, 480)
    assert (config.backbone.name, config.backbone.weights) == ("dino_vitb8", "official")
    assert config.source.uri == str(Path("photos").absolute())
    assert config.clusters_seed == config.seed == 0


def test_overrides_reach_nested_keys_and_win(tmp_path: Path) -> None:
    path = write(tmp_path, "source: {uri: a}\nrun: {uri: out}\nmaskcut: {tau: 0.2}\n")
    config = load_config(path, ["maskcut.tau=0.3", "clusters.seed=5", "source.uri=s3://bucket/x/", "seed=2"])
    assert (config.maskcut.tau, config.clusters_seed, config.seed) == (0.3, 5, 2)
    assert config.source.uri == "s3://bucket/x"


def test_a_path_is_taken_as_it_is_written(tmp_path: Path) -> None:
    path = write(tmp_path, "source: {uri: a}\nrun: {uri: out}\n")
    config = load_config(path, ["source.uri=/x/few #1", "run.uri=/y/2024", "backbone.weights='random:1'"])
    assert (config.source.uri, config.run.uri, config.backbone.weights) == ("/x/few #1", "/y/2024", "random:1")
    assert load_config(path, ["source.uri=file:///a/my%20photos"]).source.uri == "/a/my photos"


def test_shown_configuration_loads_to_itself(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, "source: {uri: a}\nrun: {uri: out}\n"))
    again = load_config(write(tmp_path, config.to_yaml()))
    assert again == config
    assert Config.model_validate_json(config.model_dump_json()) == config


def test_copies_weigh_as_one_where_a_cosine_is_given(tmp_path: Path) -> None:
    path = write(tmp_path, "source: {uri: a}\nrun: {uri: out}\n")
    assert load_config(path).clusters.dedup == "none"
    assert load_config(path, ["clusters.dedup=none"]).clusters.dedup == "none"
    assert load_config(path, ["clusters.dedup=0.95"]).clusters.dedup == 0.95


@pytest.mark.parametrize(
    ("text", "overrides", "message"),
    [
        ("source: {uri: a}\nrun: {uri: x}", ["clusters.dedup=0.5"], r"clusters.dedup: .* equal to 0.8 \(got 0.5\)"),
        ("source: {uri: a}\nrun: {uri: x}", ["clusters.dedup=1"], r"clusters.dedup: .* less than 1 \(got 1\)"),
        ("run: {uri: x}", [], r"source: is required"),
        ("source: {uri: a}\nrun: {uri: x}", ["train.network.backbone=swin"], r"backbone: .*'resnet50' or 'vit'"),
        ("source: {uri: a}\nrun: {uri: x}", ["train.network.patch_stride=14"], r"patch_stride: .*8 or 16"),
        ("source: {uri: a}\nrun: {uri: x}", ["train.network.finest_stride=8"], r"of a vit, and backbone is resnet50"),
        (
            "source: {uri: a}\nrun: {uri: x}",
            ["train.network.photo_outlines=true"],
            r"backbone is resnet50: leave it out",
        ),
        (
            "source: {uri: a}\nrun: {uri: x}",
            ["train.steps=1", "self_training={rounds: 1, soft: true}", "train.whole_masks=false"],
            r"soft is of .* whole masks",
        ),
        (
            "source: {uri: a}\nrun: {uri: x}\ntrain: {steps: 1, precise_statistics: 0}",
            ["self_training={rounds: 1, mixing: 0.5}"],
            r"mixing needs new statistics of batch norms: set train.precise_statistics",
        ),
        (
            "source: {uri: a}\nrun: {uri: x}\nworkers: {train_workers: 4}",
            ["train={steps: 1, batch_size: 4, copy_paste: {mode: plain}}"],
            r"mode plain .* it has one photo: raise train.batch_size",
        ),
        ("source: {uri: a}\nrun: {uri: x}", ["train.network.linear_probes=true"], r"linear_probes needs .* resnet50"),
        (
            "source: {uri: a}\nrun: {uri: x}\ntrain: {network: {backbone: vit}}",
            ["train.network.finest_stride=8"],
            r"anchor_sizes needs 4 sizes for finest_stride 8, got \(32",
        ),
        ("source: {uri: a}\nrun: {uri: x}", ["train.crop=0.5"], r"crop 0.5 enlarges parts of kept tokens: set cache"),
        ("source: {uri: a}\nrun: {uri: x}", ["train.teacher.threshold=0.6"], r"is the averaged model: set ema too"),
        ("source: {uri: a}\nrun: {uri: x}", ["train.teacher.start=1"], r"teacher.start: .*should be less than 1"),
        ("source: {uri: a}\nrun: {uri: x}", ["train.teacher.treshold=1"], r"treshold: unknown.*mean 'threshold'"),
        ("source: {uri: a}\nrun: {uri: x}", ["train.cache=true"], r"network.backbone is resnet50: leave out cache"),
        (
            "source: {uri: a}\nrun: {uri: x}\ntrain: {network: {backbone: vit}}",
            ["train.backbone=r50.pth"],
            r"network.backbone is vit: leave out one",
        ),
        (
            "source: {uri: a}\nrun: {uri: x}\ntrain: {network: {backbone: vit}, cache: true}",
            ["train.copy_paste.mode=plain"],
            r"cache is of whole photos, and copy_paste.mode plain makes new ones",
        ),
        (
            "source: {uri: a, shard_sze: 3}\nrun: {uri: x}",
            [],
            r"source.shard_sze: unknown key; did you mean 'shard_size'",
        ),
        ("source: {uri: a}\nrun: {uri: x}\nzzz: 1", [], r"zzz: unknown key; known keys: source, run"),
        ("source: {uri: a}\nrun: {uri: x}", ["maskcut.tau=3"], r"maskcut.tau: Input should be less than 1 \(got 3\)"),
        ("source: {uri: a}\nrun: {uri: x}", ["backbone.name=vit"], r"backbone.name: is not one of dino_vits16"),
        ("source: {uri: a}\nrun: {uri: x}", ["clusters.k=many"], r"clusters.k: .*integer.*'many'"),
        ("source: {uri: ''}\nrun: {uri: x}", [], r"source.uri: is empty"),
        ("source: {uri: a}\nrun: {uri: x}", ["workers.device=cuda"], r"needs workers.gpus above 0"),
        ("source: {uri: a}\nrun: {uri: x}", ["maskcut.tau"], r"write it as section.key=value"),
        ("source: {uri: a}\nrun: {uri: x}\nseed: 1", ["seed.x=1"], r"'seed' is a value, not a section"),
        ("source: {uri: a}\nrun: {uri: x}", ["backbone.sha256=abc"], r"backbone.sha256"),
        ("source: {uri: a}\nrun: {uri: x}", ["semantics.shifts.intra=3"], r"shifts.intra: .*less than or equal to 2"),
        (
            "source: {uri: a}\nrun: {uri: x}",
            ["semantics.weights.self=1"],
            r"weights.self: unknown key; known keys: intra",
        ),
        (
            "source: {uri: a}\nrun: {uri: x}",
            ["semantics.weights={intra: 0, inter: 0, negative: 0}"],
            r"semantics.weights: are all 0, so there would be nothing to learn",
        ),
        (
            "source: {uri: a}\nrun: {uri: x}\nsemantics: {method: stego, max_images: 12}",
            [],
            r"max_images 12 gives 12 photos or crops, batch_size 16 needs 16; raise max_images or lower batch_size",
        ),
        (
            "source: {uri: a}\nrun: {uri: x}\nsemantics: {method: stego, max_images: 4, batch_size: 2, crops: five}",
            ["semantics.neighbours=20"],
            r"max_images 4 gives 20 photos or crops, neighbours 20 needs 21",
        ),
        ("source: {uri: a}\nrun: {uri: x}", ["workers.size=all"], r"workers.size: is a number of actors.*'all'"),
        ("source: {uri: a}\nrun: {uri: x}", ["workers.size=0"], r"workers.size.min: .*greater than or equal to 1"),
        ("source: {uri: a}\nrun: {uri: x}", ["workers.size={min: 3, max: 2}"], r"size: has min 3 above max 2"),
        ("source: {uri: a}\nrun: {uri: x}", ["workers.size={most: 2}"], r"size.most: unknown key; .*min, max"),
        ("source: {uri: a}\nrun: {uri: x}", ["workers.resources={GPU: 1}"], r"'GPU' is no custom resource; workers.c"),
        ("source: {uri: a}\nrun: {uri: x}", ["workers.resources={h200: 1.5}"], r"resources.h200: .*whole above 1"),
        ("[1, 2]", [], r"must hold a mapping of sections, got list"),
        ("a: [", [], r"is not valid YAML"),
    ],
)
def test_mistakes_are_named(tmp_path: Path, text: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, text), overrides)


def test_a_pool_is_a_number_or_a_range_and_is_shown_as_it_was_given(tmp_path: Path) -> None:
    path = write(tmp_path, "source: {uri: a}\nrun: {uri: x}\nworkers: {size: 3}")
    fixed, elastic = load_config(path), load_config(path, ["workers.size={min: 2, max: 8}"])
    assert (fixed.workers.size.min, fixed.workers.size.max) == (3, 3)
    assert (elastic.workers.size.min, elastic.workers.size.max) == (2, 8)
    shown = [yaml.safe_load(config.to_yaml())["workers"]["size"] for config in (fixed, elastic)]
    assert shown == [3, {"min": 2, "max": 8}]


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"no config file 'nowhere\.yaml'"):
        load_config("nowhere.yaml")


def test_secrets_in_a_wrong_value_are_not_printed(tmp_path: Path) -> None:
    for source in ("{uri: a, format: 's3://key:hunter2@host/x'}", "{uri: 's3://key:hunter2@host/x'}"):
        with pytest.raises(ConfigError, match=r"source\.(format|uri)") as caught:
            load_config(write(tmp_path, f"source: {source}\nrun: {{uri: x}}"))
        assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_configs_are_valid_short_and_commented(path: Path) -> None:
    load_config(str(path))
    lines = path.read_text().splitlines()
    assert len(lines) < 80
    keys = [line for line in lines if ":" in line and not line.lstrip().startswith("#")]
    assert [line for line in keys if "#" not in line and not line.endswith(":")] == []
    assert lines[0].startswith("# ")
    assert max(map(len, lines)) <= 120


@pytest.mark.parametrize(
    ("name", "backbone", "classes", "crops", "weights", "shifts"),
    [
        ("cocostuff27_vits", "dino_vits8", 27, "five", (0.67, 0.25, 0.63), (0.08, 0.02, 0.66)),
        ("cocostuff27_vitb", "dino_vitb8", 27, "five", (0.10, 1.00, 0.15385), (0.12, 0.20, 1.00)),
        ("cityscapes", "dino_vitb8", 27, "five", (1.0, 0.5775, 0.9059), (0.4583, 0.1755, 0.3136)),
        ("potsdam", "dino_vits8", 3, "centre", (0.67, 0.25, 0.63), (0.08, 0.02, 0.46)),
    ],
)
def test_presets_are_the_published_blocks(
    name: str, backbone: str, classes: int, crops: str, weights: tuple[float, ...], shifts: tuple[float, ...]
) -> None:
    path = ROOT / "configs" / f"{name}.yaml"
    config = load_config(str(path))
    semantics = config.semantics
    assert (semantics.method, semantics.preset, config.backbone.name) == ("stego", name, backbone)
    assert (semantics.classes, semantics.crops, semantics.neighbours) == (classes, crops, 7)
    assert (semantics.batch_size, semantics.steps, config.seed) == (16, 5000, 0)
    terms = semantics.loss_terms()
    assert (terms.intra_weight, terms.inter_weight, terms.negative_weight) == weights
    assert (terms.intra_shift, terms.inter_shift, terms.negative_shift) == shifts
    spelt = {line.split(":")[0].strip(" #"): line for line in path.read_text().splitlines() if "intra:" in line}
    for key, values in (("weights", weights), ("shifts", shifts)):  # what the comments say is what the preset is
        written = yaml.safe_load(spelt[key].strip(" #"))[key]
        assert tuple(written[term] for term in ("intra", "inter", "negative")) == values


def test_single_weights_and_shifts_take_the_place_of_the_presets(tmp_path: Path) -> None:
    path = write(tmp_path, "source: {uri: a}\nrun: {uri: x}\nsemantics: {preset: potsdam, shifts: {negative: 0.9}}")
    terms = load_config(path, ["semantics.weights.inter=0"]).semantics.loss_terms()
    assert (terms.negative_shift, terms.inter_weight) == (0.9, 0.0)
    assert (terms.intra_shift, terms.inter_shift, terms.intra_weight, terms.negative_weight) == (0.08, 0.02, 0.67, 0.63)
