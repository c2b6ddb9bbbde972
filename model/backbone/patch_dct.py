"""`patch-dct`: a classical patch descriptor with the interface of a backbone, for trying and testing without weights.

Each 8 x 8 patch is described by its opponent colours, their spread, the low DCT coefficients and the band energies of
its luminance, the same of its surroundings, and its position. The mean over the image is removed,
so that the cosine of two patches tells whether they deviate from the image in the same way; a constant channel makes
patches that hardly deviate at all alike. A seeded random projection gives the features the look of a network's.

Shapes: B images, (h, w) patches, C raw channels, D projected channels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from model.backbone.outputs import block_names

PATCH = 8
FILL = (0.485, 0.456, 0.406)  # ImageNet mean: the colour that crops are filled with outside their mask


class PatchDCT:
    """See the module. Deterministic in `seed`; runs on any device."""

    patch_size = PATCH
    dim = 384

    def __init__(self, *, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        self._projection = _orthogonal(RAW_CHANNELS, self.dim, generator).to(device)
        self._cls_projection = _orthogonal(CLS_CHANNELS, self.dim, generator).to(device)
        self._dct = _dct_matrix(PATCH).to(device)

    def keys(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) RGB in [0, 1] -> (B, h*w, 384) float32: deviations from the mean over the image's patches."""
        return self.features(images, ["keys"])["keys"]

    def tokens(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) RGB in [0, 1] -> (B, h*w, 384) float32: what a patch looks like, whatever the rest of its image.

        There are no blocks whose outputs could be told from their keys. But the mean of `keys` over an image is the
        same for every image, so that neighbours by mean feature, as STEGO takes them, would be picked by rounding.
        Here a fixed typical texture is taken off instead of the image's own mean.
        """
        return self.features(images, ["tokens"])["tokens"]

    def cls(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) RGB in [0, 1] -> (B, 384) float32: colour, texture and outline of what is not filled in."""
        return self.features(images, ["cls"])["cls"]

    def blocks(self, images: Tensor, numbers: Sequence[int], *, norm: bool) -> list[Tensor]:
        """ValueError for any number: there are no blocks."""
        return list(self.features(images, block_names(numbers, norm=norm)).values())

    @torch.inference_mode()
    def features(self, images: Tensor, wanted: Sequence[str]) -> dict[str, Tensor]:
        """(B, 3, H, W) RGB in [0, 1] -> the wanted of keys, tokens and cls by their names; patches are described once.

        ValueError for any other name, such as that of a block.
        """
        described = {"keys": self._keys, "tokens": self._tokens, "cls": self._cls}
        for name in wanted:
            if name not in described:
                raise ValueError(f"patch-dct has no {name!r}: it has no blocks, and gives keys, tokens and cls alone")
        local_BChw = self._local(images)
        return {name: described[name](local_BChw, images) for name in wanted}

    def _keys(self, local_BChw: Tensor, _images: Tensor) -> Tensor:
        raw_BChw = torch.cat([local_BChw, _context(local_BChw), _position(local_BChw)], dim=1)
        raw_BNC = raw_BChw.flatten(2).mT
        deviation_BNC = raw_BNC - raw_BNC.mean(1, keepdim=True)
        anchor_BN1 = torch.full_like(deviation_BNC[..., :1], ANCHOR)
        return torch.cat([deviation_BNC, anchor_BN1], dim=-1) @ self._projection

    def _tokens(self, local_BChw: Tensor, _images: Tensor) -> Tensor:
        local_BChw = local_BChw.clone()
        local_BChw[:, -len(TYPICAL_TEXTURE) :] -= local_BChw.new_tensor(TYPICAL_TEXTURE)[:, None, None]
        raw_BChw = torch.cat([local_BChw, _context(local_BChw), _position(local_BChw)], dim=1)
        return raw_BChw.flatten(2).mT @ self._projection[:-1]

    def _cls(self, local_BChw: Tensor, images: Tensor) -> Tensor:
        weight_B1hw = self._foreground(images)
        total_B1 = weight_B1hw.sum((2, 3)).clamp_min(1e-6)
        mean_BC = (local_BChw * weight_B1hw).sum((2, 3)) / total_B1
        spread_BC = ((local_BChw - mean_BC[..., None, None]).square() * weight_B1hw).sum((2, 3)) / total_B1
        outline_BP = F.adaptive_avg_pool2d(weight_B1hw, OUTLINE).flatten(1) - 0.5
        return torch.cat([2 * mean_BC, spread_BC.sqrt(), outline_BP], dim=1) @ self._cls_projection

    def _local(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) -> (B, LOCAL_CHANNELS, h, w): what one patch looks like by itself."""
        if images.ndim != 4 or images.shape[1] != 3 or images.shape[2] % PATCH or images.shape[3] % PATCH:
            raise ValueError(f"images must be (B, 3, H, W), H and W multiples of {PATCH}, got {tuple(images.shape)}")
        opponent = _opponent(images.to(self._dct.device).float())
        mean = F.avg_pool2d(opponent, PATCH)
        spread = (F.avg_pool2d(opponent.square(), PATCH) - mean.square()).clamp_min(0).sqrt()
        coefficients = self._coefficients(opponent[:, :1])
        signed = coefficients[:, [1, 2, 8, 9, 16]]
        bands = torch.cat([coefficients[:, band].square().mean(1, keepdim=True).sqrt() for band in _bands()], dim=1)
        energy = torch.log1p(50 * bands)
        return torch.cat([6 * mean, 4 * spread, 0.3 * signed, 0.5 * energy], dim=1)

    def _coefficients(self, luminance_B1HW: Tensor) -> Tensor:
        """Orthonormal DCT-II of each patch: (B, 1, H, W) -> (B, 64, h, w)."""
        batch, _, height, width = luminance_B1HW.shape
        blocks = luminance_B1HW.reshape(batch, height // PATCH, PATCH, width // PATCH, PATCH).transpose(2, 3)
        spectrum = self._dct @ blocks @ self._dct.T
        return spectrum.flatten(3).permute(0, 3, 1, 2)

    def _foreground(self, images: Tensor) -> Tensor:
        """Share of each patch (B, 1, h, w) that differs from the fill colour by more than rounding."""
        fill = torch.tensor(FILL, device=self._dct.device).view(3, 1, 1)
        differs = ((images.to(self._dct.device).float() - fill).abs().amax(1, keepdim=True) > 0.01).float()
        return F.avg_pool2d(differs, PATCH)


def _opponent(images: Tensor) -> Tensor:
    red, green, blue = images.unbind(1)
    return torch.stack([(red + green + blue) / 3 - 0.5, red - green, (red + green) / 2 - blue], dim=1)


def _context(local_BChw: Tensor) -> Tensor:
    """Surroundings of each patch: the averages of its local channels over 3 x 3 patches."""
    return CONTEXT_WEIGHT * _box_mean(local_BChw, 3)


def _box_mean(x: Tensor, size: int) -> Tensor:
    return F.avg_pool2d(x, size, stride=1, padding=size // 2, count_include_pad=False)


def _position(like_BChw: Tensor) -> Tensor:
    """Smooth position (B, 4, h, w): half a cosine wave down and across, and one whole wave each."""
    batch, _, height, width = like_BChw.shape
    rows = (torch.arange(height, device=like_BChw.device) + 0.5) / height
    columns = (torch.arange(width, device=like_BChw.device) + 0.5) / width
    y, x = torch.meshgrid(rows, columns, indexing="ij")
    waves = torch.stack([(math.pi * k * t).cos() for k in (1, 2) for t in (y, x)])
    return POSITION_WEIGHT * waves.expand(batch, -1, -1, -1)


def _bands() -> list[list[int]]:
    """Indices of the 64 coefficients in three rings of rising frequency, without the mean."""
    radius = [max(u, v) for u in range(PATCH) for v in range(PATCH)]
    return [[i for i, r in enumerate(radius) if low <= r < high] for low, high in ((1, 2), (2, 4), (4, PATCH))]


def _dct_matrix(size: int) -> Tensor:
    k = torch.arange(size, dtype=torch.float64)
    matrix = torch.cos(math.pi / size * (k[None] + 0.5) * k[:, None]) * math.sqrt(2 / size)
    matrix[0] /= math.sqrt(2)
    return matrix.float()


def _orthogonal(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    """Random (rows, columns) matrix with orthonormal rows, so that cosines survive the projection."""
    q, _ = torch.linalg.qr(torch.randn(columns, rows, generator=generator, dtype=torch.float64))
    return q.mT.float().contiguous()


POSITION_WEIGHT = 0.1
CONTEXT_WEIGHT = 0.7
ANCHOR = 0.5  # about the deviation of a patch of plain background
TYPICAL_TEXTURE = (0.8, 0.6, 0.4)  # about the band energies of a photo's patches, which are never negative
OUTLINE = 6
LOCAL_CHANNELS = 3 + 3 + 5 + 3
RAW_CHANNELS = 2 * LOCAL_CHANNELS + 4 + 1
CLS_CHANNELS = 2 * LOCAL_CHANNELS + OUTLINE * OUTLINE
