"""A Dinov2Model of two blocks, four channels and 2 x 2 patches, as torch exports it: initializers and nodes."""

from __future__ import annotations

import numpy as np

from pipeline.operations.weights.graph import POSITIONS, Array, Node

BLOCKS, DIM, HIDDEN, PATCH = 2, 4, 8, 2


def initializers(seed: int = 0) -> dict[str, Array]:
    """Names with the shapes of the export: matrices (in, out) under numbers, all else as in the model."""
    draw = np.random.default_rng(seed).standard_normal
    shapes: dict[str, tuple[int, ...]] = {
        "backbone.embeddings.cls_token": (1, 1, DIM),
        "backbone.embeddings.patch_embeddings.projection.weight": (DIM, 3, PATCH, PATCH),
        "backbone.embeddings.patch_embeddings.projection.bias": (DIM,),
        "backbone.layernorm.weight": (DIM,),
        "backbone.layernorm.bias": (DIM,),
        POSITIONS[0]: (1, 1, DIM),
        POSITIONS[1]: (1, 4, DIM),
        "decoder.upconv1.weight": (DIM, 3, 4, 4),
    }
    for block in range(BLOCKS):
        layer = f"backbone.encoder.layer.{block}"
        for part in ("attention.attention.query", "attention.attention.key", "attention.attention.value"):
            shapes[f"{layer}.{part}.bias"] = (DIM,)
        shapes |= {f"{layer}.attention.output.dense.bias": (DIM,), f"{layer}.mlp.fc1.bias": (HIDDEN,)}
        shapes |= {f"{layer}.mlp.fc2.bias": (DIM,)}
        shapes |= {f"{layer}.norm{n}.{kind}": (DIM,) for n in (1, 2) for kind in ("weight", "bias")}
        shapes |= {f"{layer}.layer_scale{n}.lambda1": (DIM,) for n in (1, 2)}
        shapes |= {matrix(block, part): shape for part, shape in LINEAR.items()}
    return {name: draw(shape).astype(np.float32) for name, shape in shapes.items()}


LINEAR = {
    "attention/attention/key": (DIM, DIM),
    "attention/attention/value": (DIM, DIM),
    "attention/attention/query": (DIM, DIM),
    "attention/output/dense": (DIM, DIM),
    "mlp/fc1": (DIM, HIDDEN),
    "mlp/fc2": (HIDDEN, DIM),
}


def matrix(block: int, part: str) -> str:
    return f"onnx::MatMul_{1000 * block + list(LINEAR).index(part)}"


def nodes() -> list[Node]:
    """Of the linear layers, of an attention that multiplies two results, and of a bias."""
    found = []
    for block in range(BLOCKS):
        layer = f"/backbone/encoder/layer.{block}"
        for part in LINEAR:
            found.append(Node(f"{layer}/{part}/MatMul", (f"{layer}/input", matrix(block, part))))
            found.append(Node(f"{layer}/{part}/Add", (f"backbone.encoder.layer.{block}.bias", f"{layer}/{part}")))
        found.append(Node(f"{layer}/attention/attention/MatMul", (f"{layer}/queries", f"{layer}/keys")))
    return [*found, Node("/decoder/Conv", ("x", "decoder.upconv1.weight"))]
