"""Two processes of a training in torch's own way, without Ray."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def in_two_processes(work: Callable[[int], dict[str, Any]], folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """What `work`, a function of a module, returns for rank 0 and for rank 1, whose processes share a group of gloo."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    mp.spawn(_process, (work, port, str(folder)), nprocs=2)
    first, second = (torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, 1))
    return first, second


def _process(rank: int, work: Callable[[int], dict[str, Any]], port: int, folder: str) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    dist.init_process_group("gloo", rank=rank, world_size=2)
    torch.set_num_threads(1)
    torch.save(work(rank), Path(folder) / f"{rank}.pt")
    dist.destroy_process_group()
