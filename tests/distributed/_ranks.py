"""Run a function on several real processes that share a TCP store.

The processes are forked from a server that imported torch once, which saves seconds per test.
"""

import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from elastic.ports import WorldSpec
from elastic.world import World, close_world, open_world
from tests.forked import get_context

TIMEOUT_S = 60.0


def run_ranks(work: Callable[..., Any], num_ranks: int, *args: object) -> list[Any]:
    """Return what `work(rank, port, *args)` returned on each rank; a failure on any rank fails the test."""
    context = get_context()
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=TIMEOUT_S))
    queue = context.Queue()
    processes = [
        context.Process(target=_work, args=(queue, work, rank, store.port, args), daemon=True)
        for rank in range(num_ranks)
    ]
    for process in processes:
        process.start()
    results: dict[int, Any] = {}
    try:
        while len(results) < num_ranks:
            rank, result, error = queue.get(timeout=2 * TIMEOUT_S)
            if error:
                raise AssertionError(f"rank {rank} failed:\n{error}")
            results[rank] = result
    finally:
        for process in processes:
            process.join(10 if len(results) == num_ranks else 0)
            process.kill()
    return [results[rank] for rank in range(num_ranks)]


def _work(queue: Any, work: Callable[..., Any], rank: int, port: int, args: tuple[object, ...]) -> None:
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    # torch.compile's own: its import of mkldnn, and its look at the activations that a block starts from
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
    warnings.filterwarnings("ignore", "The .grad attribute of a Tensor that is not a leaf", UserWarning)
    try:
        queue.put((rank, work(rank, port, *args), ""))
    except BaseException:
        queue.put((rank, None, traceback.format_exc()))


def spec(rank: int, port: int, *, world_size: int, attempt: int) -> WorldSpec:
    return WorldSpec(
        rank=rank,
        world_size=world_size,
        local_rank=rank,
        local_world_size=world_size,
        attempt=attempt,
        store_host="127.0.0.1",
        store_port=port,
    )


def in_world(work: Callable[[World], Any], rank: int, port: int, *, world_size: int, attempt: int) -> Any:
    """Run `work(world)` in a world of its own and leave it; processes of a higher rank sit out."""
    if rank >= world_size:
        return None
    world = open_world(spec(rank, port, world_size=world_size, attempt=attempt), device="cpu", timeout_s=TIMEOUT_S)
    try:
        return work(world)
    finally:
        close_world(world)
