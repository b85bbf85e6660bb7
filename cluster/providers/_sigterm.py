"""SIGTERM as a notice, for machines whose only notice it is.

The signal goes to the container's first process, or to what systemd or a user started: to `ray start --block`, never to
a Ray worker such as ours. Ray answers by draining its own node for a fixed time (30 s, or
RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S), and that is what this feed reads. What the machine really grants is known
to the provider or the configuration; the node is gone at the earlier of the two ends.

Nothing of this works if the first process is a shell that passes no signals on: start Ray with `exec ray start
--block`, or, if the script must stay, have it trap the signal and write the notice file (see `plain`). A systemd unit
needs KillMode=mixed, or every worker gets the signal, too.
"""

from collections.abc import Callable, Sequence

from cluster.providers._base import Feed, Machine, NodeNotice

RAY_SETTING = "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S"
RAY_DEFAULT_S = 30.0


def open_sigterm_feed(machine: Machine, *, get_grace_s: Callable[[], float]) -> Feed:
    """Read whether Ray on this node was told to end; the first sight counts, whoever drains the node anew after that.

    Args:
        get_grace_s: returns the seconds from the signal to the end.
    """
    seen: list[NodeNotice] = []

    def read() -> Sequence[NodeNotice]:
        if not seen and (drain := machine.get_self_drain()):
            lead_s = min(get_grace_s(), drain.lead_s)
            seen.append(NodeNotice(id="sigterm", reason="SIGTERM", deadline_s=drain.started_s + lead_s))
        return seen

    return Feed(name="SIGTERM", every_s=0.25, read=read)
