"""Model and workers on a device against the CPU: `pytest -m gpu`, which needs no Ray and no bucket.

The same on the CPU alone, in the way of a GPU, and small, is done by every run of the tests.
"""

from __future__ import annotations

import pytest
import torch

from tests.gpu import made
from tests.gpu.parity import PARITIES

SIDES = {"cpu": 64, "cuda": 240}
NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
MARKS = [pytest.mark.gpu, NO_CUDA]
DEVICES = ["cpu", pytest.param("cuda", marks=MARKS)]
NEEDED = {
    "backbone": ["timm"],
    "crf": ["scipy"],
    "k-means": ["faiss", "pyarrow", "scipy"],
    "maskcut": ["scipy"],
    "panoptic": ["scipy", "torchvision"],
}
# At most, for differences; at least, for the rest.
WITHIN = {
    "backbone float32": {"difference": 1e-3, "least_cosine": 0.9999},
    "backbone bfloat16": {"difference": 0.1, "least_cosine": 0.99},
    "maskcut": {"same": 0.99, "masks": 3},
    "crf of masks, exact": {"same": 0.999, "moved": 1e-3},
    "crf of masks, fast": {"same": 0.999, "moved": 1e-3},
    "crf of classes, exact": {"difference": 1e-3, "same": 0.9999},
    "crf of classes, fast": {"difference": 5e-2, "same": 0.995},  # half precision on the CPU only
    "stego step": {"difference": 1e-3, "led": 1e-3},
    "panoptic training step": {"difference": 1e-2, "led": 1e-3},
    "panoptic inference": {"same": 0.98, "segments": 2},
    "panoptic outlines": {"same": 0.99, "moved": 1e-3},
    "panoptic probes": {"difference": 1e-4, "boxes": 40},
    "k-means": {"same": 0.999},
}


@pytest.mark.gpu
@NO_CUDA
def test_marginals_stay_where_the_probabilities_are() -> None:
    pytest.importorskip("scipy", reason="scipy is not installed")
    from workers.crf import CUTLER, dense_crf

    photos = made.photos(1, 40, 40)
    probs = made.class_probs(photos, 3, 8)[0]
    q = dense_crf(photos[0], probs.cuda(), CUTLER)
    assert q.is_cuda
    torch.testing.assert_close(q.cpu(), dense_crf(photos[0], probs, CUTLER), atol=1e-4, rtol=0)


@pytest.mark.gpu
@NO_CUDA
def test_cuts_of_a_batch_ask_the_device_nothing() -> None:
    """torch raises where the host would wait."""
    pytest.importorskip("scipy", reason="scipy is not installed")
    from workers.batch_cuts import batch_cuts
    from workers.ncut import affinity_edges

    edges = affinity_edges(made.colour_features(made.photos(3, 160, 120), 8).cuda(), 0.15)
    asking = batch_cuts(edges, (20, 15), 3, 32)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with pytest.raises(RuntimeError, match="synchroniz"):
            asking[0].mask_BN.any().item()  # it does raise
        unasked = batch_cuts(edges, (20, 15), 3, 32)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one.mask_BN, other.mask_BN) for one, other in zip(unasked, asking, strict=True))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", PARITIES)
def test_a_device_gives_what_the_cpu_gives(name: str, device: str) -> None:
    kind, words = name.split()[0], name.split()
    for module in NEEDED.get(kind, []):
        pytest.importorskip(module, reason=f"{module} is not installed")
    if kind == "k-means" and device == "cuda" and not hasattr(pytest.importorskip("faiss"), "StandardGpuResources"):
        pytest.skip("the installed faiss is faiss-cpu, which has no GPU support")
    with made.full_float32():
        figures = PARITIES[name](device, SIDES[device])
    within = WITHIN.get(name) or WITHIN[f"{words[0]} {words[-1]}"]
    assert figures.keys() == within.keys()
    for figure, bound in within.items():
        found = figures[figure]
        assert found <= bound if figure == "difference" else found >= bound, f"{figure} is {found:.3g}, not {bound:g}"
