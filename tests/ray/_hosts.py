"""A host under test: a real daemon, real trainers, a raylet that only sleeps, and a coordinator that the test plays."""

import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from cluster.runtime.coordinator.coordinator_address import CoordinatorAddress
from cluster.runtime.messages import FROM_HOST, Claim, HostHello, Ready, Renew, TrainerSaid, Welcome
from cluster.runtime.node.connect import connect, tell_address
from cluster.runtime.node.start_host import launch_host
from cluster.types import Go, Join
from elastic.config import RunConfig
from elastic.transport import Acceptor, Link
from tests.plain_trainers import NODE, at, is_said
from tests.ray._traces import assert_nothing_left, wait_until
from tests.ray._warm_hosts import start_warm_host

LEASE_S = 2.0
SECRET = "s3cret"


class Peer:
    """The test's end of a link: waits for messages of a kind, keeps the others."""

    def __init__(self, link):
        self.link = link
        self.messages = []
        self.is_gone = False

    def expect(self, kind, *, timeout_s=20.0, **fields):
        """Return the first message of a kind with these fields."""
        wanted = f"{kind.__name__} with {fields}"
        deadline_s = time.monotonic() + timeout_s
        while True:
            for message in self.messages:
                if is_said(message, kind, fields):
                    self.messages.remove(message)
                    return message
            assert not self.is_gone, f"it left without {wanted}; it said {self.messages}"
            assert time.monotonic() < deadline_s, f"no {wanted}; it said {self.messages}"
            self.read(0.1)

    def read(self, timeout_s):
        new = self.link.receive(timeout_s)
        self.is_gone = new is None
        self.messages += new or []

    def expect_end(self, *, timeout_s):
        deadline_s = time.monotonic() + timeout_s
        while not self.is_gone:
            assert time.monotonic() < deadline_s, "it is still there"
            self.read(0.1)


class HostUnderTest:
    """A started host with all that it depends on."""

    def __init__(self, folder, lease_s, config):
        self.folder = folder
        self.config = RunConfig(storage=str(folder / "host" / "runs"), **config)
        self.raylet = subprocess.Popen(["sleep", "600"], env={"TMPDIR": str(folder)})
        self.log = folder / "host" / "host.log"
        self.spec = {
            "node": NODE,
            "node_ip": "127.0.0.1",
            "folder": str(folder / "host"),
            "coordinator_address": asdict(self.sit_down(generation=1)),
            "raylet_pid": self.raylet.pid,
            "secret": SECRET,
            "lease_s": lease_s,
            "config": asdict(self.config),
        }
        self.coordinator = None
        self.agents = []

    def start(self, **changes):
        """Start it, without the seconds that Python and torch take."""
        start_warm_host({**self.spec, **changes}, {**os.environ, "TMPDIR": str(self.folder)})

    def launch(self, **changes):
        """Start it as a Ray worker does."""
        launch_host({**self.spec, **changes}, {**os.environ, "TMPDIR": str(self.folder)})

    def sit_down(self, generation):
        """Be the coordinator from now on; return where."""
        listener = socket.create_server(("127.0.0.1", 0))
        self.listener = Acceptor(listener, say=print, secret=SECRET, purpose="coordinator")
        return CoordinatorAddress(generation=generation, host="127.0.0.1", port=listener.getsockname()[1])

    def take_address(self, generation):
        """Be the coordinator from now on, of which the host is told."""
        assert tell_address(self.folder / "host", self.sit_down(generation))

    def meet(self):
        """Let the host come, and take it; return what it says first."""
        hello = self.listen()
        self.coordinator.link.send(Welcome())
        return hello

    def listen(self):
        """Let the host come, but do not answer; return what it says."""
        deadline_s = time.monotonic() + 60
        while not (peers := self.listener.turn(0.1)):
            assert time.monotonic() < deadline_s, "no host came"
        self.coordinator = Peer(Link(peers[0], FROM_HOST, sends="waiting"))
        return self.coordinator.expect(HostHello)

    def leave_address(self):
        """End as the coordinator; return once the host has noticed."""
        self.listener.close()
        self.coordinator.link.close()
        wait_until(lambda: "the coordinator is gone" in self.log.read_text(), timeout_s=20, what="it is noticed")

    def connect(self):
        """Return a new connection of an agent."""
        agent = Peer(connect(self.folder / "host"))
        self.agents.append(agent)
        return agent

    def claim(self, group, slot="cpu0"):
        """Come as an agent; return its end of the link."""
        agent = self.connect()
        agent.link.send(Claim(group=group, group_size=1, pid=1, slot=slot, env={"CUDA_VISIBLE_DEVICES": ""}))
        return agent

    def renew(self, *slots, for_s):
        """Renew the leases of these slots, as a coordinator does that expects agents for them."""
        until_s = time.monotonic() + for_s
        while time.monotonic() < until_s:
            self.coordinator.link.send(Renew(slots=slots))
            time.sleep(LEASE_S / 4)

    def join(self, attempt=1, slot="cpu0"):
        """Have a slot's trainer join a world; return its process id once it waits for its place."""
        self.coordinator.link.send(Join(slot=at(slot), attempt=attempt))
        said = self.coordinator.expect(TrainerSaid, slot=slot, attempt=attempt).message
        assert isinstance(said, Ready)
        return said.pid

    def go(self, attempt, slot):
        """Let a trainer that waits for its place train alone."""
        place = dict.fromkeys(("rank", "local_rank"), 0) | dict.fromkeys(("world_size", "local_world_size"), 1)
        store = {"store_host": "127.0.0.1", "store_port": 0}
        self.coordinator.link.send(Go(slot=at(slot), attempt=attempt, **place, **store))

    def close(self):
        self.raylet.kill()
        self.raylet.wait()
        self.listener.close()
        for peer in filter(None, (self.coordinator, *self.agents)):
            peer.link.close()


@contextmanager
def prepare_host(lease_s=LEASE_S, **config) -> Iterator[HostUnderTest]:
    """All but the host itself."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    host = HostUnderTest(folder, lease_s, config)
    try:
        yield host
    finally:
        host.close()
        assert_nothing_left(folder, timeout_s=5)
        shutil.rmtree(folder)


@contextmanager
def run_host(lease_s=LEASE_S, **config) -> Iterator[HostUnderTest]:
    with prepare_host(lease_s, **config) as host:
        host.start()
        host.hello = host.meet()
        yield host
