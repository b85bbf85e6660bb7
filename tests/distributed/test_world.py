"""Worlds open, end and follow each other in processes that live on."""

import random
import socket
import threading
import time
from contextlib import suppress
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from elastic.breaker import Breaker
from elastic.errors import ConfigError
from elastic.training.step import build_trainable
from elastic.world import close_world, get_device, open_world
from tests.distributed._ranks import in_world, run_ranks, spec
from tests.distributed._tiny import CONFIG, train

NUM_BROKEN = 12
HUNG_S = 4.0
"""The time-out of collectives: a rank that missed the end of its world takes as long."""


def _sum_in_worlds_of_2_and_1(rank: int, port: int):
    def total(world):
        return world.sum_(torch.tensor(world.rank + 1)).item(), dist.get_world_size()

    return [in_world(total, rank, port, world_size=size, attempt=attempt) for attempt, size in enumerate((2, 1, 2))]


def test_worlds_of_different_size_follow_each_other_in_the_same_processes():
    assert run_ranks(_sum_in_worlds_of_2_and_1, 2) == [[(3, 2), (1, 1), (3, 2)], [(3, 2), None, (3, 2)]]


def _leave_while_a_peer_waits(rank: int, port: int):
    """Rank 1 leaves each world but lives on: only closed connections can tell rank 0."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    waited_s = {}
    for attempt, strategy in enumerate(("ddp", "fsdp2", "hsdp")):
        world = open_world(spec(rank, port, world_size=2, attempt=attempt), device="cpu", timeout_s=15.0)
        trainable = build_trainable(replace(CONFIG, strategy=strategy), world)
        train(trainable, world, steps=1)
        if rank == 0:
            start_s = time.monotonic()
            with pytest.raises(RuntimeError, match=r"[Cc]onnection|[Tt]imed out"):
                train(trainable, world, steps=1)
            waited_s[strategy] = time.monotonic() - start_s
            store.set(f"failed-{strategy}", "")
        del trainable
        close_world(world, peers="lost")
        if rank == 1:
            store.wait([f"failed-{strategy}"])
    return waited_s


def test_a_rank_that_leaves_fails_its_peers_at_once_and_not_after_the_timeout():
    waited_s, _ = run_ranks(_leave_while_a_peer_waits, 2)
    assert waited_s.keys() == {"ddp", "fsdp2", "hsdp"}
    assert max(waited_s.values()) < 10.0, waited_s


def _open_with_a_missing_peer(rank: int, port: int):
    start_s = time.monotonic()
    with pytest.raises(dist.DistError):
        open_world(spec(0, port, world_size=2, attempt=1), device="cpu", timeout_s=1.0)
    return time.monotonic() - start_s


def test_opening_gives_up_after_the_timeout():
    (waited_s,) = run_ranks(_open_with_a_missing_peer, 1)
    assert 0.9 < waited_s < 10.0


def _meet_after_one_waited_in_vain(rank: int, port: int):
    """Rank 0 has waited for a peer that did not come; rank 1 knows nothing of that world."""
    if rank == 0:
        with pytest.raises(dist.DistError):
            open_world(spec(0, port, world_size=2, attempt=1), device="cpu", timeout_s=1.0)
    world = open_world(spec(rank, port, world_size=2, attempt=2), device="cpu", timeout_s=20.0)
    total = world.sum_(torch.tensor(1)).item()
    close_world(world)
    return total


def test_a_world_forms_after_one_that_did_not():
    assert run_ranks(_meet_after_one_waited_in_vain, 2) == [2, 2]


def _break_amid_messages(rank: int, port: int):
    """Leave world after world in which large messages never stop, when another thread says so."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    left_s = []
    for attempt in range(NUM_BROKEN):
        breaker = Breaker()
        breaker.arm(torch.device("cpu"))
        world = open_world(spec(rank, port, world_size=3, attempt=attempt), device="cpu", timeout_s=HUNG_S)
        thread = threading.Timer(random.Random(attempt).random() / 20 + rank / 1000, breaker.break_world)
        numbers, step, start_s = torch.ones(5_000_000), 0, 0.0
        with suppress(RuntimeError):
            while True:
                if step == 4:
                    start_s = time.monotonic()
                    thread.start()
                if breaker.is_broken and step % 4 == 0:  # as a training loop, which looks once a step
                    break
                world.sum_(numbers)
                step += 1
        left_s.append(time.monotonic() - start_s)
        breaker.disarm()
        close_world(world, peers="lost")
        thread.join()
        # the next world begins together
        store.add(f"left-{attempt}", 1)
        while store.add(f"left-{attempt}", 0) < 3:
            time.sleep(0.005)
    return left_s


def test_a_world_that_is_broken_while_messages_are_under_way_is_left_at_once():
    left_s = run_ranks(_break_amid_messages, 3)
    assert max(map(max, left_s)) < HUNG_S / 2, left_s


def _break_beside_an_upload(rank: int, port: int):
    """What this process opens for something else, as for the object store, is none of the world's."""
    store = dist.TCPStore("127.0.0.1", port, is_master=False)
    breaker = Breaker()
    presence = breaker.arm(torch.device("cpu"))
    world = open_world(spec(rank, port, world_size=2, attempt=1), device="cpu", timeout_s=30.0, presence=presence)
    with socket.create_server(("127.0.0.1", 0)) as server, socket.create_connection(server.getsockname()) as upload:
        taker, _ = server.accept()
        with taker:
            world.sum_(torch.ones(1))
            store.add("open", 1)
            while store.add("open", 0) < 2:
                time.sleep(0.005)
            if rank == 0:
                breaker.break_world()
            with pytest.raises(RuntimeError):
                world.sum_(torch.ones(1))
            upload.sendall(b"the last piece")
            received = taker.recv(100)
    breaker.disarm()
    close_world(world, peers="lost")
    return received


def test_the_end_of_a_world_leaves_uploads_alone():
    assert run_ranks(_break_beside_an_upload, 2) == [b"the last piece"] * 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without CUDA")
def test_cuda_is_refused_where_there_is_none():
    with pytest.raises(ConfigError, match=r"device=cuda .*Set device=cpu"):
        get_device("cuda", local_rank=0)
    assert get_device("auto", local_rank=0) == torch.device("cpu")
