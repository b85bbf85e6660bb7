"""Who may connect to a rank once its world is there: nobody."""

import multiprocessing
import socket
from datetime import timedelta

import torch
import torch.distributed as dist

from elastic.breaker import Breaker
from elastic.checkpoint.exchange import new_group
from elastic.world import OwnStore, WorldSpec, close_world, open_world
from tests.ray._strangers import find_ports

NUM_RANKS = 3
LIMIT_S = 60.0


def be_rank(rank, ports, ready, asked):
    """Form two worlds, one after the other; sum in both of them whenever that is asked for."""
    torch.set_num_threads(1)
    own_store = OwnStore("127.0.0.1", timeout_s=LIMIT_S)
    store = own_store.store
    ports[rank] = store.port
    for attempt in (1, 2):
        own_store.open_door()
        ready.wait(LIMIT_S)
        breaker = Breaker()
        presence = breaker.arm(torch.device("cpu"))
        spec = WorldSpec(
            rank=rank,
            world_size=NUM_RANKS,
            local_rank=0,
            local_world_size=1,
            attempt=attempt,
            store_host="127.0.0.1",
            store_port=ports[0],
            node=f"n{rank}",
        )
        own = store if rank == 0 else None
        world = open_world(spec, device="cpu", timeout_s=LIMIT_S, store=own, presence=presence)
        world.build_mesh(dp=NUM_RANKS)
        group = new_group(timedelta(seconds=LIMIT_S))
        own_store.close_door()
        asked.wait(LIMIT_S)  # all are there
        asked.wait(LIMIT_S)  # the strangers have been
        total = torch.ones(1)
        dist.all_reduce(total)
        dist.all_reduce(total, group=group)
        assert total.item() == NUM_RANKS**2
        breaker.disarm()
        del group
        close_world(world)
    own_store.close()


def is_let_in(address):
    with socket.socket() as stranger:
        stranger.settimeout(0.5)
        return stranger.connect_ex(address) == 0


def test_nobody_is_let_in_once_a_world_is_there_and_ranks_sum_on_in_this_one_and_the_next():
    context = multiprocessing.get_context("spawn")
    ports = context.Array("i", NUM_RANKS)
    ready, asked = context.Barrier(NUM_RANKS), context.Barrier(NUM_RANKS + 1)
    ranks = [context.Process(target=be_rank, args=(rank, ports, ready, asked)) for rank in range(NUM_RANKS)]
    for process in ranks:
        process.start()
    for _ in range(2):
        asked.wait(LIMIT_S)
        doors = [address for process in ranks for address in find_ports(process.pid)]
        stores = {("127.0.0.1", port) for port in ports}
        assert stores < set(doors)
        assert [door for door in doors if is_let_in(door)] == []
        asked.wait(LIMIT_S)
    for process in ranks:
        process.join(LIMIT_S)
    assert [process.exitcode for process in ranks] == [0] * NUM_RANKS
