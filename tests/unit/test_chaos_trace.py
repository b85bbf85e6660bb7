"""Recorded fleets as faults for a few nodes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.chaos.trace import plan_trace
from cluster.traces import load_trace
from elastic.errors import DataError


def write(tmp_path, text):
    path = tmp_path / "trace.csv"
    path.write_text(text)
    return path


def test_both_formats_give_the_fleets_size_over_time(tmp_path):
    named = "t_s,event,node\n0,add,a\n0,add,b\n60,remove,a\n60,remove,b\n90,add,c\n"
    assert load_trace(write(tmp_path, named)) == [(0, 2), (60, 0), (90, 1)]
    assert load_trace(write(tmp_path, "t_s,nodes\n0,5\n10,3\n10,4\n")) == [(0, 5), (10, 4)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "begins with ''"),
        ("time,nodes\n0,1\n", "begins with 'time,nodes'"),
        ("t_s,nodes\n", "and rows"),
        ("t_s,nodes\n5,1\n4,1\n", "line 3: '4,1' cannot be read .*goes back"),
        ("t_s,nodes\n5,many\n", "line 2: '5,many'"),
        ("t_s,event,node\n0,steal,a\n", "line 2: '0,steal,a'"),
        ("t_s,event,node\n0,add\n", "line 2: '0,add'"),
    ],
)
def test_what_is_no_trace_is_refused_with_its_line(tmp_path, text, message):
    with pytest.raises(DataError, match=message):
        load_trace(write(tmp_path, text))


def test_a_trace_is_replayed_faster_and_smaller():
    """8 of 8 nodes are 4 of 4; 4 of 8 are 2, so a batch of 4 takes two at once; 1 of 8 stays one."""
    plan = plan_trace([(100, 8), (160, 4), (220, 1), (400, 8)], num_nodes=4, time_scale=60, notice_s=0, seed=3)
    assert (plan.initial_nodes, plan.end_s) == (4, 5)
    told = [(fault.fault, fault.at_s) for fault in plan.faults]
    assert told == [*[("remove", 1)] * 2, ("remove", 2), *[("add", 5)] * 3]


def test_notice_comes_before_the_loss():
    plan = plan_trace([(0, 2), (60, 1), (90, 1)], num_nodes=2, time_scale=6, notice_s=4, seed=0)
    assert [(fault.fault, fault.at_s, fault.notice_s) for fault in plan.faults] == [("drain", 6, 4)]


@given(
    st.lists(st.tuples(st.floats(0, 1e6), st.integers(0, 64)), min_size=1, unique_by=lambda row: row[0]).map(sorted),
    st.integers(1, 8),
    st.floats(0.1, 1000),
)
def test_the_cluster_follows_the_fleet_within_half_a_node(levels, num_nodes, time_scale):
    most = max(count for _, count in levels)
    if not most:
        with pytest.raises(DataError, match="never has a node"):
            plan_trace(levels, num_nodes=num_nodes, time_scale=time_scale, notice_s=0, seed=0)
        return
    plan = plan_trace(levels, num_nodes=num_nodes, time_scale=time_scale, notice_s=0, seed=0)
    changes = [1 if fault.fault == "add" else -1 for fault in plan.faults]
    last = plan.initial_nodes + sum(changes)
    wanted = num_nodes * levels[-1][1] / most
    assert abs(last - wanted) <= 0.5 or (last == 1 and 0 < wanted < 1)
    size = plan.initial_nodes
    for change in changes:
        size += change
        assert 0 <= size <= num_nodes
    times_s = [fault.at_s for fault in plan.faults]
    assert times_s == sorted(times_s)
