"""Processes that outlive their worlds: each world is given up in the middle of a step, while one rank is silent.

What Ray and the coordinator would do is done by the ranks themselves, so that nothing else is in the way.
"""

import gc
import os
import threading
import time
from dataclasses import replace
from itertools import pairwise

import pytest

from elastic.breaker import Breaker
from elastic.checkpoint.replicas.process import start_replica_server
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.config import CheckpointConfig
from elastic.ports import Finished, Lost
from tests.distributed._loops import NoNotices, Watcher, lead_and_train, make_config, train_rank, write_data
from tests.distributed._ranks import run_ranks, spec

SECRET = "s3cret"
WORLDS = ((3, 4), (3, 8), (2, 12), (3, 16), (1, 20), (3, 24), (2, 28), (3, 32), (3, 10**6))
"""Ranks of each world, and the step after which it is given up."""
STEPS = 40
SILENT_S, PATIENCE_S = 1.5, 0.3


class Giver(Watcher):
    """Gives the world up from another thread, as the coordinator's order does; the last rank says nothing meanwhile."""

    def __init__(self, breaker, step, *, is_silent):
        super().__init__()
        self.breaker, self.step, self.is_silent = breaker, step, is_silent
        self.source = ""
        self.given_up_s = float("inf")

    def restored(self, progress, source):
        self.source = source

    def stepped(self, progress, row):
        super().stepped(progress, row)
        if progress.step == self.step:
            if self.is_silent:
                time.sleep(SILENT_S)
            threading.Timer(0 if self.is_silent else PATIENCE_S, self.give_up).start()

    def give_up(self):
        self.given_up_s = time.monotonic()
        self.breaker.break_world()


def live_through(rank, port, folder, connections, addresses):
    """Train in one world after the other; return what each was like."""
    node = f"n{rank}"
    memory = Memory(connections[node], node=node, secret=SECRET)
    checkpoint = CheckpointConfig(every_steps=15, memory_every_steps=1)
    config = replace(make_config(folder, "in-place", steps=STEPS), checkpoint=checkpoint)
    lives = []
    for attempt, (world_size, step) in enumerate(WORLDS, start=1):
        if rank >= world_size:
            lives.append(None)
            continue
        place = replace(
            spec(rank, port, world_size=world_size, attempt=attempt),
            node=node,
            replica_servers=addresses,
            peer=addresses[f"n{(rank + 1) % world_size}"] if world_size > 1 else None,
        )
        breaker = Breaker()
        # a rank on its own waits for nobody, and would not notice
        watcher = Giver(breaker, step, is_silent=rank == world_size - 1)
        notices = NoNotices() if world_size > 1 else StopAt(watcher)
        outcome = lead_and_train(
            config, place, notices=notices, observer=watcher, open_sinks=list, memory=memory, breaker=breaker
        )
        took_s = time.monotonic() - watcher.given_up_s
        gc.collect()
        held = (len(os.listdir("/proc/self/fd")), threading.active_count())  # noqa: PTH208
        lives.append((outcome, watcher.source, watcher.rows, took_s, held))
    if rank == 0:
        unbroken = train_rank(replace(config, run="unbroken"), rank, port, world_size=1, attempt=100)
        lives.append(unbroken[1])
    return lives


class StopAt:
    """The notices of a rank that is alone in its world: as a trainer's, they tell that it was given up."""

    def __init__(self, watcher):
        self.watcher = watcher

    def get_notice(self):
        if self.watcher.breaker.is_broken:
            raise ConnectionError("given up")


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    folder = tmp_path_factory.mktemp("in-place")
    write_data(folder)
    replica_servers = {
        f"n{rank}": start_replica_server(node=f"n{rank}", ip="127.0.0.1", secret=SECRET) for rank in range(3)
    }
    connections = {node: server.open_connection() for node, server in replica_servers.items()}
    try:
        return run_ranks(
            live_through,
            3,
            folder,
            connections,
            {node: ("127.0.0.1", server.port) for node, server in replica_servers.items()},
        )
    finally:
        for connection in connections.values():
            connection.close()
        for server in replica_servers.values():
            server.close()


def get_worlds(lives, rank):
    return [life for life in lives[rank][: len(WORLDS)] if life is not None]


@pytest.mark.parametrize("rank", range(3))
def test_a_world_that_is_given_up_is_left_at_once_whoever_is_silent(lives, rank):
    *lost, (last, *_) = get_worlds(lives, rank)
    assert isinstance(last, Finished)
    assert all(isinstance(outcome, Lost) for outcome, *_ in lost)
    # the silent rank has slept and may be left already; the others waited for it when they were told
    left_s = sorted(took_s for _, _, _, took_s, _ in lost)
    assert left_s[-2] < SILENT_S, left_s  # others may be at work on this machine: one may be late


def test_each_world_goes_on_from_memory_where_the_last_one_was(lives):
    worlds = get_worlds(lives, 0)
    assert [source for _, source, *_ in worlds] == ["scratch"] + ["memory"] * (len(WORLDS) - 1)
    for (_, _, before, *_), (_, _, after, *_) in pairwise(worlds):
        # a snapshot at every step, and the one of the last step may not have been whole on all ranks
        assert before[-1]["step"] - 2 <= after[0]["step"] - 1 <= before[-1]["step"]


def test_every_step_has_the_loss_of_an_unbroken_run(lives):
    expected = {row["step"]: row["loss"] for row in lives[0][-1]}
    seen = {}
    for _, _, rows, *_ in get_worlds(lives, 0):
        for row in rows:
            assert row["loss"] == pytest.approx(expected[row["step"]], rel=1e-4)
            seen[row["step"]] = row["loss"]
    assert seen.keys() == expected.keys()


@pytest.mark.parametrize("rank", range(3))
def test_worlds_leave_no_descriptor_and_no_thread_behind(lives, rank):
    by_size = {}
    for (world_size, _), life in zip(WORLDS, lives[rank], strict=False):
        if life is not None:
            by_size.setdefault(world_size, []).append(life[-1])
    # the first world of a size may open what later ones use again
    for held in by_size.values():
        assert held[-1][0] <= held[min(1, len(held) - 1)][0], held
        assert held[-1][1] <= held[min(1, len(held) - 1)][1], held
