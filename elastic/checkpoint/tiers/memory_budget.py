"""How many snapshots a world keeps: all ranks agree on what each node has room for, and say what fewer of them mean."""

import logging

import torch

from elastic.checkpoint.durable.storage_errors import estimate_checkpoint_bytes
from elastic.checkpoint.staging.host_memory import NUM_COPIES, WAYS, MemoryBudget, fits_budgets, has_room_at_once
from elastic.checkpoint.staging.shared_memory import GIB
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.config import RunConfig
from elastic.world import World

logger = logging.getLogger(__name__)

_UNEVEN, _UNEVEN_BYTES = 1.01, 2**24
"""How much more than its share a rank may have of a state that is not there yet, and a header."""


def agree_on_memory_budget(memory: Memory | None, config: RunConfig, world: World, *, begins: bool) -> Memory | None:
    """Plan, on all ranks, how many snapshots there is room for; do without them where a node has none for its own.

    Args:
        begins: nothing was restored, so the state is not all there before the first step; memory for it is found now.
    """
    if memory is None:
        return None
    shard_bytes = estimate_checkpoint_bytes(config.num_trained_params) // world.world_size
    has_peers = config.checkpoint.memory == "peer" and world.world_size > world.local_world_size
    for num_buffers, most_copies in WAYS:
        num_copies = most_copies if has_peers else 0
        for waits in (False, True):  # to wait costs seconds, which are rarely needed
            own = memory.measure_budget(
                *(shard_bytes, world.local_rank), num_buffers=num_buffers, num_copies=num_copies, waits=waits
            )
            budgets = _gather_budgets(own, world)
            if fits_budgets(budgets, spare_bytes=GIB):
                buffers = memory.get_buffers(world.device)
                buffers.begin_world(num_buffers, has_room_at_once=has_room_at_once(budgets, spare_bytes=GIB))
                if begins:
                    buffers.reserve(int(shard_bytes * _UNEVEN) + _UNEVEN_BYTES)
                if world.rank == 0:
                    _tell_budget(shard_bytes, num_buffers, num_copies, has_peers=has_peers)
                return memory
            is_full = not fits_budgets([budget for budget in budgets if budget.node == own.node], spare_bytes=GIB)
            if is_full and waits and (num_buffers, most_copies) == WAYS[-1]:
                logger.warning(
                    "this node has %.1f GiB of host memory left, too little for snapshots of %.1f GiB a rank, so this "
                    "world keeps none: give it more, or set checkpoint.memory=off",
                    own.available_bytes / GIB,
                    shard_bytes / GIB,
                )
    return None


def _gather_budgets(own: MemoryBudget, world: World) -> list[MemoryBudget]:
    """Return what all ranks see."""
    table = torch.zeros(world.world_size, len(own), dtype=torch.int64, device=world.device)
    table[world.rank] = torch.tensor(own)
    return [MemoryBudget(*row) for row in world.sum_(table).tolist()]


def _tell_budget(shard_bytes: int, num_buffers: int, num_copies: int, *, has_peers: bool) -> None:
    """Say what snapshots take on each node, and what fewer of them mean."""
    logger.info(
        "snapshots take %.1f GiB of host memory a rank (%d of %.2f GiB) and %.1f GiB for copies of other nodes'",
        *(num_buffers * shard_bytes / GIB, num_buffers, shard_bytes / GIB, num_copies * shard_bytes / GIB),
    )
    if has_peers and not num_copies:
        logger.warning(
            "a node has no room for copies of another one's snapshots, so the loss of a node falls back on the storage "
            "(a lost trainer does not): %.1f GiB more a rank would do, or checkpoint.memory=node says so",
            NUM_COPIES * shard_bytes / GIB,
        )
    if num_buffers == 1:
        logger.warning(
            "a node has room for one snapshot at a time, so a trainer that is lost while one is made falls back on the "
            "storage: %.1f GiB more a rank would do",
            shard_bytes / GIB,
        )
