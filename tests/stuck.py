"""A process that SIGKILL does not end: its tracer, which has asked to be told of its exit, never answers.

Such a process has taken the signal and runs no code of its own any more, as one in state D that a driver does not let
go of.
"""

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

_PTRACE_SEIZE, _PTRACE_O_TRACEEXIT = 0x4206, 0x40


class Grip:
    """What keeps a process from ending."""

    def __init__(self, tracer: int) -> None:
        self._tracer = tracer

    def let_go(self) -> None:
        """Let it end."""
        if self._tracer:
            os.kill(self._tracer, signal.SIGKILL)
            os.waitpid(self._tracer, 0)
            self._tracer = 0


@contextmanager
def grip(pid: int) -> Iterator[Grip]:
    """Keep a process from ending, whatever kills it."""
    ours, theirs = os.pipe()
    tracer = os.fork()
    if not tracer:
        for first, last in ((3, theirs), (theirs + 1, 4096)):  # what the test closes shall be closed
            os.closerange(first, last)
        trace = ctypes.CDLL(None, use_errno=True).ptrace
        trace.argtypes = [ctypes.c_long] * 4
        os.write(theirs, b"x" if trace(_PTRACE_SEIZE, pid, 0, _PTRACE_O_TRACEEXIT) == 0 else b"-")
        while True:
            signal.pause()
    held = Grip(tracer)
    try:
        assert os.read(ours, 1) == b"x", "a process of this user cannot be traced here"
        yield held
    finally:
        held.let_go()
        os.close(ours)
        os.close(theirs)
