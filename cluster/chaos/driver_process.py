"""`solvent train` as a process that can be killed and started again."""

import os
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import IO

_SOLVENT = "from cluster.cli import enter; enter()"


class DriverProcess:
    """One run's driver, started at once; a session of its own, so that Ctrl-C reaches it through us only.

    Args:
        arguments: of `solvent train`.
        output: where it prints, errors included.
        env: added to this process's environment.
    """

    def __init__(self, arguments: Sequence[str], *, output: IO[str], env: Mapping[str, str]) -> None:
        self._command = [sys.executable, "-c", _SOLVENT, "train", *arguments]
        self._output = output
        self._env = {**os.environ, **env}
        self._process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            self._command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=self._env,
            start_new_session=True,
        )

    def poll(self) -> int | None:
        """Return its exit code; None while it runs."""
        return self._process.poll()

    def interrupt(self) -> None:
        """Ask it to save and end, resumable."""
        self._process.send_signal(signal.SIGINT)

    def restart(self) -> None:
        """Kill it as the kernel would, and start it again."""
        self.kill()
        self._process = self._start()

    def kill(self) -> None:
        """End it at once."""
        self._process.kill()
        self._process.wait()
