"""A storage that is away, or full, at the very end of a run: its rows are complete, or what is missing is told.

Each run has a file system of its own as its storage. Away is what an unmounted one is: the folder is there, and empty.
"""

import contextlib
import shutil
import subprocess
import threading
import time
from pathlib import Path

import pytest

from cluster.report.status import get_status
from elastic.checkpoint.format.manifest import get_directory
from elastic.records.rundir import RunDir, read_rows
from tests.ray._runs import Run

pytestmark = [pytest.mark.long, pytest.mark.timeout(900)]

STEPS = 60
AWAY_S = 90


class Ended:
    """A run whose storage is taken from it, and what came of that.

    Args:
        harm: takes the mount and the other folder, does the harm and returns what ends it.
        at_step: the harm begins with the commit of this one.
    """

    def __init__(self, nodes, data, folder, name, harm, *, at_step, for_s):
        self.place, self.elsewhere = folder / name, folder / f"{name}-elsewhere"
        self.place.mkdir()
        self.elsewhere.mkdir()
        if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", self.place], check=False).returncode:
            pytest.skip("mounting needs root")
        settings = {"train.steps": STEPS, "cluster.max_workers": 1, "run": name, "fault.lease_s": 240}
        self.run = Run(nodes, data, folder / f"{name}-driver", **settings)
        self.run.overrides["storage"] = self.place
        self.run.dir = RunDir(self.place / name)
        self.at_step, self.for_s, self._harm = at_step, for_s, harm
        self.beside: list[str] = []
        self.waited_s = 0.0
        self.code = -1
        self.is_harmed = threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def start(self):
        self.run.start()
        self._thread.start()

    def join(self):
        self._thread.join()
        return self

    def close(self):
        for mount in (self.place, self.elsewhere):
            subprocess.run(["umount", "-l", mount], check=False, capture_output=True)

    def rows(self, name):
        return list(read_rows(getattr(self.run.dir, name)))

    def _watch(self):
        committed = self.run.dir.root / get_directory(self.at_step) / "COMMITTED"
        while not committed.exists() and self.run.driver.poll() is None:
            time.sleep(0.002)
        heal = self._harm(self.place, self.elsewhere)
        self.is_harmed.set()
        start_s = time.monotonic()
        while time.monotonic() < start_s + self.for_s and self.run.driver.poll() is None:
            time.sleep(0.1)
        self.waited_s = time.monotonic() - start_s
        heal()
        with contextlib.suppress(AssertionError):
            self.code = self.run.wait(timeout_s=200)
        self.beside = sorted(path.name for path in self.elsewhere.iterdir())


def unmount(place, elsewhere):
    """Have an empty folder in the place of the storage."""
    keep = elsewhere / "storage"
    keep.mkdir()
    subprocess.run(["mount", "--move", place, keep], check=True)

    def mount():
        for path in place.iterdir():  # what was written to the disk below
            shutil.move(path, elsewhere / path.name)
        subprocess.run(["mount", "--move", keep, place], check=True)
        keep.rmdir()

    return mount


def fill(place, elsewhere):
    """Write until nothing fits; again, as the run itself frees some."""
    stopped = threading.Event()

    def pour():
        with (place / "ballast").open("ab", buffering=0) as ballast:
            while not stopped.wait(0.01):
                with contextlib.suppress(OSError):
                    while ballast.write(bytes(1 << 20)):
                        pass
                with contextlib.suppress(OSError):
                    while ballast.write(bytes(512)):
                        pass

    thread = threading.Thread(target=pour)
    thread.start()

    def free():
        stopped.set()
        thread.join()
        (place / "ballast").unlink()

    return free


@pytest.fixture(scope="module")
def ended(nodes, data, tmp_path_factory):
    """Three runs: the next one trains while the one before it waits for its storage."""
    folder = Path(tmp_path_factory.mktemp("storages"))
    runs = {
        "away": Ended(nodes, data, folder, "away", unmount, at_step=STEPS, for_s=AWAY_S),
        "full": Ended(nodes, data, folder, "full", fill, at_step=STEPS, for_s=AWAY_S),
        "before": Ended(nodes, data, folder, "before", unmount, at_step=STEPS - 20, for_s=AWAY_S),
    }
    try:
        for run in runs.values():
            run.start()
            run.is_harmed.wait(240)
        for name, run in runs.items():
            run.join()
            print(f"==== {name}: exit code {run.code} after {run.waited_s:.0f} s away\n{run.run.get_output()}")
        yield runs
    finally:
        for run in runs.values():
            run.close()


@pytest.mark.parametrize("how", ["away", "full"])
def test_rows_are_complete_once_the_storage_is_back(ended, how):
    run = ended[how]
    assert run.waited_s > AWAY_S - 1, "it ended without its storage: it was no test"
    assert run.code == 0, run.run.get_output()
    assert "its last rows wait: " in run.run.get_output() and " row(s) of " in run.run.get_output()
    assert [row["step"] for row in run.rows("metrics")] == list(range(1, STEPS + 1))
    assert [row["end"] for row in run.rows("attempts")] == ["finished"]
    assert get_status(run.run.dir, now_s=time.time())["state"] == "finished"


def test_nothing_goes_to_the_disk_below_a_storage_that_was_unmounted(ended):
    assert {name: run.beside for name, run in ended.items()} == {name: [] for name in ended}


def test_a_storage_that_is_away_before_the_last_save_ends_whole_or_says_what_is_missing(ended):
    run = ended["before"]
    output = run.run.get_output()
    assert "Traceback" not in output
    if run.code == 0:
        assert [row["step"] for row in run.rows("metrics")] == list(range(1, STEPS + 1))
    else:
        assert run.code in (2, 3), output
        assert "storage: " in output and "resumes" in output
    rows = run.rows("metrics")
    run.run.start()
    assert run.run.wait() == 0, run.run.get_output()
    assert run.rows("metrics")[: len(rows)] == rows
    assert run.rows("metrics")[-1]["step"] == STEPS
