"""RunPod: spot pods get SIGTERM, and SIGKILL 5 s later; there is nothing to poll.

Source: docs.runpod.io/references/faq (spot pods, 2026-11-24).
"""

from cluster.providers._base import Evidence, Feed, Machine
from cluster.providers._sigterm import open_sigterm_feed

GRACE_S = 5.0


def detect(machine: Machine) -> Evidence:
    """Look for the pod's id."""
    pod = machine.env.get("RUNPOD_POD_ID")
    if pod:
        return Evidence(is_here=True, why=f"RUNPOD_POD_ID={pod}")
    return Evidence(is_here=False, why="RUNPOD_POD_ID is not set")


def open_feeds(machine: Machine) -> list[Feed]:
    """Read the signal."""
    return [open_sigterm_feed(machine, get_grace_s=lambda: machine.grace_s or GRACE_S)]
