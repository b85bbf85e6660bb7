"""A trainer under Solvent's cluster: `elastic.training.run` at the end of a link to its host.

The process outlives its worlds: when a peer is lost or a change is due it leaves the world, keeps its device, its
compiled code and its snapshots, and waits to join the next.
"""

import gc
import logging
import os
import queue
import socket
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from cluster.runtime.coordinator.records.relayed import RelayedRun, RelayedSink, Streams
from cluster.runtime.messages import (
    Order,
    Ready,
    ReplicaServersTold,
    RowsKept,
    Warm,
    WorldLeft,
)
from cluster.runtime.node.host_spec import get_replica_folder
from cluster.runtime.trainers.forked import OrderLink
from cluster.runtime.trainers.interface import find_interface
from cluster.runtime.trainers.link_observer import LinkObserver
from cluster.types import Go, Join, Park
from elastic import config as configs
from elastic.breaker import Breaker
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.config import RunConfig
from elastic.errors import SolventError
from elastic.ports import Finished, Interrupted, Lost, MetricSink, Notice, WorldSpec
from elastic.records.rundir import RunDir
from elastic.sinks import jsonl
from elastic.storage import is_url, join_url, open_storage
from elastic.training import rehearsal
from elastic.training import run as elastic_run
from elastic.world import OwnStore

logger = logging.getLogger(__name__)


class WorldOrders:
    """What the coordinator says about one world: go, park, leave."""

    def __init__(self, attempt: int) -> None:
        self.attempt = attempt
        self.breaker = Breaker()
        self.go: queue.SimpleQueue[Go | None] = queue.SimpleQueue()
        """The rank's place; None if the world was given up."""
        self.replica_servers: ReplicaServersTold | None = None
        """The memories of the nodes, told before the place; None where nothing is kept there."""
        self.rows_kept: queue.SimpleQueue[RowsKept] = queue.SimpleQueue()
        """What is in the storage of the rows that were sent."""
        self._notice: Notice | None = None

    def get_notice(self) -> Notice | None:
        """Return the pending notice at once.

        Raises:
            DistError: the world was given up; a rank on its own has no connection that could tell it.
        """
        if self.breaker.is_broken:
            raise dist.DistError("the world was given up")
        return self._notice

    def take(self, order: Order) -> None:
        """Take one order."""
        match order:
            case ReplicaServersTold():
                self.replica_servers = order
            case Go():
                self.go.put(order)
            case Park():
                self._notice = Notice(
                    source=order.reason, deadline_s=order.deadline_s, keep_in=order.keep_in, leaves=order.leaves
                )
            case RowsKept():
                self.rows_kept.put(order)
            case _:  # leave
                self.breaker.break_world()
                self.go.put(None)


class Orders:
    """Reads what the coordinator says, on a thread of its own; the training loop only looks."""

    def __init__(self, link: OrderLink) -> None:
        self.worlds: queue.SimpleQueue[WorldOrders] = queue.SimpleQueue()
        threading.Thread(target=self._listen, args=(link,), name="link", daemon=True).start()

    def _listen(self, link: OrderLink) -> None:
        world = WorldOrders(0)
        while (orders := link.receive()) is not None:
            for order in orders:
                if isinstance(order, Join):
                    world = WorldOrders(order.attempt)
                    self.worlds.put(world)
                elif order.attempt == world.attempt:
                    world.take(order)


def run(
    link: OrderLink,
    config_fields: Mapping[str, Any],
    *,
    node: str,
    node_ip: str,
    replica_server: socket.socket | None,
    secret: str,
    folder: Path,
    rehearses: Literal["fully", "sparingly", "not"],
) -> None:
    """Open device and store, then train in one world after the other until one ends for good.

    Args:
        replica_server: connection to the node's replica server; None: it has none now.
        secret: opens the replica servers of the other nodes.
        folder: goes with the host.
        rehearses: sparingly beside a trainer that must not run out of memory, not at all where somebody waits.
    """
    logging.basicConfig(level=os.environ.get("SOLVENT_LOG", "WARNING"), format="%(message)s")
    config = configs.from_dict(config_fields)
    torch.set_num_threads(config.cluster.threads_per_worker)
    _choose_interface(node_ip)
    _open_device(config)
    own_store = OwnStore(node_ip, timeout_s=config.fault.collective_timeout_s)
    memory: Memory | None = None
    if config.checkpoint.memory != "off":
        memory = Memory(replica_server, node=node, secret=secret, folder=get_replica_folder(folder))
    orders, streams = Orders(link), Streams()
    if rehearses != "not":
        _rehearse(config, is_beside_others=rehearses == "sparingly")
        gc.collect()
        gc.freeze()  # the compiler's objects stay for good; a collection when a world is left need not walk them
    link.send(Warm())
    stays = True
    while stays:
        world = orders.worlds.get()
        own_store.open_door()
        store = own_store.store
        link.send(Ready(store_host=store.host, store_port=store.port, pid=os.getpid()))
        stays = _train_in(
            world, link, config, node=node, own_store=own_store, memory=memory, folder=folder, streams=streams
        )
    own_store.close()


def _choose_interface(node_ip: str) -> None:
    """Have gloo meet the other nodes where this one is reached, unless its user has named an interface.

    Left to itself it listens at the address that the machine's own name stands for. In the /etc/hosts of Debian and
    Ubuntu that is a loop-back one, and no other machine would ever get through.
    """
    if interface := find_interface(node_ip):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)


def _open_device(config: RunConfig) -> None:
    """Make the CUDA context now, which takes a third of a second, and not when a world waits for it.

    NCCL's own answer to a lost peer is to end the process. Ours is to leave the world, so it is told to stay out of it.
    """
    if config.device != "cpu" and torch.cuda.is_available():
        os.environ.setdefault("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0")
        torch.zeros(1, device="cuda")


def _rehearse(config: RunConfig, *, is_beside_others: bool) -> None:
    try:
        storage = open_storage(join_url(config.storage, config.run))
    except SolventError as error:
        logger.warning("the run's storage cannot be opened yet: %s", error)  # the world says so again, and ends the run
        return
    rehearsal.rehearse(config, storage, is_beside_others=is_beside_others)


def _train_in(
    world: WorldOrders,
    link: OrderLink,
    config: RunConfig,
    *,
    node: str,
    own_store: OwnStore,
    memory: Memory | None,
    folder: Path,
    streams: Streams,
) -> bool:
    """Train in one world and say how it ended; return whether this process is good for another one."""
    go = world.go.get()
    if go is None:
        link.send(WorldLeft(outcome="lost", reason="the world was given up", exit_code=3, stays=True))
        return True
    spec = WorldSpec(
        rank=go.rank,
        world_size=go.world_size,
        local_rank=go.local_rank,
        local_world_size=go.local_world_size,
        attempt=go.attempt,
        store_host=go.store_host,
        store_port=go.store_port,
        node=node,
    )
    if told := world.replica_servers:
        mean_s = told.mean_s_between_losses
        spec = replace(spec, replica_servers=told.replica_servers, peer=told.peer, mean_s_between_losses=mean_s)

    def close_door() -> None:
        # NCCL's own threads connect to the store that the world has chosen whenever they like
        if spec.rank or dist.get_backend() == "gloo":
            own_store.close_door()

    observer = LinkObserver(link, rank=spec.rank, local_rank=spec.local_rank, on_restored=close_door)
    run: RelayedRun | None = None
    sinks: list[MetricSink] = []

    def open_sinks() -> list[MetricSink]:
        sinks.append(RelayedSink(run) if run else jsonl.build(config, RunDir(Path(config.storage) / config.run)))
        return sinks

    try:
        if is_url(config.storage):
            storage = open_storage(join_url(config.storage, config.run))
            own = folder / f"files-{spec.attempt}-{spec.rank}"
            run = RelayedRun(
                storage, own, attempt=spec.attempt, streams=streams, send=link.send, answers=world.rows_kept
            )
        try:
            outcome = elastic_run.train(
                config,
                spec,
                notices=world,
                observer=observer,
                open_sinks=open_sinks,
                store=own_store.store if spec.rank == 0 else None,
                run=run,
                memory=memory,
                breaker=world.breaker,
            )
        finally:
            observer.flush()
    except SolventError as error:
        link.send(WorldLeft(outcome="failed", reason=str(error), exit_code=error.exit_code, stays=False))
        return False
    except Exception as error:
        reason = f"{type(error).__name__}: {error}"
        link.send(WorldLeft(outcome="crashed", reason=reason, exit_code=1, stays=False))
        raise
    finally:
        for sink in sinks:
            sink.close()
        if run:
            run.close()
    match outcome:
        case Finished():
            link.send(WorldLeft(outcome="finished", reason="all steps done", exit_code=0, stays=False))
            return False
        case Interrupted(reason=reason):
            link.send(WorldLeft(outcome="interrupted", reason=reason, exit_code=3, stays=True))
        case Lost(reason=reason):
            link.send(WorldLeft(outcome="lost", reason=reason, exit_code=3, stays=True))
    return True
