"""Which node keeps a second copy of which node's memory. Pure, and without torch.

Spot nodes are lost in batches (on the AWS trace 77 % of the lost nodes went two or more at a time), and a batch is
often one zone or one kind of capacity: a copy is worth most where the original is not.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from operator import eq


@dataclass(frozen=True, kw_only=True, order=True)
class NodeLabels:
    """What a node may share the fate of others by; empty where it is unknown."""

    zone: str = ""
    capacity: str = ""
    """Such as spot or on-demand."""


def plan_peers(nodes: Mapping[str, NodeLabels]) -> dict[str, str]:
    """Return for each node the one that keeps its copy; empty for a single node.

    Each node keeps the copy of exactly one other, so none holds more than its share. Nodes are sorted by labels and
    shifted against themselves. Of all shifts the one is taken with the fewest pairs in one zone, then in one kind of
    capacity, then the smallest. A shift by the size of the largest zone pairs no two nodes of a zone, if that is
    possible at all, so the best shift does not either. Unknown labels count as the same: nothing is known to differ.
    """
    order = sorted(nodes, key=lambda node: (nodes[node], node))
    zones, capacities = [nodes[node].zone for node in order], [nodes[node].capacity for node in order]
    best = min(
        range(1, len(order)),
        key=lambda shift: (_count_shared(zones, shift), _count_shared(capacities, shift)),
        default=0,
    )
    return dict(zip(order, order[best:] + order[:best], strict=True)) if best else {}


def _count_shared(labels: Sequence[object], shift: int) -> int:
    """Return how many of the labels are the same so many places further on; quick, as it is asked for each shift."""
    return sum(map(eq, labels, [*labels[shift:], *labels[:shift]]))
