"""Replica servers whose checksums take long: a busy machine, made to order."""

import os
import sys
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def slow_checksums(*, s_per_mib: float) -> Generator[None]:
    """Let replica servers that are started meanwhile take so long for each MiB, by each of their threads."""
    folder = str(Path(__file__).parent / "distributed" / "_slow_servers")
    sys.path.insert(0, folder)  # replica servers have the path of who starts them
    os.environ["SLOW_CHECKSUM_S_PER_MIB"] = str(s_per_mib)
    try:
        yield
    finally:
        del os.environ["SLOW_CHECKSUM_S_PER_MIB"]
        sys.path.remove(folder)
