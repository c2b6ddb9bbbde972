"""The whole model against outputs of the published one, with weights and inputs that both share."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from pycocotools import mask as coco_mask
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent))
from rcnn_reference import Reference, found_fraction

from model.panoptic.box_labels import label_boxes
from model.panoptic.boxes import clip_boxes
from model.panoptic.detections import detect
from model.panoptic.mask_head import mask_targets
from model.panoptic.network import PanopticCascadeRCNN, Prediction, for_boxes
from model.panoptic.roi_align import pool_boxes
from model.panoptic.rpn import RPN, Proposals
from model.panoptic.sampling import even_choice, sample_labels
from model.panoptic.semantic_head import resize_logits

NUM_THINGS = 300


@pytest.fixture(scope="module")
def reference(shared_dir: Path) -> Reference:
    return Reference(shared_dir)


@pytest.fixture(scope="module")
def weights(reference: Reference) -> dict[str, Tensor]:
    return reference.weights()


def seeded_model(weights: dict[str, Tensor]) -> PanopticCascadeRCNN:
    model = PanopticCascadeRCNN(NUM_THINGS, 27, choose=even_choice)
    model.load_state_dict(weights)
    return model


@pytest.mark.parametrize("num_things", [300, 800])
def test_the_state_dict_has_detectron2s_names_and_shapes(reference: Reference, num_things: int) -> None:
    with torch.device("meta"):
        model = PanopticCascadeRCNN(num_things, 27)
    own = [[name, list(value.shape), str(value.dtype)[len("torch.") :]] for name, value in model.state_dict().items()]
    assert own == [list(entry) for entry in reference.entries(num_things)]


class Inference(NamedTuple):
    """The model in evaluation mode after one photo: features, proposals, semantic logits, and the result."""

    model: PanopticCascadeRCNN
    maps: dict[str, Tensor]
    proposals: Proposals
    logits: Tensor
    prediction: Prediction


def record(module: nn.Module, into: dict[str, Any], name: str) -> None:
    module.register_forward_hook(lambda _module, _inputs, output: into.update({name: output}))


@pytest.fixture(scope="module")
def inference(reference: Reference, weights: dict[str, Tensor]) -> Inference:
    model, seen = seeded_model(weights).eval(), {}
    modules = {
        "stem": model.backbone.bottom_up.stem,
        "bottom_up": model.backbone.bottom_up,
        "pyramid": model.backbone,
        "rpn": model.proposal_generator,
        "semantic": model.sem_seg_head,
    }
    for name, module in modules.items():
        record(module, seen, name)
    height, width = reference.arrays["img0/original_hw"].tolist()
    (prediction,) = model.predict([reference.image("img0")], output_sizes=[(height, width)])
    for module in modules.values():
        module._forward_hooks.clear()
    maps = {"stem": seen["stem"]}
    maps |= {f"res{i}": value for i, value in enumerate(seen["bottom_up"], start=2)}
    maps |= {f"p{i}": value for i, value in enumerate(seen["pyramid"], start=2)}
    return Inference(model, maps, seen["rpn"][0][0], seen["semantic"], prediction)


def test_feature_maps(reference: Reference, inference: Inference) -> None:
    outputs: dict[str, Tensor] = {}
    for name, value in inference.maps.items():
        assert list(value[0].shape) == reference.arrays[f"img0/{name}/shape"].tolist()
        outputs |= reference.map_arrays(f"img0/{name}", value[0])
    assert len(outputs) == 30
    assert max(reference.differences(outputs).values()) < 1e-4


def test_region_proposals(reference: Reference, inference: Inference) -> None:
    rpn, features = inference.model.proposal_generator, [inference.maps[f"p{i}"] for i in range(2, 7)]
    assert torch.equal(rpn.cell_anchors, reference.tensor("img0/rpn/cell_anchors"))
    with torch.no_grad():
        logits, deltas = rpn.rpn_head(features)
    outputs = {}
    for i, anchors in enumerate(rpn.anchors(features)):
        key = f"img0/rpn/p{i + 2}"
        assert len(anchors) == reference.arrays[f"{key}/count"].item()
        assert torch.equal(torch.cat([anchors[:9], anchors[-9:]]), reference.tensor(f"{key}/anchors_first_last"))
        step = reference.arrays[f"{key}/step"].item()
        outputs |= {f"{key}/logits": logits[i][0, ::step], f"{key}/deltas": deltas[i][0, ::step]}
    assert max(reference.differences(outputs).values()) < 1e-3
    boxes = reference.tensor("img0/rpn/post_nms_boxes")
    assert len(inference.proposals.boxes) == len(boxes)
    same = torch.zeros(len(boxes))
    assert found_fraction(boxes, inference.proposals.boxes, same, same) >= 0.99


def test_box_heads_on_fixed_boxes(reference: Reference, inference: Inference) -> None:
    heads, boxes = inference.model.roi_heads, reference.tensor("img0/fixed/boxes")
    features = for_boxes([inference.maps[f"p{i}"] for i in range(2, 7)])
    outputs: dict[str, Tensor] = {}
    with torch.no_grad():
        pooled = pool_boxes(features, [boxes], 7)
        outputs["img0/fixed/box_pooled_4_16"] = pooled[::4, ::16]
        for k, (head, predictor) in enumerate(zip(heads.box_head, heads.box_predictor, strict=True)):
            hidden = head(pooled)
            logits, deltas = predictor(hidden)
            key = f"img0/fixed/stage{k}_"
            outputs |= {f"{key}fc_16": hidden[:, ::16], f"{key}logits": logits, f"{key}deltas": deltas}
    assert max(reference.differences(outputs).values()) < 1e-3


def test_cascade_from_fixed_boxes(reference: Reference, inference: Inference) -> None:
    heads, boxes = inference.model.roi_heads, reference.tensor("img0/fixed/boxes")
    features = for_boxes([inference.maps[f"p{i}"] for i in range(2, 7)])
    size: tuple[int, int] = tuple(reference.arrays["img0/input_hw"].tolist())
    with torch.no_grad():
        outputs = dict(cascade_outputs(inference.model, features, boxes, size))
        (last,), (scores,) = heads.cascade(features, [size], [boxes])
        (found,) = heads.detect(features, [size], [boxes])
    outputs["img0/fixed_cascade/mean_scores"] = scores
    assert max(reference.differences(outputs).values()) < 2e-3
    torch.testing.assert_close(last, outputs["img0/fixed_cascade/stage2_refined_unclipped"])
    key = "img0/fixed_cascade/det_"
    assert len(found.boxes) == len(reference.arrays[f"{key}boxes"])
    assert found_fraction(
        reference.tensor(f"{key}boxes"), found.boxes, reference.tensor(f"{key}classes"), found.classes
    ) == pytest.approx(1, abs=0.011)


def cascade_outputs(
    model: PanopticCascadeRCNN, features: Sequence[Tensor], boxes: Tensor, size: tuple[int, int]
) -> Iterator[tuple[str, Tensor]]:
    """Each stage from the boxes of the one before, as `CascadeRoIHeads.cascade` chains them."""
    for k, coder in enumerate(model.roi_heads.coders):
        boxes = clip_boxes(boxes, size) if k else boxes
        key = f"img0/fixed_cascade/stage{k}_"
        logits, deltas = model.roi_heads.stage(k, features, [boxes])
        yield from ((f"{key}in_boxes", boxes), (f"{key}logits", logits), (f"{key}deltas", deltas))
        boxes = coder.decode(boxes, deltas)
        yield f"{key}refined_unclipped", boxes


def test_masks_of_fixed_boxes(reference: Reference, inference: Inference) -> None:
    boxes = reference.tensor("img0/fixed/boxes")[:16]
    features = for_boxes([inference.maps[f"p{i}"] for i in range(2, 7)])
    with torch.no_grad():
        pooled = pool_boxes(features, [boxes], 14)
        own = inference.model.roi_heads.mask_logits(features, [boxes], [reference.tensor("img0/fixed_mask/classes")])
        of_class_100 = inference.model.roi_heads.mask_head(pooled, torch.full((16,), 100))
    outputs = {"img0/fixed_mask/pooled_2_16": pooled[::2, ::16], "img0/fixed_mask/logits_of_class": own}
    assert max(reference.differences(outputs).values()) < 1e-3
    expected = reference.tensor("img0/fixed_mask/logits_25_4_4")[:, 100 // 25]
    torch.testing.assert_close(of_class_100[:, ::4, ::4], expected, atol=1e-3 * expected.std().item(), rtol=0)


def test_semantic_map(reference: Reference, inference: Inference) -> None:
    logits = inference.logits[0]
    input_size = tuple(reference.arrays["img0/input_hw"].tolist())
    final = resize_logits(logits, input_size, tuple(reference.arrays["img0/original_hw"].tolist()))
    outputs = reference.map_arrays("img0/sem/raw", logits) | reference.map_arrays("img0/sem/final", final)
    assert max(reference.differences(outputs).values()) < 1e-3
    assert (inference.prediction.semantic != reference.tensor("img0/sem/final_argmax")).double().mean() < 1e-3


def test_instances(reference: Reference, inference: Inference) -> None:
    own, boxes, classes = inference.prediction, reference.tensor("img0/instances/boxes"), "img0/instances/classes"
    assert len(own.boxes) == len(boxes)
    assert found_fraction(boxes, own.boxes, reference.tensor(classes), own.classes) >= 0.99
    torch.testing.assert_close(own.scores, reference.tensor("img0/instances/scores"), atol=5e-4, rtol=0)
    masks = torch.from_numpy(coco_mask.decode(reference.json("img0/instances/rle_json"))).permute(2, 0, 1).bool()
    # Where scores nearly tie the order may differ, so each mask is compared with the most similar one of its class.
    a, b = masks.flatten(1).float(), own.masks.flatten(1).float()
    shared = a @ b.T
    shared = shared / (a.sum(1)[:, None] + b.sum(1)[None] - shared)
    shared[reference.tensor(classes)[:, None] != own.classes[None]] = 0
    assert (shared.amax(1) >= 0.98).double().mean() >= 0.99


def test_panoptic_map(reference: Reference, inference: Inference) -> None:
    ids, segments = inference.prediction.panoptic()
    expected = reference.tensor("img0/panoptic/map").to(torch.int32)
    assert [(s.id, s.category, s.is_thing) for s in segments] == [
        (s["id"], s["category_id"] + (1 if s["isthing"] else NUM_THINGS), s["isthing"])
        for s in reference.json("img0/panoptic/segments_json")
    ]
    for segment in segments:
        own, other = ids == segment.id, expected == segment.id
        assert (own & other).sum() / (own | other).sum() >= 0.98
        assert segment.area == own.sum()
    assert (ids != expected).double().mean() < 5e-3


class FixedProposals(nn.Module):
    """The region proposal network with its losses, and boxes that are given instead of its own."""

    def __init__(self, rpn: RPN, boxes: Sequence[Tensor]) -> None:
        super().__init__()
        self.rpn, self.boxes = rpn, boxes

    def forward(self, *inputs: Any) -> tuple[list[Proposals], dict[str, Tensor]]:
        self.proposals, losses = self.rpn(*inputs)
        return [Proposals(boxes, boxes.new_zeros(len(boxes))) for boxes in self.boxes], losses


class Training(NamedTuple):
    """One forward pass on the training batch: the losses, and what some modules gave."""

    model: PanopticCascadeRCNN
    losses: dict[str, Tensor]
    seen: dict[str, Any]


def train_once(reference: Reference, weights: dict[str, Tensor], *, frozen_statistics: bool) -> Training:
    model, seen = seeded_model(weights).train(), {}
    if frozen_statistics:
        for module in model.modules():
            module.train(not isinstance(module, nn.BatchNorm2d))
    for k, predictor in enumerate(model.roi_heads.box_predictor):
        record(predictor, seen, f"stage{k}")
    record(model.sem_seg_head, seen, "semantic")
    boxes = [reference.tensor(f"train/img{i}/proposals") for i in range(2)]
    own = model.proposal_generator
    model.proposal_generator = FixedProposals(own, boxes)  # type: ignore[assignment]
    images, targets = [reference.image(f"train{i}") for i in range(2)], [reference.target(i) for i in range(2)]
    losses = model(images, targets)
    seen["proposals"] = model.proposal_generator.proposals
    model.proposal_generator = own
    return Training(model, losses, seen)


@pytest.fixture(scope="module", params=["batchstat", "runstat"])
def training(reference: Reference, weights: dict[str, Tensor], request: pytest.FixtureRequest) -> tuple[str, Training]:
    return f"train/{request.param}/", train_once(reference, weights, frozen_statistics=request.param == "runstat")


def test_losses(reference: Reference, training: tuple[str, Training]) -> None:
    key, run = training
    expected = reference.json(f"{key}losses_json")
    assert {name: value.item() for name, value in run.losses.items()} == pytest.approx(expected, rel=1e-4)


def test_predictions_while_training(reference: Reference, training: tuple[str, Training]) -> None:
    key, run = training
    outputs = reference.map_arrays(f"{key}sem_raw_img0", run.seen["semantic"][0])
    for k in range(3):
        logits, deltas = run.seen[f"stage{k}"]
        outputs |= {f"{key}stage{k}_logits_16": logits[::16], f"{key}stage{k}_deltas": deltas}
    assert max(reference.differences(outputs).values()) < 5e-3
    for i, proposals in enumerate(run.seen["proposals"]):
        boxes = reference.tensor(f"{key}img{i}/rpn_proposal_boxes")
        assert abs(len(proposals.boxes) - len(boxes)) <= 0.01 * len(boxes)
        same = (torch.zeros(len(boxes)), torch.zeros(len(proposals.boxes)))
        assert found_fraction(boxes, proposals.boxes, *same) >= 0.99


@pytest.mark.parametrize("training", ["batchstat"], indirect=True)
def test_gradients_and_running_statistics(reference: Reference, training: tuple[str, Training]) -> None:
    key, run = training
    sum(run.losses.values(), torch.zeros(())).backward()
    parameters, names = dict(run.model.named_parameters()), reference.json(f"{key}param_names_json")
    assert set(names) == set(parameters)
    norms = torch.stack([parameters[name].grad.double().norm() for name in names])  # type: ignore[union-attr]
    torch.testing.assert_close(norms, reference.tensor(f"{key}grad_norm"), rtol=0.02, atol=0)
    state, prefix = run.model.state_dict(), f"{key}after/"
    outputs = {k: state[k[len(prefix) :]] for k in reference.arrays.files if k.startswith(prefix)}
    assert len(outputs) == 6
    assert max(reference.differences(outputs).values()) < 1e-4


@pytest.mark.parametrize("i", [0, 1])
def test_anchors_in_the_loss(reference: Reference, i: int) -> None:
    rpn, target, key = RPN(8, strides=(4, 8, 16, 32, 64)), reference.target(i), f"train/batchstat/img{i}/"
    anchors = torch.cat(
        rpn.anchors(
            [torch.zeros(1, 8, 480 // stride, 448 // stride) for stride in (4, 8, 16, 32)] + [torch.zeros(1, 8, 8, 7)]
        )
    )
    matches = rpn.match(anchors, target)
    assert torch.equal(matches.labels, reference.tensor(f"{key}rpn_match_labels"))
    positive, negative = sample_labels(
        matches.labels, count=256, positive_fraction=0.5, choose=even_choice, generator=None
    )
    assert torch.equal(positive, reference.tensor(f"{key}rpn_sampled_pos").long())
    assert torch.equal(negative, reference.tensor(f"{key}rpn_sampled_neg").long())
    assert torch.equal(target.boxes[matches.index[positive]], reference.tensor(f"{key}rpn_matched_gt_of_pos"))


@pytest.mark.parametrize("i", [0, 1])
def test_labels_of_every_stage(reference: Reference, i: int) -> None:
    target = reference.target(i)
    for k, iou in enumerate((0.5, 0.6, 0.7)):
        key = f"train/batchstat/img{i}/stage{k}_"
        labelled = label_boxes(reference.tensor(f"{key}boxes"), target, iou=iou, num_things=NUM_THINGS)
        assert torch.equal(labelled.classes, reference.tensor(f"{key}gt_classes").long())
        objects = labelled.classes < NUM_THINGS
        assert torch.equal(labelled.true_boxes[objects], reference.tensor(f"{key}gt_boxes")[objects])


def test_mask_targets_of_the_batch(reference: Reference) -> None:
    key = "train/batchstat/mask_"
    counts = reference.arrays[f"{key}count_per_image"].tolist()
    expected = reference.bits(f"{key}targets_packed", 28).split(counts)
    boxes, classes = (reference.tensor(f"{key}{name}").split(counts) for name in ("boxes", "gt_classes"))
    for i in range(2):
        target = reference.target(i)
        labelled = label_boxes(boxes[i], target, iou=0.5, num_things=NUM_THINGS)
        assert torch.equal(labelled.classes, classes[i].long())
        own = mask_targets(target.masks, boxes[i], labelled.index)
        assert (own != expected[i]).double().mean() < 1e-4


def test_detections_of_given_probabilities(reference: Reference) -> None:
    settings = {"score_threshold": 0.05, "nms_threshold": 0.5, "limit": 100}
    many = detect(
        reference.tensor("unit/boxes"),
        (2 * reference.tensor("unit/box_loss/logits")).softmax(1),
        (240, 320),
        **settings,
    )
    few = detect(
        reference.tensor("unit/detect_few/in_boxes"),
        reference.tensor("unit/detect_few/in_scores"),
        (240, 320),
        **settings,
    )
    for key, found in (("unit/detect/", many), ("unit/detect_few/", few)):
        torch.testing.assert_close(found.scores, reference.tensor(f"{key}scores"))
        torch.testing.assert_close(found.boxes, reference.tensor(f"{key}boxes"))
        assert torch.equal(found.classes, reference.tensor(f"{key}classes"))
        assert torch.equal(found.row, reference.tensor(f"{key}from_row"))
