"""The books alone, without a cluster."""

import pytest

from cluster.controller import Policy, State
from cluster.runtime.adapter import WorkerNode
from cluster.runtime.books import open_books
from cluster.types import Slot
from elastic.config import RunConfig
from elastic.rundir import read_rows


@pytest.mark.parametrize("stage", ["clearing", "waiting", "forming"])
def test_a_lost_node_is_idle_though_it_is_a_member_of_the_world_that_ends(tmp_path, stage):
    books = open_books(str(tmp_path), RunConfig())
    nodes = {name: WorkerNode(id=name, num_workers=1, offer="") for name in ("lost", "survivor")}
    books.follow_nodes(nodes, 0.0)
    policy = Policy(world_sizes=(1, 2), max_failures_without_progress=3)
    members = (Slot("lost", "cpu0"), Slot("survivor", "cpu0"))
    state = State(policy=policy, members=members, claims=dict.fromkeys(members, 1), stage="running")
    books.staged(state, 1.0)

    books.host_gone("lost", 2.0)
    del state.claims[members[0]]
    state.stage = stage
    books.staged(state, 2.0)
    books.close(3.0)

    states = {row["node"]: row["state"] for row in read_rows(books.run_dir.ledger)}
    assert states["lost"] == "idle"
    assert states["survivor"] != "idle"
