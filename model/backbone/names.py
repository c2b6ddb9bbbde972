"""Names of the backbones, apart from their code so that a config can be checked without loading torch."""

import re

PATCH_DCT = "patch-dct"
ARCHITECTURES = {
    "dino_vits16": "vit_small_patch16_224.dino",
    "dino_vits8": "vit_small_patch8_224.dino",
    "dino_vitb16": "vit_base_patch16_224.dino",
    "dino_vitb8": "vit_base_patch8_224.dino",
    "dinov2_vits14": "vit_small_patch14_dinov2.lvd142m",
    "dinov2_vitb14": "vit_base_patch14_dinov2.lvd142m",
    "dinov2_vitl14": "vit_large_patch14_dinov2.lvd142m",
    "dinov2_vits14_reg": "vit_small_patch14_reg4_dinov2.lvd142m",
    "dinov2_vitb14_reg": "vit_base_patch14_reg4_dinov2.lvd142m",
    "dinov2_vitl14_reg": "vit_large_patch14_reg4_dinov2.lvd142m",
    # With biases of queries and values: zero in the published weights, but not in those of a training of one's own.
    "dinov3_vits16": "vit_small_patch16_dinov3_qkvb.lvd1689m",
    "dinov3_vits16plus": "vit_small_plus_patch16_dinov3_qkvb.lvd1689m",
    "dinov3_vitb16": "vit_base_patch16_dinov3_qkvb.lvd1689m",
    "dinov3_vitl16": "vit_large_patch16_dinov3_qkvb.lvd1689m",
}
_PUBLISHED = "https://dl.fbaipublicfiles.com"
OFFICIAL_URLS = {
    "dino_vits16": f"{_PUBLISHED}/dino/dino_deitsmall16_pretrain/dino_deitsmall16_pretrain.pth",
    "dino_vits8": f"{_PUBLISHED}/dino/dino_deitsmall8_pretrain/dino_deitsmall8_pretrain.pth",
    "dino_vitb16": f"{_PUBLISHED}/dino/dino_vitbase16_pretrain/dino_vitbase16_pretrain.pth",
    "dino_vitb8": f"{_PUBLISHED}/dino/dino_vitbase8_pretrain/dino_vitbase8_pretrain.pth",
    "dinov2_vits14": f"{_PUBLISHED}/dinov2/dinov2_vits14/dinov2_vits14_pretrain.pth",
    "dinov2_vitb14": f"{_PUBLISHED}/dinov2/dinov2_vitb14/dinov2_vitb14_pretrain.pth",
    "dinov2_vitl14": f"{_PUBLISHED}/dinov2/dinov2_vitl14/dinov2_vitl14_pretrain.pth",
    "dinov2_vits14_reg": f"{_PUBLISHED}/dinov2/dinov2_vits14/dinov2_vits14_reg4_pretrain.pth",
    "dinov2_vitb14_reg": f"{_PUBLISHED}/dinov2/dinov2_vitb14/dinov2_vitb14_reg4_pretrain.pth",
    "dinov2_vitl14_reg": f"{_PUBLISHED}/dinov2/dinov2_vitl14/dinov2_vitl14_reg4_pretrain.pth",
}
REQUEST_FORM = "https://ai.meta.com/resources/models-and-libraries/dinov3-downloads/"
ON_REQUEST = {  # weights that only their form gives, and their repository at Hugging Face
    "dinov3_vits16": "facebook/dinov3-vits16-pretrain-lvd1689m",
    "dinov3_vits16plus": "facebook/dinov3-vits16plus-pretrain-lvd1689m",
    "dinov3_vitb16": "facebook/dinov3-vitb16-pretrain-lvd1689m",
    "dinov3_vitl16": "facebook/dinov3-vitl16-pretrain-lvd1689m",
}
BACKBONES = (*ARCHITECTURES, PATCH_DCT)
_DIMS = {"s": 384, "b": 768, "l": 1024}
_SIZE = re.compile(r"_vit([sbl])(\d+)")


def patch_size(name: str) -> int:
    """Side of a patch in pixels. ValueError for an unknown backbone."""
    check_name(name)
    return 8 if name == PATCH_DCT else int(_SIZE.findall(name)[0][1])


def embedding_dim(name: str) -> int:
    """Channels of the keys and of the CLS embedding. ValueError for an unknown backbone."""
    check_name(name)
    return 384 if name == PATCH_DCT else _DIMS[_SIZE.findall(name)[0][0]]


def is_rotary(name: str) -> bool:
    """Whether positions are told by rotating queries and keys (DINOv3), and not added to the tokens."""
    return name.startswith("dinov3_")


def check_name(name: str) -> None:
    if name not in BACKBONES:
        raise ValueError(f"backbone.name: {name!r} is not one of {', '.join(BACKBONES)}")
