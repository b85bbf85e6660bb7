"""`solvent chaos` as users start it, and the same run without faults."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import yaml

from elastic.records.rundir import RunDir
from tests.ray._exact import COMPARABLE, LOSS_TOLERANCE, Difference
from tests.ray._nodes import get_env
from tests.ray._runs import SOLVENT, TINY
from tests.ray._walks import LIMITS, Row

STEPS_AFTER = 20
INTERRUPTED = 3
NUM_NODES, MOST_WORKERS = 3, 4


@dataclass(frozen=True, kw_only=True)
class Struck:
    """What `solvent chaos --json` printed, and where the run is."""

    exit_code: int
    result: dict[str, Any]
    log: str
    wall_s: float

    @property
    def run_dir(self) -> RunDir:
        return RunDir(Path(self.result["run"]))


def get_overrides(data: Path, storage: Path, *, num_steps: int = 100_000) -> list[str]:
    """Return what both the struck and the unbroken run are told beside `TINY`."""
    overrides = {
        "data.path": data,
        "storage": storage,
        "train.steps": num_steps,
        **COMPARABLE,
        "checkpoint.every_steps": 10,
        "cluster.max_workers": MOST_WORKERS,
        **LIMITS,
    }
    return [f"{key}={value}" for key, value in overrides.items()]


def strike(folder: Path, name: str, rows: Sequence[Row], *, data: Path, temporary: Path | None = None) -> Struck:
    """Run `solvent chaos` with these faults, until all have struck and run their course, and then some steps.

    Args:
        folder: what it shall leave is below it.
        temporary: what it shall not leave is below it; the same, if none is given.
    """
    config, faults = folder / "tiny.yaml", folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(TINY))
    faults.write_text(yaml.safe_dump(list(rows)))
    start_s = time.monotonic()
    process = subprocess.Popen(
        [
            *(sys.executable, "-c", SOLVENT, "chaos", config, "--faults", faults, "--nodes", str(NUM_NODES), "--json"),
            *("--steps-after", str(STEPS_AFTER)),
            *get_overrides(data, folder / "runs"),
            f"run={name}",
        ],
        env=get_env(temporary or folder),
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,  # it is interrupted once, by us
    )
    try:
        out, log = process.communicate()
    except BaseException:
        process.send_signal(signal.SIGINT)  # it parks the run and ends its cluster
        process.communicate()
        raise
    assert out, log
    return Struck(exit_code=process.returncode, result=json.loads(out), log=log, wall_s=time.monotonic() - start_s)


def finish(struck: Struck, folder: Path, *, data: Path) -> tuple[RunDir, RunDir]:
    """Train the struck run to an end a few steps on, and another one to the same, in one process without Ray each."""
    runs = (struck.run_dir, RunDir(folder / f"unbroken-{struck.run_dir.root.name}"))
    num_steps = struck.result["final_step"] + 5
    processes = [
        subprocess.Popen(
            [
                *(sys.executable, "-m", "elastic", struck.run_dir.config, f"run={run_dir.root.name}"),
                *get_overrides(data, run_dir.root.parent, num_steps=num_steps),
                "cluster.max_workers=1",
            ],
            env=get_env(folder),
            cwd=folder,
            stdout=subprocess.DEVNULL,
        )
        for run_dir in runs
    ]
    try:
        assert [process.wait() for process in processes] == [0, 0]
    finally:
        for process in processes:
            process.kill()
            process.wait()
    return runs


def find_problems(struck: Struck, difference: Difference, rows: Sequence[Row], sizes: Sequence[int]) -> list[str]:
    """Return what is not as it should be, one line each."""
    result = struck.result
    wanted = sorted((row["fault"], row["phase"]) for row in rows if "phase" in row)
    seen = sorted((f["fault"].split()[0], f["phase"]) for f in result["faults"] if "phase=" in f["fault"])
    worlds = [size for size, _ in groupby(result["worlds"])]
    checks = {
        f"exit code {struck.exit_code}": struck.exit_code == INTERRUPTED,
        f"missed {result['faults_missed']}": not result["faults_missed"],
        f"struck {seen}, not {wanted}": seen == wanted,
        f"{len(worlds) - 1} changes of size instead of {len(sizes) - 1}: {worlds}": len(worlds) >= len(sizes),
        f"{difference.steps} steps too few": difference.steps == 0,
        f"{result['samples_lost']} samples lost": result["samples_lost"] == 0,
        f"{result['samples_repeated']} samples repeated": result["samples_repeated"] == 0,
        f"other samples in {difference.samples} steps": difference.samples == 0,
        f"losses differ by {difference.loss:.1e}": difference.loss <= LOSS_TOLERANCE,
        f"final states differ by {difference.state:.1e}": difference.state <= difference.state_tolerance,
    }
    return [text for text, is_good in checks.items() if not is_good]
