"""What the trainers of an attempt must know of the memory tier: who serves what, and who keeps whose copy."""

from collections.abc import Mapping, Set
from dataclasses import dataclass

from cluster.runtime.coordinator.nodes.node_records import Nodes
from elastic.checkpoint.replicas.placement import plan_peers
from elastic.ports import Address


@dataclass(frozen=True, kw_only=True)
class MemoryTier:
    """The memories of the nodes in one attempt."""

    replica_servers: Mapping[str, Address]
    """Who serves what."""
    peers: Mapping[str, str]
    """Which node gets the copies of which."""

    def get_peer(self, node: str) -> Address | None:
        """Return where the copies of a node's memory go, if anywhere."""
        peer = self.peers.get(node)
        return self.replica_servers[peer] if peer else None


def plan_memory_tier(nodes: Nodes, members: Set[str], *, has_copies: bool) -> MemoryTier:
    """Find it out for an attempt on these member nodes."""
    replica_servers = nodes.get_replica_servers()
    labels = {name: nodes.get(name).labels for name in members & replica_servers.keys()}
    return MemoryTier(replica_servers=replica_servers, peers=plan_peers(labels) if has_copies else {})
