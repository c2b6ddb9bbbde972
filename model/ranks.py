"""The processes that share the batches of a training, over torch's default process group.

Float32 sums depend on how they are grouped, and Adam makes much of the last bits of a small gradient. So everything
that is added up over items is added up in float64 and rounded once: however the items are spread over processes, the
sums, and with them the weights, are the same but for rare roundings.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Ranks:
    """This process among those that share the batch; alone by default."""

    rank: int = 0
    size: int = 1

    def rows(self, batch: int) -> slice:
        """Which of the batch are this process's."""
        share = batch // self.size
        return slice(self.rank * share, (self.rank + 1) * share)

    def sum(self, values: Tensor) -> Tensor:
        """The values added up over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def share(self, count: Tensor | int, like: Tensor) -> Tensor:
        """() float32: the mean of a count over all processes, and 1 if it is 0. A sum over the own items divided by it
        has as its mean over processes the sum over all items divided by all of them. `like` names the device."""
        total = self.sum(torch.as_tensor(count, device=like.device).detach().double().clone()) / self.size
        return torch.where(total > 0, total, 1.0).float()

    def largest(self, values: Tensor) -> Tensor:
        """The elementwise maximum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(values, dist.ReduceOp.MAX)
        return values

    def mean(self, values: Tensor) -> Tensor:
        """The mean of float32 tensors that are equally large in all processes, without gradient."""
        return (self.sum(values.detach().double().mean()) / self.size).to(values.dtype)

    def gather(self, own: Tensor) -> Tensor:
        """(b, ...) float32 rows of each process -> (B, ...) float64 of all; gradients flow back to their rows."""
        return own.double() if self.size == 1 else _Gather.apply(own, self.rank, self.size)

    def wait(self) -> None:
        """Until all processes are here."""
        if self.size > 1:
            dist.barrier()


ALONE = Ranks()


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, own: Tensor, rank: int, size: int) -> Tensor:
        ctx.rows = slice(rank * len(own), (rank + 1) * len(own))
        parts = [torch.empty_like(own, memory_format=torch.contiguous_format) for _ in range(size)]
        dist.all_gather(parts, own.contiguous())
        return torch.cat(parts).double()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total)
        return total[ctx.rows].float(), None, None


class SharedModule:
    """A module whose gradients come from all processes. Each item sees its own float32 copy of the weights."""

    def __init__(self, module: nn.Module) -> None:
        """The module's forward must take weights with a leading dimension of items in place of its parameters."""
        self._module = module
        self._exact = {name: values.detach().double().requires_grad_() for name, values in module.named_parameters()}

    def __call__(self, *inputs: Tensor) -> Any:
        """The module's forward of these inputs; the first has the items in its first dimension."""
        copies = {name: values.expand(len(inputs[0]), *values.shape).float() for name, values in self._exact.items()}
        return torch.func.functional_call(self._module, copies, inputs)

    def set_gradients(self, ranks: Ranks) -> None:
        """After the backward pass: the sum of all processes' gradients as that of the module's parameters."""
        exact = list(self._exact.values())
        total = ranks.sum(torch.cat([values.grad.flatten() for values in exact if values.grad is not None]))
        parts = total.split([values.numel() for values in exact])
        for parameter, part in zip(self._module.parameters(), parts, strict=True):
            parameter.grad = part.view_as(parameter).to(parameter.dtype)
