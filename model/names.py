"""Names of the backbones, apart from their code so that a config can be checked without loading torch."""

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
}
BACKBONES = (*ARCHITECTURES, PATCH_DCT)
_DIMS = {"vits": 384, "vitb": 768, "vitl": 1024}


def patch_size(name: str) -> int:
    """Side of a patch in pixels. ValueError for an unknown backbone."""
    check_name(name)
    return 8 if name == PATCH_DCT else int(name.rsplit("vit", 1)[1].split("_")[0][1:])


def embedding_dim(name: str) -> int:
    """Channels of the keys and of the CLS embedding. ValueError for an unknown backbone."""
    check_name(name)
    return 384 if name == PATCH_DCT else _DIMS["vit" + name.rsplit("vit", 1)[1][0]]


def check_name(name: str) -> None:
    if name not in BACKBONES:
        raise ValueError(f"backbone.name: {name!r} is not one of {', '.join(BACKBONES)}")
