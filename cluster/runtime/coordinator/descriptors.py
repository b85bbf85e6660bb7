"""How many files and sockets this process may have open: as many as its machine allows, said if that is too few.

Many systems start processes with 1,024 and let them have far more for the asking. The coordinator holds a connection
of each host; the soft limit is there for programs that use select(), and nothing here does.
"""

import resource

OTHERS = 256
"""What Ray's worker process, the storage, and callers that have not proved themselves hold besides; an estimate."""


def raise_limit() -> int | None:
    """Raise the soft limit to the hard one and return it; None if there is none."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        except (OSError, ValueError):  # a sandbox that forbids it: the soft limit is what counts
            return soft
    return None if hard == resource.RLIM_INFINITY else hard


def describe_shortage(limit: int | None, num_hosts: int) -> str:
    """Return a line if so many hosts cannot all be connected; empty if they can."""
    needed = num_hosts + OTHERS
    if limit is None or needed <= limit:
        return ""
    return (
        f"{num_hosts} nodes need about {needed} open files here, and this machine allows {limit} (ulimit -Hn): some "
        f"hosts could not connect. Start the head with ulimit -n {max(65536, 2 * needed)} (LimitNOFILE of its service, "
        "or --ulimit nofile of its container), then start the same command again: it resumes"
    )
