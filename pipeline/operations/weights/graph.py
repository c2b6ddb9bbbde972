"""The backbone in an ONNX graph -> a file of safetensors with DINOv2's official key names. A program of its own:

    python graph.py GRAPH.onnx TENSORS.safetensors

`pipeline.operations.weights.package` runs it where `onnx` is installed, which the project does without. So it imports
nothing of the project. The graph is one that torch exported of Hugging Face's Dinov2Model: biases and norms keep their
names there, while the matrix of a linear layer is known by the node that multiplies with it alone.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]

POSITIONS = ("onnx::Concat_1957", "onnx::Reshape_1962")  # of the CLS token, and of 37 x 37 patches
NODE = re.compile(r"/(backbone/encoder/layer\.\d+/.+)/MatMul")
NAMES = tuple(
    (re.compile(pattern), name)
    for pattern, name in (
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.", ""),
        (r"^encoder\.layer\.", "blocks."),
        (r"\.attention\.output\.dense\.", ".attn.proj."),
        (r"\.attention\.attention\.(query|key|value)\.", r".attn.\1."),
        (r"\.layer_scale(\d)\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
    )
)


class Node(NamedTuple):
    """A node of the graph and the tensors that it takes, by their names."""

    name: str
    inputs: tuple[str, ...]


def official_state(initializers: Mapping[str, Array], nodes: Iterable[Node]) -> dict[str, Array]:
    """Initializers by name and nodes of the graph -> the state dict, contiguous float32 under the official key names.

    Query, key and value of a block become one projection in that order. `mask_token`, which only pretraining uses, is
    zeros. Initializers outside `backbone.` are left out. KeyError when something of the backbone is not there.
    """
    named = {name: value for name, value in initializers.items() if name.startswith("backbone.")}
    named |= _matrices(initializers, nodes)
    state = _stacked({_renamed(name.removeprefix("backbone.")): value for name, value in named.items()})
    state["pos_embed"] = np.concatenate([initializers[name] for name in POSITIONS], axis=1)
    state["mask_token"] = np.zeros((1, state["cls_token"].shape[-1]), np.float32)
    return {name: np.ascontiguousarray(value, dtype=np.float32) for name, value in state.items()}


def _matrices(initializers: Mapping[str, Array], nodes: Iterable[Node]) -> dict[str, Array]:
    """The weights (out, in) of the linear layers, by the names that they had before the export."""
    found = {}
    for node in nodes:
        layer = NODE.fullmatch(node.name)
        if layer and node.inputs[1] in initializers:  # attention multiplies what it has computed, too
            found[layer[1].replace("/", ".") + ".weight"] = initializers[node.inputs[1]].T
    return found


def _renamed(name: str) -> str:
    for pattern, official in NAMES:
        name = pattern.sub(official, name)
    return name


def _stacked(state: dict[str, Array]) -> dict[str, Array]:
    kept = {name: value for name, value in state.items() if not re.search(r"\.attn\.(query|key|value)\.", name)}
    for name in state:
        if ".attn.query." in name:
            parts = [state[name.replace(".query.", f".{part}.")] for part in ("query", "key", "value")]
            kept[name.replace(".query.", ".qkv.")] = np.concatenate(parts)
    return kept


def main(graph: str, tensors: str) -> None:
    import onnx
    from safetensors.numpy import save_file

    found = onnx.load(graph).graph
    initializers = {entry.name: onnx.numpy_helper.to_array(entry) for entry in found.initializer}
    save_file(official_state(initializers, [Node(node.name, tuple(node.input)) for node in found.node]), tensors)


if __name__ == "__main__":
    main(*sys.argv[1:])
