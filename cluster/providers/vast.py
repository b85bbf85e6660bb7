"""Vast.ai: an outbid or stopped instance is paused without any notice, and may come back much later.

Source: docs.vast.ai/instances/rental-types (interruptible, 2026-11-24). Recovery and
fencing are the coordinator's business; here is only how to know such a machine.
"""

from cluster.providers._base import Evidence, Feed, Machine


def detect(machine: Machine) -> Evidence:
    """Look for the names that Vast gives every container."""
    for name in ("VAST_CONTAINERLABEL", "CONTAINER_ID"):
        if machine.env.get(name, "").removeprefix("C.").isdecimal():
            return Evidence(is_here=True, why=f"{name}={machine.env[name]}")
    return Evidence(is_here=False, why="VAST_CONTAINERLABEL is not set")


def open_feeds(machine: Machine) -> list[Feed]:  # noqa: ARG001 (every provider's signature)
    """There is nothing to read."""
    return []
