"""The power of all machines fails at once; the same command on the same machines goes on from their disks."""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path

import pytest

from elastic.checkpoint.format.manifest import list_committed
from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, read_rows
from elastic.storage import open_storage
from tests.ray._exact import read_losses, read_samples
from tests.ray._nodes import Nodes, get_env
from tests.ray._runs import Run
from tests.ray._traces import find_processes, wait_until

pytestmark = pytest.mark.long  # in make test: tests/contract/test_node_disk.py, tests/distributed/test_memory_tier.py

NUM_NODES, STEPS = 2, 150


@pytest.fixture
def folder():
    """Where a cluster lives whose end nobody tidies up."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    yield folder
    kill_all(folder)
    shutil.rmtree(folder, ignore_errors=True)


def kill_all(folder: Path) -> None:
    """End every process of a folder at once, and whoever a dying one has started."""

    def strike() -> bool:
        alive = find_processes(folder)
        for pid in alive:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not alive

    wait_until(strike, timeout_s=30, what="all processes of the cluster are gone", every_s=0.2)


def list_states(disk: Path) -> dict[str, set[str]]:
    """Return the ranks whose own shards of a state are on the disk, by state."""
    states: dict[str, set[str]] = {}
    for path in disk.rglob("*.snapshot"):
        generation, step, rank, *_ = path.stem.split("-")
        if not path.stem.endswith("-copy"):
            states.setdefault(f"{generation}-{step}", set()).add(rank)
    return states


def test_a_run_goes_on_from_the_disks_of_its_nodes(folder, data, tmp_path):
    disk = tmp_path / "disk"
    nodes = Nodes(folder, num_nodes=NUM_NODES)
    settings = {
        "train.steps": STEPS,
        "cluster.max_workers": NUM_NODES,
        "checkpoint.every_steps": 1_000_000,
        "checkpoint.memory_every_steps": 5,
        "checkpoint.node_disk": disk,
        "checkpoint.node_disk_every_s": 0.5,
    }
    run = Run(nodes, data, tmp_path / "storage", **settings)
    run.start()
    run.wait_for(
        lambda: sum(len(ranks) == NUM_NODES for ranks in list_states(disk).values()) > 1,
        timeout_s=180,
        what="two states are on the disks",
    )
    kill_all(folder)
    nodes.close()
    run.driver.wait(30)
    assert run.last_row()["step"] < STEPS
    assert list_committed(open_storage(run.dir.root)) == []
    complete = max(state for state, ranks in list_states(disk).items() if len(ranks) == NUM_NODES)
    (life,) = disk.iterdir()
    assert life.name.startswith("solvent-r-")

    run.nodes = Nodes(folder, num_nodes=NUM_NODES)
    try:
        run.start()
        assert run.wait() == 0, run.get_output()
    finally:
        run.nodes.close()

    first, second, *_ = read_rows(run.dir.attempts)
    assert (first["end"], first["attempt"]) == ("lost", 1)
    assert (second["resumed_from"], second["first_step"]) == ("disk", int(complete.split("-")[1]) + 1)
    assert not life.exists()  # it is finished, and nobody goes on from there
    unbroken = train_unbroken(run, tmp_path / "unbroken")
    assert read_losses(run.dir) == pytest.approx(read_losses(unbroken), rel=1e-4)
    assert read_samples(run.dir) == read_samples(unbroken)
    assert len(final_rows(read_rows(run.dir.metrics))) == STEPS


def train_unbroken(run: Run, storage: Path) -> RunDir:
    """Train the same in one process without Ray."""
    storage.mkdir()
    changes = [f"storage={storage}", "cluster.max_workers=1"]
    command = [sys.executable, "-m", "elastic", str(run.dir.config), *changes]
    subprocess.run(command, env=get_env(storage), cwd=storage, check=True, stdout=subprocess.DEVNULL)
    return RunDir(storage / run.dir.root.name)
