"""`python -m elastic` as real processes, forked from a server that has imported torch: seconds of each start."""

import multiprocessing
import os
import signal
import subprocess
import sys
import tempfile
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Self

ROOT = Path(__file__).parents[1]
_PRELOAD = ["elastic.__main__", "torch._dynamo", "torch.distributed.checkpoint.state_dict", "torch.testing"]


def get_context() -> ForkServerContext:
    """Return the context whose processes are forked from the server; the first one starts it."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(_PRELOAD)
    os.environ["OMP_NUM_THREADS"] = "1"  # read by the fork server when it imports torch
    return context


class Elastic:
    """`python -m elastic ARGUMENTS`, with what tests ask of a `subprocess.Popen`."""

    def __init__(self, *arguments: object, environment: dict[str, str], folder: Path = ROOT) -> None:
        self.args = ["python", "-m", "elastic", *map(str, arguments)]
        self._logs = tempfile.TemporaryDirectory(prefix="elastic-")
        self._files = [Path(self._logs.name, name) for name in ("out", "err")]
        what = (self.args[3:], environment, folder, self._files)
        self._process = get_context().Process(target=_be_elastic, args=what)
        self._process.start()
        self.pid: int = self._process.pid

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.join()
        self._logs.cleanup()

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: signal.Signals) -> None:
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Wait for its end, and return what it has written to standard output and standard error."""
        self._process.join(timeout)
        out, err = (path.read_text() if path.exists() else "" for path in self._files)
        if self.poll() is None:
            raise subprocess.TimeoutExpired(self.args, timeout or 0.0, output=out, stderr=err)
        return out, err


def _be_elastic(arguments: list[str], environment: dict[str, str], folder: Path, files: list[Path]) -> None:
    for number, path in enumerate(files, start=1):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        os.dup2(file, number)
        os.close(file)
    sys.stdout = os.fdopen(1, "w", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.chdir(folder)
    os.environ.clear()
    os.environ.update(environment)
    sys.path[:0] = [path for path in environment.get("PYTHONPATH", "").split(os.pathsep) if path]
    sys.argv = ["python -m elastic", *arguments]
    from elastic.__main__ import main

    sys.exit(main(arguments))
