"""Start `python -m elastic` as real processes, end them in rude ways, and read what they left."""

import os
import signal
import socket
import subprocess
import time
from pathlib import Path

from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, read_rows
from tests.forked import Elastic

ROOT = Path(__file__).parents[2]
WAIT_S = 120.0


class Ranks:
    """The processes of one attempt; in a `with` block none of them outlives the test.

    One rank is a plain `python -m elastic`; several get the environment that torchrun would give them, so that each
    has an exit code of its own.
    """

    def __init__(self, num_ranks: int, *arguments: str) -> None:
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(_find_free_port()), "WORLD_SIZE": str(num_ranks)}
        self._processes = [
            Elastic(
                *arguments,
                environment=build_environment(
                    **({**place, "RANK": str(rank), "LOCAL_RANK": str(rank)} if num_ranks > 1 else {}),
                ),
            )
            for rank in range(num_ranks)
        ]

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.__exit__()

    def send(self, number: signal.Signals, *ranks: int) -> None:
        for rank in ranks:
            self._processes[rank].send_signal(number)

    def wait_for_step(self, run: RunDir, step: int) -> None:
        """Return once an attempt newer than those in `attempts.jsonl` has finished this step."""
        before = max((row["attempt"] for row in read_rows(run.attempts)), default=0)
        wait_until(
            lambda: any(row["attempt"] > before and row["step"] >= step for row in read_rows(run.metrics)),
            self._processes,
        )

    def wait_for(self, rank: int) -> tuple[int, str]:
        """Return the exit code of one rank, and what it said."""
        output = "".join(self._processes[rank].communicate(timeout=WAIT_S))
        return self._processes[rank].returncode, output

    def wait(self) -> tuple[list[int], str]:
        """Return the exit code of each rank (negative: the signal that killed it), and what all of them said."""
        outputs = ["".join(process.communicate(timeout=WAIT_S)) for process in self._processes]
        return [process.returncode for process in self._processes], "\n".join(outputs)


def build_environment(**more: str) -> dict[str, str]:
    """Return our environment, single-threaded, in no world that a launcher around us named."""
    inherited = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    return {**inherited, "OMP_NUM_THREADS": "1", **more}


def start(command: list[str], **environment: str) -> subprocess.Popen[str]:
    """Start a command at the root of the project."""
    return subprocess.Popen(
        command,
        cwd=ROOT,
        env=build_environment(**environment),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def wait_until(is_so, processes) -> None:
    """Return when something is so; fail if a process ends before that, or it takes too long."""
    deadline_s = time.monotonic() + WAIT_S
    while not is_so():
        for process in processes:
            assert process.poll() is None, f"ended too early: {process.communicate()[0]}"
        assert time.monotonic() < deadline_s, "took too long"
        time.sleep(0.01)


def read_samples(run: RunDir) -> dict[int, list[int]]:
    """Return the samples of each step that counts, in the order of the ranks that consumed them."""
    samples = {}
    for row in final_rows(read_rows(run.metrics)):
        own = [list(read_rows(run.samples(attempt=row["attempt"], rank=r))) for r in range(row["world_size"])]
        samples[row["step"]] = [
            i for rows in own for entry in rows if entry["step"] == row["step"] for i in entry["ids"]
        ]
    return samples


def _find_free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
