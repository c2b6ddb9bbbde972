"""The engine: run the pending shards of a stage on a pool of Ray actors and yield a receipt for each.

One operator per execution, no read or write task: the pool cannot starve anything, and only receipts cross Ray. A
lost worker or node is replaced by Ray and its shard done again, which is harmless because a part is written whole.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import ray

from pipeline.config.workers import WorkersConfig
from pipeline.engine.attempts import start_ledger
from pipeline.engine.receipts import Receipt
from pipeline.engine.shards import ShardActor, StageJob

MAX_BLOCKS = 20_000  # one block a shard up to here: a receipt arrives as soon as its shard is done


def run_shards(
    actor: type[ShardActor], job: StageJob, pending: Sequence[int], workers: WorkersConfig
) -> Generator[Receipt, None, None]:
    """Do every pending shard on the connected cluster; receipts come in the order the shards end.

    Closing the iterator stops the workers. Ray's own errors (no resources, a worker that cannot start) are raised.
    """
    _configure_ray_data()
    items = ray.data.from_items(
        [{"shard": shard} for shard in pending], override_num_blocks=min(len(pending), MAX_BLOCKS)
    )
    receipts = items.map_batches(
        actor,
        fn_constructor_args=(job, start_ledger(workers.attempts)),
        batch_size=1,
        batch_format="numpy",
        compute=ray.data.ActorPoolStrategy(
            min_size=min(workers.size.min, len(pending)), max_size=min(workers.size.max, len(pending))
        ),
        num_cpus=workers.cpus,
        num_gpus=(workers.gpus or None) if actor.uses_device else None,
        resources=workers.resources if actor.uses_device else None,
        memory=workers.memory_gb * 2**30,
    )
    for batch in receipts.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
        for line in batch["receipt"]:
            yield Receipt.from_json(line)


def _configure_ray_data() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    context.issue_detectors_config.detectors = []
    context.max_errored_blocks = 0  # never drop a block
    context.actor_init_retry_on_errors = False
    context.max_consecutive_actor_init_deaths = 3  # a node may die while it loads weights
    context.execution_no_progress_timeout_s = -1  # a shard may take hours on a CPU
