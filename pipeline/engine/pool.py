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
from pipeline.engine.shards import SECOND, ShardActor, StageJob

BUSY = 0.9  # share of an elastic pool's actors with a shard, from which another is started where there is room
MAX_BLOCKS = 20_000  # up to here each shard has its own


def run_shards(
    actor: type[ShardActor], job: StageJob, pending: Sequence[int], workers: WorkersConfig
) -> Generator[Receipt, None, None]:
    """Do every pending shard on the connected cluster; a receipt of each comes when it ends.

    Workers without a shard do the late ones of others a second time (`pipeline.engine.attempts`); when all are done,
    what is still at work is stopped. Closing the iterator stops the workers. Ray's own errors (no resources, a worker
    that cannot start) are raised.
    """
    _configure_ray_data()
    least, most = (min(size, len(pending)) for size in (workers.size.min, workers.size.max))
    # One block a shard: a receipt arrives as soon as its shard is done.
    items = ray.data.from_items(
        [{"shard": shard} for shard in [*pending, *[SECOND] * (most - 1)]],
        override_num_blocks=min(len(pending), MAX_BLOCKS) + most - 1,
    )
    receipts = items.map_batches(
        actor,
        fn_constructor_args=(job, start_ledger(workers.attempts, pending)),
        batch_size=1,
        batch_format="numpy",
        # One task at a time: none waits behind a slow worker.
        compute=ray.data.ActorPoolStrategy(min_size=least, max_size=most, max_tasks_in_flight_per_actor=1),
        num_cpus=workers.cpus,
        num_gpus=(workers.gpus or None) if actor.uses_device else None,
        resources=workers.resources if actor.uses_device else None,
        memory=workers.memory_gb * 2**30,
    )
    left = set(pending)
    for batch in receipts.iter_batches(batch_size=None, prefetch_batches=0, batch_format="numpy"):
        for line in batch["receipt"]:
            receipt = Receipt.from_json(line)
            if receipt.shard in left:
                left.discard(receipt.shard)
                yield receipt
        if not left:
            return


def _configure_ray_data() -> None:
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    context.execution_options.preserve_order = False
    context.issue_detectors_config.detectors = []
    context.max_errored_blocks = 0  # never drop a block
    context.autoscaling_config.actor_pool_util_upscaling_threshold = BUSY
    context.actor_init_retry_on_errors = False
    context.max_consecutive_actor_init_deaths = 3  # a node may die while it loads weights
    context.execution_no_progress_timeout_s = -1  # a shard may take hours on a CPU
