"""Steps of trainings with fixed draws, on any device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from model.panoptic.network import PanopticCascadeRCNN
from model.ranks import Ranks
from model.stego import ClusterProbe, StegoHead, correspondence_loss, derangement
from model.stego_terms import COCOSTUFF27_VITS
from tests.gpu import made
from workers.training.trainer import Batch, Optimisation, PanopticTrainer


def stego_step(device: str, *, batch: int, channels: int, side: int) -> Callable[[], Tensor]:
    """A call is one step of head and probe on the same features; it gives losses and cluster loss, (4,)."""
    generator = torch.Generator().manual_seed(0)
    feats, feats_pos = (torch.randn(batch, channels, side, side, generator=generator).to(device) for _ in range(2))
    coords1, coords2 = ((torch.rand(batch, 11, 11, 2, generator=generator) * 2 - 1).to(device) for _ in range(2))
    negatives = torch.stack([derangement(batch, generator) for _ in range(5)]).to(device)
    torch.manual_seed(0)
    head, probe = StegoHead(channels).to(device), ClusterProbe(70, 27).to(device)
    masks, masks_pos = (head.draw_masks(batch, generator).to(device) for _ in range(2))
    optimiser = torch.optim.Adam([*head.parameters(), *probe.parameters()], lr=5e-4)

    def step() -> Tensor:
        code, code_pos = head(feats, masks), head(feats_pos, masks_pos)
        found = correspondence_loss(
            feats,
            feats_pos,
            code,
            code_pos,
            coords1=coords1,
            coords2=coords2,
            neg_perms=negatives,
            terms=COCOSTUFF27_VITS,
        )
        cluster_loss, _ = probe(code)
        optimiser.zero_grad()
        (found.total(COCOSTUFF27_VITS) + cluster_loss).backward()
        optimiser.step()
        return torch.stack([found.intra, found.inter, found.negative, cluster_loss]).detach()

    return step


def panoptic_step(
    device: str,
    *,
    classes: tuple[int, int],
    batch: int,
    size: tuple[int, int],
    precision: Literal["float32", "bfloat16"] = "float32",
    network: Mapping[str, Any] | None = None,
) -> Callable[[], dict[str, float]]:
    """A call is one step of a network with seeded weights, on the same photos; it gives the terms of the loss."""
    torch.manual_seed(0)
    model = PanopticCascadeRCNN(*classes, **(network or {}))
    settings = Optimisation(batch_size=batch, warmup_steps=0, rate=1e-3, precision=precision)
    trainer = PanopticTrainer(model, settings, device=device, ranks=Ranks())
    images = [torch.from_numpy(photo).permute(2, 0, 1) for photo in made.photos(batch, *size)]
    targets = [made.target(number, *size, *classes) for number in range(batch)]
    whole = Batch(images, targets, [str(number) for number in range(batch)])
    return lambda: trainer.advance(whole)
