"""What all replica servers of a run hold, asked side by side. No torch here."""

import logging
from collections.abc import Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

from elastic.checkpoint.replicas.discovery import assemble
from elastic.checkpoint.replicas.inventory import ReplicaInfo
from elastic.checkpoint.replicas.remote import RemoteReplicaServer
from elastic.ports import Address

logger = logging.getLogger(__name__)

_LIST_SOON_S = 2.0
"""A replica server that does not answer for so long is not waited for any more if there is a whole state without it."""
_LIST_TIMEOUT_S = 10.0
"""Else it is, for so long: what it holds is newer than what is in the storage."""


def fetch_all(replica_servers: Mapping[str, Address], secret: str) -> list[ReplicaInfo]:
    """Return what the replica servers of all nodes hold; one that does not answer, however long it is needed, holds
    nothing."""

    def fetch(node: str) -> list[ReplicaInfo]:
        try:
            server = RemoteReplicaServer(replica_servers[node], secret, timeout_s=_LIST_TIMEOUT_S)
            try:
                return server.fetch_list()
            finally:
                server.close()
        except OSError as error:
            logger.warning("the memory of node %s cannot be asked: %s", node[:8], error)
            return []

    def gather(done: Iterable[Future[list[ReplicaInfo]]]) -> list[ReplicaInfo]:
        return [replica for of_node in done for replica in of_node.result()]

    pool = ThreadPoolExecutor(max(1, len(replica_servers)), "list")
    asked = {pool.submit(fetch, node): node for node in replica_servers}
    pool.shutdown(wait=False)
    done, late = wait(asked, _LIST_SOON_S)
    if late and not any(not snapshot.needs_disks for snapshot in assemble(gather(done))):
        done, late = wait(asked)
    if late:
        names = ", ".join(sorted(asked[one][:8] for one in late))
        logger.warning("the memory of node(s) %s does not answer soon, and is not needed", names)
    return gather(done)
