"""Ray Train, as all fits use it that train a network: a function in each of several workers that share every batch."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from pipeline.engine.cluster import require_room
from pipeline.store import storage
from pipeline.store.arrow_files import arrow_filesystem

if TYPE_CHECKING:
    import torch

    from model.ranks import Ranks

REFUSED = "refused.txt"  # of the records: what the loop raised that would be raised again
TIMEOUT_S = 4 * 3600  # of a collective: one worker may prepare something while the others wait
Loop = Callable[["Ranks", "torch.device"], None]


def train_with_ray(
    loop: Loop,
    *,
    num_workers: int,
    cpus: float,
    gpus: float,
    name: str,
    storage_path: str,
    max_failures: int,
) -> None:
    """Run `loop(ranks, device)` in `num_workers` workers of Ray Train, with a process group over all of them.

    A worker has `cpus` CPUs and threads, and `gpus` GPUs (0: it computes on the CPU). When one dies all are started
    again, up to `max_failures` times: the loop must go on from its own checkpoint. Ray's records, but no weights, go
    to `storage_path`. `loop` is picklable.

    ConfigError: Ray is smaller than the workers. ValueError: the loop raised one in some worker; it is not tried again.
    RuntimeError: Ray is not initialised, or workers failed too often, with the message of the last.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig, TrainingFailedError
    from ray.train.torch import TorchConfig, TorchTrainer

    require_room("workers of a training", "workers.train_workers", num_workers, cpus, gpus)
    records, path = arrow_filesystem(storage_path)
    refused = storage.join(storage_path, REFUSED)
    storage.remove(refused)
    trainer = TorchTrainer(
        _run,
        train_loop_config={"loop": loop, "threads": max(1, int(cpus)), "refused": refused},
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=gpus > 0,
            resources_per_worker={"CPU": cpus} | ({"GPU": gpus} if gpus else {}),
        ),
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo", timeout_s=TIMEOUT_S),
        run_config=RunConfig(
            name=name,
            storage_path=path,
            storage_filesystem=records,
            failure_config=FailureConfig(max_failures=max_failures),
        ),
    )
    try:
        fit(trainer)
    except TrainingFailedError as error:
        _raise_refusal(refused)
        raise RuntimeError(
            f"the training failed in its workers (more than {max_failures} times): {error}; "
            "run the same command again to go on from the last checkpoint"
        ) from error
    _raise_refusal(refused)


def _raise_refusal(refused: str) -> None:
    if storage.exists(refused):
        message = storage.read_bytes(refused).decode()
        storage.remove(refused)
        raise ValueError(message)


def fit(trainer: Any) -> Any:
    """`trainer.fit()` of Ray Train in a thread of its own, its result or its exception.

    In the main thread Ray 2.60 installs a SIGINT handler that it never takes back: neither Ctrl-C nor a lost lease
    could interrupt the fit, or anything after it. Here an interrupt goes up at once; the training ends with the
    driver's connection to Ray.
    """
    outcome: dict[str, Any] = {}

    def target() -> None:
        try:
            outcome["result"] = trainer.fit()
        except BaseException as error:
            outcome["error"] = error

    thread = threading.Thread(target=target, name="ray-train", daemon=True)
    thread.start()
    while thread.is_alive():  # a join without a timeout would hold signals back
        thread.join(0.2)
    if "error" in outcome:
        raise outcome["error"]
    return outcome["result"]


def _run(config: dict[str, Any]) -> None:
    import ray.train
    import ray.train.torch
    import torch

    from model.ranks import Ranks

    if storage.exists(config["refused"]):  # one of the workers raised, and all were started again
        return
    context = ray.train.get_context()
    torch.set_num_threads(config["threads"])
    try:
        config["loop"](Ranks(context.get_world_rank(), context.get_world_size()), ray.train.torch.get_device())
    except ValueError as error:
        storage.write_bytes(config["refused"], str(error).encode())
        raise
