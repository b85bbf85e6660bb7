"""Trainers that know nothing of torch, for hosts under test, and what is read of the messages about them."""

import os

from cluster.runtime.messages import Alive, Ready, ReplicaServersTold, Stepped, Warm, WorldLeft
from cluster.types import Go, Join, Leave, Slot
from elastic.ports import Progress

NODE = "n" * 56


def at(name):
    """Return a slot of the node under test."""
    return Slot(NODE, name)


def is_said(message, kind, fields):
    """Tell whether a message is of a kind and has these fields; a slot counts by its name."""
    found = {name: getattr(message, name, None) for name in fields}
    if isinstance(found.get("slot"), Slot):
        found["slot"] = found["slot"].name
    return isinstance(message, kind) and found == fields


def live(link, config, **_):
    """Wait for worlds, and leave each when told to; in one that goes, tell of a step and of replica servers."""
    link.send(Warm())
    replica_servers = {}
    while (orders := link.receive()) is not None:
        for order in orders:
            match order:
                case Join():
                    link.send(Ready(store_host="h", store_port=1, pid=os.getpid()))
                    link.send(Alive())
                case ReplicaServersTold():
                    replica_servers = order.replica_servers
                case Go():
                    row = {"replica_servers": sorted(replica_servers)}
                    link.send(Stepped(progress=Progress(step=1, tokens=1), row=row, phases=()))
                case Leave():
                    link.send(WorldLeft(outcome="lost", reason="told", exit_code=3, stays=True))
                case _:
                    pass
