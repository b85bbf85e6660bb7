"""Machines that the network cuts off: no connection ends and nobody is told, but all can still write where the run is.

The nodes are rented ones (`solvent nodes head` and `join`) in network namespaces. Their storage is not cut off, which
is the harder case: only fencing keeps a machine that is out of the world from what counts.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import pytest

from cluster.runtime.coordinator.nodes.hosts import HOST_SILENT_S
from elastic.checkpoint.format.manifest import list_committed, read_manifest
from elastic.records.fencing import CHECK_EVERY_S, get_newest_generation
from elastic.records.rundir import RunDir, parse_utc, read_rows
from elastic.storage import open_storage
from tests.ray._exact import COMPARABLE, LOSS_TOLERANCE, compare
from tests.ray._network import Network, NoNetworkError
from tests.ray._nodes import get_env
from tests.ray._rented import Rented
from tests.ray._runs import Run
from tests.ray._traces import find_processes, find_trainers, get_node, get_parent, is_alive, wait_until

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1200),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # one process reads the whole checkpoint
]

MACHINES = (1, 2, 3)
SLACK_S = 10.0
"""For a machine that does other things as well: to look, to form a world and to make its first step."""
RUN = {"train.steps": 100_000, **COMPARABLE}


@pytest.fixture(scope="module")
def rented():
    """A head and three nodes, each on a machine of its own."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    with ExitStack() as stack:
        stack.callback(shutil.rmtree, folder)
        try:
            network = stack.enter_context(Network(1 + len(MACHINES)))
        except NoNetworkError as error:
            pytest.skip(f"machines that can be cut off need root, network namespaces and iproute2: {error}")
        stack.callback(end_what_is_left, folder)
        rented = Rented(folder, network=network)
        stack.callback(rented.close)
        rented.start_head()
        for machine in MACHINES:
            rented.join(machine=machine)
        yield rented


def end_what_is_left(folder: Path) -> None:
    """End what belongs to the folder: Ray's dashboard agents outlive a raylet that ended by itself."""
    for pid in find_processes(folder):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    wait_until(lambda: not find_processes(folder), timeout_s=30, what=lambda: f"left: {find_processes(folder)}")


@dataclass(frozen=True, kw_only=True)
class Member:
    """A trainer and where it is."""

    machine: int
    node: str
    """The first digits of Ray's id."""
    trainer: int
    host: int


def find_members(rented: Rented) -> list[Member]:
    """Return the trainers by rank, as they would be in a world of all nodes."""
    found = []
    for machine in MACHINES:
        trainers = [pid for pid in find_trainers(rented.folder) if rented.network.holds(machine, pid)]
        found += [Member(machine=machine, node=get_node(pid), trainer=pid, host=get_parent(pid)) for pid in trainers]
    return sorted(found, key=lambda member: member.node)


def find_raylet(rented: Rented, machine: int) -> int:
    """Return Ray's daemon on a machine."""
    (raylet,) = (
        pid
        for pid in find_processes(rented.folder)
        if rented.network.holds(machine, pid) and Path(f"/proc/{pid}/comm").read_text().strip() == "raylet"
    )
    return raylet


def wait_for_end(rented: Rented, *pids: int, timeout_s: float = 120) -> None:
    wait_until(
        lambda: not any(is_alive(pid) for pid in pids),
        timeout_s=timeout_s,
        what=lambda: f"the end of {pids}\n{rented.get_output()}",
        every_s=0.2,
    )


def say(text: str) -> None:
    print(f"[{time.strftime('%H:%M:%S')}] {text}", flush=True)


def interrupt(run: Run) -> None:
    run.driver.send_signal(signal.SIGINT)
    assert run.wait() == 3, run.get_output()


def tell(rented: Rented, run: Run) -> None:
    """Show what happened, if a test fails, and leave no driver behind."""
    print(run.get_output(), rented.get_output()[-3000:], sep="\n----\n")
    for path in (run.dir.incidents, run.dir.attempts):
        print(*(json.dumps(row) for row in read_rows(path)), sep="\n")
    if run.driver.poll() is None:
        run.driver.kill()
        run.driver.wait()


def check_exact(run: Run, folder: Path) -> None:
    """Train the run to an end some steps on, and another one to the same, in one process without Ray each."""
    num_steps = run.last_row()["step"] + 5
    unbroken = RunDir(folder / "unbroken" / run.dir.root.name)
    for run_dir in (run.dir, unbroken):
        changes = [f"storage={run_dir.root.parent}", f"train.steps={num_steps}", "cluster.max_workers=1"]
        command = [sys.executable, "-m", "elastic", str(run.dir.config), *changes]
        subprocess.run(command, env=get_env(folder), cwd=folder, check=True, stdout=subprocess.DEVNULL)
    difference = compare(run.dir, unbroken)
    print(difference)
    assert (difference.steps, difference.samples) == (0, 0)
    assert difference.loss <= LOSS_TOLERANCE
    assert difference.state <= difference.state_tolerance


class Scene:
    """A run, and the machines that were cut off from it for a while."""

    def __init__(self, rented: Rented, run: Run) -> None:
        self.rented = rented
        self.run = run
        self.cuts: list[tuple[Member, float]] = []
        """With the Unix time of each."""

    def cut_off(self, member: Member) -> None:
        say(f"cut off: {member}")
        self.cuts.append((member, time.time()))
        self.rented.network.cut(member.machine)

    def mend(self, member: Member) -> None:
        """Let it come back, and wait until all train again."""
        self.rented.network.mend(member.machine)
        say("mended")
        step = self.run.wait_for_step(0, world_size=len(MACHINES), timeout_s=240)
        self.run.wait_for_step(step + 20)

    def lose_for_a_moment(self) -> None:
        """Ray may not even notice; what the machine had running is there when it comes back, and reports again."""
        member = find_members(self.rented)[-1]
        self.cut_off(member)
        step = self.run.wait_for_step(0, world_size=2)
        self.run.wait_for_step(step + 20)
        assert is_alive(member.trainer), "nothing stale was left that could come back"
        self.mend(member)

    def lose_rank_0_for_long(self) -> None:
        """Its trainer serves the store and writes the rows; all that trained there ends by itself."""
        member = find_members(self.rented)[0]
        self.cut_off(member)
        self.run.wait_for_step(0, world_size=2)
        wait_for_end(self.rented, member.host, member.trainer, timeout_s=300)
        self.mend(member)

    def lose_while_a_world_forms(self) -> None:
        """Try until it strikes a world that has begun and has made no step yet."""
        storage = open_storage(self.run.dir.root)
        for _ in range(10):
            victim, _, killed = find_members(self.rented)
            newest = get_newest_generation(storage)
            os.kill(killed.trainer, signal.SIGKILL)
            while get_newest_generation(storage) == newest:  # as fast as we can look
                assert self.run.driver.poll() is None, self.run.get_output()
            self.cut_off(victim)
            self.run.wait_for_step(0, world_size=2)
            self.mend(victim)
            row = next(row for row in read_rows(self.run.dir.attempts) if row["attempt"] == newest + 1)
            if row["first_step"] is None:
                return
        raise AssertionError("the world was faster ten times")


@pytest.fixture(scope="module")
def scene(rented, data, tmp_path_factory):
    """A run that lost a machine for a moment, the one of rank 0 for long, and one while a world formed."""
    run = Run(rented, data, tmp_path_factory.mktemp("cut"), **RUN)
    run.start()
    try:
        scene = Scene(rented, run)
        run.wait_for_step(30, world_size=3, timeout_s=180)
        scene.lose_for_a_moment()
        scene.lose_rank_0_for_long()
        scene.lose_while_a_world_forms()
        interrupt(run)
    finally:
        tell(rented, run)
    return scene


def find_losses(run: Run) -> list[dict]:
    return [row for row in read_rows(run.dir.incidents) if row["kind"] == "node_lost"]


def test_a_machine_that_is_cut_off_is_missed_in_time_and_named(scene):
    losses = find_losses(scene.run)
    assert [row["node"][:12] for row in losses] == [member.node for member, _ in scene.cuts]
    for row, (_, cut_s) in zip(losses, scene.cuts, strict=True):
        print(f"detected after {row['detected_s'] - cut_s:.1f} s, outage {row['outage_s']} s: {row['phases_s']}")
        assert row["world"] == "3 -> 2"
        assert row["detected_s"] - cut_s < HOST_SILENT_S + SLACK_S
        assert row["outage_s"] < HOST_SILENT_S + 2 * SLACK_S


def test_the_last_one_was_cut_off_while_a_world_formed(scene):
    attempts = read_rows(scene.run.dir.attempts)
    before, after = [row for row in attempts if row["change"] in ("trainer_lost", "node_lost")][-2:]
    assert (before["change"], before["world_size"]) == ("trainer_lost", 3)
    assert (after["change"], after["world_size"], after["first_step"]) == ("node_lost", 3, None)
    assert after["cause"].startswith(scene.cuts[-1][0].node)


def test_it_comes_back_and_trains_in_a_world_of_all(scene):
    worlds = [row["world_size"] for row in read_rows(scene.run.dir.attempts) if row["first_step"] is not None]
    assert [size for size, _ in groupby(worlds)] == [3, *[2, 3] * len(scene.cuts)]


def test_who_is_out_of_the_world_writes_no_row(scene):
    attempts = [row["attempt"] for row in scene.run.rows()]
    assert attempts == sorted(attempts)


def test_nothing_is_lost_or_repeated_and_the_run_is_exact(scene, tmp_path):
    check_exact(scene.run, tmp_path)


def test_a_trainer_that_goes_on_alone_is_fenced_once_another_took_over(rented, data, tmp_path):
    """The worst that can come back: its world is whole, its storage works, and nothing there ends it.

    Steps are slow, so that what its host cannot send does not fill the connection before Ray gives the node up.
    """
    small = {"cluster.max_workers": 1, "train.global_batch": 480}
    run = Run(rented, data, tmp_path, **{**RUN, **small, "run": "alone", "checkpoint.every_steps": 10})
    network = rented.network
    run.start()
    try:
        run.wait_for_step(12, timeout_s=180)
        (stale,) = find_members(rented)
        raylet = find_raylet(rented, stale.machine)
        os.kill(raylet, signal.SIGSTOP)  # it would end its node once it has missed the head for long enough
        cut_s = time.time()
        network.cut(stale.machine)
        run.wait_for_step(run.last_row()["step"] + 10)
        assert run.last_row()["attempt"] == 1
        run.wait_for(lambda: run.last_row()["attempt"] == 2, what="another one takes over", timeout_s=300)
        took_s = time.time()
        assert is_alive(stale.trainer), "nothing stale was left that had to be fenced"
        say(f"taken over after {took_s - cut_s:.1f} s")
        wait_for_end(rented, stale.trainer)
        say(f"fenced after {time.time() - took_s:.1f} s")
        network.mend(stale.machine)
        os.kill(raylet, signal.SIGCONT)
        wait_for_end(rented, stale.host)
        run.wait_for_step(run.last_row()["step"] + 12)
        interrupt(run)
    finally:
        tell(rented, run)
    # for a moment it may still write rows: they carry its attempt, and those of a newer one count
    until_s = took_s + CHECK_EVERY_S + SLACK_S
    assert not [row for row in run.rows() if row["attempt"] == 1 and parse_utc(row["time_utc"]) > until_s]
    storage = open_storage(run.dir.root)
    resumed_step = next(row["first_step"] for row in read_rows(run.dir.attempts) if row["attempt"] == 2) - 1
    newer = [checkpoint for checkpoint in list_committed(storage) if checkpoint.step > resumed_step]
    assert newer
    assert all(read_manifest(storage, checkpoint).generation >= 2 for checkpoint in newer)
    check_exact(run, tmp_path)
