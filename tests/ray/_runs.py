"""`solvent train` as users start it: a process that a test can watch through the run's files, interrupt and kill."""

import subprocess
import sys
from pathlib import Path
from typing import Protocol

import yaml

from elastic.records.rundir import RunDir, read_rows
from tests.ray._traces import wait_until

SOLVENT = "from cluster.cli import enter; enter()"
TINY = {
    "device": "cpu",
    "model": {"dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2, "ffn_dim": 128, "vocab_size": 512},
    "data": {"seq_len": 64, "record_samples": True},
    "train": {"global_batch": 24, "micro_batch": 12, "eval_samples": 12},
    "checkpoint": {"every_steps": 20},
    "cluster": {"min_workers": 1, "max_workers": 3},
    "cost": {"usd_per_gpu_hour": 3.6},
    "wandb": {"mode": "disabled"},
}
"""A step takes some tens of milliseconds."""


class Cluster(Protocol):
    """Where a run goes."""

    folder: Path

    @property
    def address(self) -> str: ...

    @property
    def driver_env(self) -> dict[str, str]: ...

    def enter(self) -> list[str]:
        """Return what goes before the driver's command."""
        ...


class Run:
    """One run name on one cluster; `start` may be called again after its driver has ended."""

    def __init__(self, nodes: Cluster, data: Path, storage: Path, **overrides: object) -> None:
        self.nodes = nodes
        self.storage = storage
        self.overrides = {"run": "r", "storage": storage, "data.path": data, **overrides}
        self.dir = RunDir(storage / str(self.overrides["run"]))
        self.driver: subprocess.Popen[bytes] | None = None
        self.num_starts = 0

    def start(self, **overrides: object) -> subprocess.Popen[bytes]:
        """Start the driver; `overrides` are for this time only."""
        self.storage.mkdir(parents=True, exist_ok=True)
        config = self.storage / "tiny.yaml"
        config.write_text(yaml.safe_dump(TINY))
        changes = [f"{key.replace('__', '.')}={value}" for key, value in {**self.overrides, **overrides}.items()]
        self.num_starts += 1
        with self._get_log(self.num_starts).open("wb") as log:
            self.driver = subprocess.Popen(
                [*self.nodes.enter(), sys.executable, "-c", SOLVENT, "train", config, *changes],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**self.nodes.driver_env, "RAY_ADDRESS": self.nodes.address},
                cwd=self.storage,
            )
        return self.driver

    def wait(self, *, timeout_s: float = 480) -> int:
        """Return the driver's exit code; the limit only ends a test that hangs."""
        assert self.driver is not None
        try:
            return self.driver.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the driver goes on:\n{self.get_output()}") from None

    def wait_for(self, condition, *, timeout_s: float = 180, what: str):
        """Wait for something that training does; fail at once if the driver ends."""

        def check():
            value = condition()
            assert value or self.driver is None or self.driver.poll() is None, f"the driver ended:\n{self.get_output()}"
            return value

        return wait_until(check, timeout_s=timeout_s, what=lambda: f"{what}\n{self.get_output()}")

    def wait_for_step(self, step: int, *, world_size: int | None = None, timeout_s: float = 180) -> int:
        """Wait until a step is done (and then one at this world size); return the last step done."""

        def is_done():
            row = self.last_row()
            return row and row["step"] >= step and world_size in (None, row["world_size"])

        self.wait_for(is_done, timeout_s=timeout_s, what=f"step {step} at world size {world_size}")
        return self.last_row()["step"]

    def rows(self) -> list[dict]:
        return list(read_rows(self.dir.metrics))

    def last_row(self) -> dict | None:
        rows = self.rows()
        return rows[-1] if rows else None

    def get_output(self, *, newest: bool = False) -> str:
        """Return what the driver has printed, this time and (unless `newest`) before."""
        numbers = range(self.num_starts if newest else 1, self.num_starts + 1)
        return "\n----\n".join(self._get_log(number).read_text() for number in numbers)

    def _get_log(self, number: int) -> Path:
        return self.storage / f"driver-{number}.log"
