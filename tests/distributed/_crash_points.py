"""Let a process die with -9 before or within one I/O operation of its own, chosen by number. No torch here."""

import ctypes
import os
import signal
import traceback

_PR_SET_PDEATHSIG = 1
_write = os.write  # as it is before anything is counted


def _half_of_bytes(operate, owner, data, *args):
    operate(owner, memoryview(data)[: len(data) // 2], *args)


def _half_of_tensor(operate, out, source, **kwargs):
    middle = len(out) // 2
    operate(out[:middle], source[:middle], **kwargs)


_HALVES = {"sendall": _half_of_bytes, "copy_": _half_of_tensor}


def count_operations(operations, fatal, say):
    """Let this process die before operation number `fatal` (None: never); `say` takes the name of each one before.

    A message and a copy are two operations: the first half of them may be all that was done.

    Args:
        operations: pairs of a module or class and the name of a function of it.
    """
    count = 0

    def step(name):
        nonlocal count
        if fatal is not None and count >= fatal:  # threads count side by side
            os.kill(os.getpid(), signal.SIGKILL)
        count += 1
        say(name)

    def wrap(owner, name):
        operate = getattr(owner, name)

        def counted(*args, **kwargs):
            step(name)
            if name in _HALVES and not (name == "copy_" and args[0].dtype.itemsize > 1):
                if count == fatal:
                    _HALVES[name](operate, *args, **kwargs)
                step(f"half-{name}")
            return operate(*args, **kwargs)

        setattr(owner, name, counted)

    for owner, name in operations:
        wrap(owner, name)


def fork(work, *args):
    """Call `work(say, *args)` in a process that ends with this one; return its id, and a pipe of the lines it says."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        try:
            work(lambda text: _write(writer, f"{text}\n".encode()), *args)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    os.close(writer)
    return child, os.fdopen(reader)


def run_forked(work, *args):
    """Call `work(say, *args)` in a process of its own; return the lines that it said, and whether it was killed."""
    child, pipe = fork(work, *args)
    with pipe:
        lines = pipe.read().splitlines()
    return lines, os.WIFSIGNALED(os.waitpid(child, 0)[1])
