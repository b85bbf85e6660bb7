from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.replicas.placement import NodeLabels, plan_peers

LABELS = st.builds(NodeLabels, zone=st.sampled_from(["", "a", "b", "c"]), capacity=st.sampled_from(["", "spot", "od"]))
FLEETS = st.dictionaries(st.text("abcdef0123456789", min_size=1, max_size=6), LABELS, max_size=12)


@given(FLEETS)
def test_every_node_keeps_one_copy_and_never_its_own(nodes):
    peers = plan_peers(nodes)
    assert set(peers) == (set(nodes) if len(nodes) > 1 else set())
    assert sorted(peers.values()) == sorted(peers)
    assert all(node != peer for node, peer in peers.items())


@given(FLEETS)
def test_no_copy_stays_in_its_zone_if_that_can_be_avoided(nodes):
    largest = max(Counter(labels.zone for labels in nodes.values()).values(), default=0)
    shared = sum(nodes[node].zone == nodes[peer].zone for node, peer in plan_peers(nodes).items())
    # nodes beyond the half that the others can pair with must stay among themselves
    assert shared == (0 if len(nodes) < 2 else max(0, 2 * largest - len(nodes)))


def test_within_a_zone_the_other_kind_of_capacity_is_preferred():
    nodes = {name: NodeLabels(zone="a", capacity=kind) for name, kind in (("1", "spot"), ("2", "spot"), ("3", "od"))}
    peers = plan_peers({**nodes, "4": NodeLabels(zone="a", capacity="od")})
    assert all((node in "12") != (peer in "12") for node, peer in peers.items())


@given(FLEETS)
def test_the_plan_depends_on_nothing_but_the_nodes(nodes):
    assert plan_peers(nodes) == plan_peers(dict(reversed(nodes.items())))
