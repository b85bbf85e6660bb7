"""The machine that this process runs on, as providers may see it."""

import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from cluster.providers import Machine, SelfDrain, fetch


def build_machine(
    node: str, *, grace_s: float, get_self_drain: Callable[[], SelfDrain | None] = lambda: None
) -> Machine:
    """Return this machine; `node` is Ray's id of it, empty outside a cluster."""
    return Machine(
        node=node,
        env=dict(os.environ),
        fetch=fetch,
        now_s=time.time,
        folder=Path(tempfile.gettempdir()),
        grace_s=grace_s,
        get_self_drain=get_self_drain,
    )
