"""Strangers at every port of a running cluster: the run trains on as if they were not there."""

import contextlib
import os
import signal
import socket
import statistics
import time

import pytest

from elastic.records.rundir import read_rows
from elastic.transport.handshake import Handshake
from tests.ray._nodes import open_nodes
from tests.ray._runs import Run
from tests.ray._strangers import find_ports, get_rss_mib, harass, say
from tests.ray._traces import find_hosts, find_processes, find_replica_servers, find_trainers, wait_until

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def nodes():
    with open_nodes(3, is_measured=True) as nodes:
        yield nodes


@pytest.fixture(scope="module")
def running(nodes, data, tmp_path_factory):
    """A run at work on three nodes, with steps that are long enough to be compared on a busy machine."""
    settings = {"train.steps": 100_000, "checkpoint.every_steps": 1000, "train.global_batch": 192, "fault.lease_s": 240}
    run = Run(nodes, data, tmp_path_factory.mktemp("run"), **settings)
    run.start()
    run.wait_for_step(10, world_size=3, timeout_s=240)
    yield run
    run.driver.send_signal(signal.SIGINT)
    assert run.wait() == 3, run.get_output()


def find_targets(folder):
    """Return all doors by what is behind them, those that Ray itself has opened last, and whose memory counts."""
    coordinator = find_coordinator(folder)
    own = find_own_port(coordinator)
    replica_servers = find_replica_servers(folder)
    doors = [("coordinator", own)]
    doors += [("replica server", address) for pid in replica_servers for address in find_ports(pid)]
    doors += [("trainer", address) for pid in find_trainers(folder) for address in find_ports(pid)]
    doors += [("host", str(path)) for path in folder.glob("solvent-*/socket")]
    doors += [("Ray", address) for address in find_ports(coordinator) if address != own]
    return doors, [coordinator, *replica_servers, *find_hosts(folder)]


def find_coordinator(folder):
    """Return its process; Ray writes the title anew at each call, and whoever reads it at that moment sees none."""

    def find():
        return [pid for pid, command in find_processes(folder).items() if "ray::Coordinator" in command]

    (pid,) = wait_until(find, timeout_s=60, what="a coordinator")
    return pid


def find_own_port(coordinator):
    """Return where hosts greet it, and not Ray."""
    hello = Handshake("guessed", role="caller", purpose="coordinator").start()
    (address,) = [address for address in find_ports(coordinator) if len(say(address, hello)) == len(hello) + 24]
    return address


def get_step_times(run, first, last):
    return [row["step_s"] for row in run.rows() if first < row["step"] <= last]


def test_strangers_at_every_port_neither_end_an_attempt_nor_slow_a_step_nor_fill_the_memory(running):
    doors, ours = find_targets(running.nodes.folder)
    assert {what for what, _ in doors} == {"coordinator", "replica server", "trainer", "host", "Ray"}
    start = running.wait_for_step(running.last_row()["step"] + 40)
    usual_s = statistics.median(get_step_times(running, start - 40, start))
    before = {pid: get_rss_mib(pid) for pid in ours}
    grown = {}
    for what, address in doors:
        if what == "Ray" and not grown:
            grown = {pid: get_rss_mib(pid) - rss for pid, rss in before.items()}
        step = running.last_row()["step"]
        harass(address)
        running.wait_for_step(step + 1, timeout_s=30)
        slowest_s = max(get_step_times(running, step, running.last_row()["step"]))
        print(f"{what} at {address}: slowest step {slowest_s:.2f} s, usual {usual_s:.2f} s")
    last = running.wait_for_step(running.last_row()["step"] + 5)
    times_s = get_step_times(running, start, last)
    print(f"{len(doors)} doors; usual step {usual_s:.2f} s, slowest {max(times_s):.2f} s; grown by {grown} MiB")
    assert {row["attempt"] for row in running.rows()} == {1}
    assert list(read_rows(running.dir.incidents)) == []
    assert max(grown.values()) < 20
    assert max(times_s) < 3 * usual_s
    assert "was refused" in running.get_output()


def test_a_coordinator_on_a_dead_one_s_port_is_not_led_by_a_stranger(running):
    """The next one finds the trainers as they were, though somebody else took the port before."""
    folder = running.nodes.folder
    trainers, hosts = set(find_trainers(folder)), set(find_hosts(folder))
    coordinator = find_coordinator(folder)
    address = find_own_port(coordinator)
    heard = []
    os.kill(coordinator, signal.SIGKILL)

    def take():
        with contextlib.suppress(OSError):
            return socket.create_server(address)
        return None

    with wait_until(take, timeout_s=10, what="the port is free") as listener:
        listener.settimeout(0.5)
        until_s = time.monotonic() + 8
        while time.monotonic() < until_s:
            with contextlib.suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.settimeout(0.5)
                    heard.append(connection.recv(4096))
                    connection.sendall(b'\0\0\0\x2c{"kind":"End","reason":"over","forget":true}' * 10)
                    heard.append(connection.recv(4096))
    assert heard, "no host came: it was no test"
    assert all(len(data) <= 40 for data in heard), "it was told more than a greeting's first bytes"
    running.wait_for(
        lambda: running.last_row()["attempt"] > 1, timeout_s=120, what="a world under the next coordinator"
    )
    assert set(find_hosts(folder)) == hosts
    assert set(find_trainers(folder)) == trainers
