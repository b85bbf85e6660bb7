"""Spot or on-demand: no policy misses a deadline while there is on-demand, and what each of them costs."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.cli import main
from cluster.deadlines.chooser import DEFAULT, choose_policy
from cluster.deadlines.policies import POLICIES, Held, Job, View, must_be_sure
from cluster.deadlines.study import CHOOSER, Terms, study
from cluster.deadlines.windows import cut, play
from cluster.traces import load_trace

TRACES = sorted((Path(__file__).parents[3] / "shared" / "data" / "spot-traces").glob("*.csv"))
HOUR = 3600.0


def job(nodes=4, hours=4.0, slack=1.5, **values):
    defaults = {"spot_usd_per_hour": 1.0, "on_demand_usd_per_hour": 3.0, "restart_s": 60.0, "redo_s": 60.0}
    work = nodes * hours * HOUR
    return Job(nodes=nodes, work_node_s=work, deadline_s=slack * hours * HOUR, **{**defaults, **values})


@st.composite
def jobs(draw):
    made = job(
        nodes=draw(st.integers(1, 16)),
        hours=draw(st.floats(0.5, 10)),
        slack=draw(st.floats(1.01, 4)),
        restart_s=draw(st.floats(0, 600)),
        redo_s=draw(st.floats(0, 600)),
        decide_every_s=draw(st.floats(30, 900)),
    )
    # that anything can be done in time at all: on-demand from the start on
    needed_s = made.work_node_s / made.nodes + made.restart_s
    return Job(**{**made.__dict__, "deadline_s": max(made.deadline_s, needed_s)})


LEVELS = st.lists(st.tuples(st.floats(1, 20_000), st.integers(0, 16)), max_size=40).map(
    lambda steps: [(0.0, 8), *sorted((time_s, n) for time_s, n in steps)]
)


@settings(max_examples=200)
@given(made=jobs(), levels=LEVELS, name=st.sampled_from(sorted(POLICIES)))
def test_no_deadline_is_missed_while_there_is_on_demand(made, levels, name):
    """Whatever spot machines do, at any moment, to any job that on-demand machines alone could do in time."""
    played = play(POLICIES[name], made, levels)
    assert played.keeps(made), (played.done_s, made.deadline_s)


@given(made=jobs(), levels=LEVELS)
def test_on_demand_costs_its_price_and_one_restart(made, levels):
    played = play(POLICIES["on-demand"], made, levels)
    hours = (made.work_node_s / made.nodes + made.restart_s) / HOUR
    assert played.usd == pytest.approx(hours * made.nodes * 3.0)
    assert played.spot_node_s == 0


@pytest.mark.parametrize("name", sorted(set(POLICIES) - {"on-demand"}))
def test_spot_that_stays_is_all_that_is_taken(name):
    made = job()
    played = play(POLICIES[name], made, [(0.0, 4)])
    assert played.usd == pytest.approx((4 + 60 / HOUR) * 4)
    assert played.on_demand_node_s == 0


@pytest.mark.parametrize("name", sorted(POLICIES))
def test_without_any_spot_all_is_done_on_demand_and_in_time(name):
    made = job()
    played = play(POLICIES[name], made, [(0.0, 0)])
    assert played.keeps(made)
    assert played.spot_node_s == 0
    assert played.usd >= 4 * 4 * 3.0 * 0.999


def test_a_part_of_the_machines_is_of_use_to_an_elastic_run_alone():
    """Three of four all the time: greedy and uniform buy the work, elastic has it done for a third of the price."""
    made = job(slack=2.0)
    costs = {name: play(policy, made, [(0.0, 3)]).usd for name, policy in POLICIES.items()}
    assert costs["elastic"] == pytest.approx((4 * 4 / 3 + 60 / HOUR) * 3)
    assert min(costs["greedy"], costs["uniform"]) > 2.5 * costs["elastic"]


def test_a_loss_takes_work_along_and_a_change_takes_time():
    made = job(slack=4.0)
    calm = play(POLICIES["greedy"], made, [(0.0, 4)])
    struck = play(POLICIES["greedy"], made, [(0.0, 4), (HOUR, 0), (2 * HOUR, 4)])
    assert struck.done_s == pytest.approx(calm.done_s + HOUR + 60 + 60)


def test_the_last_moment_to_be_sure_is_the_one_before_it_would_be_too_late():
    made = job(slack=2.0, decide_every_s=300.0)
    last_s = made.deadline_s - (4 * HOUR + 60 + 300 + 60)
    view = View(now_s=last_s, left_node_s=made.work_node_s, spot=4, held=Held(spot=4))
    assert not must_be_sure(made, view)
    assert must_be_sure(made, View(now_s=last_s + 1, left_node_s=made.work_node_s, spot=4, held=Held(spot=4)))


def test_a_window_is_cut_at_its_start_and_its_end():
    assert cut([(0, 1), (10, 2), (20, 3), (30, 4)], 12, 25) == [(0.0, 2), (8, 3)]


def test_the_chooser_takes_what_was_clearly_cheaper_and_else_the_default():
    made = job(slack=2.0)
    assert choose_policy(made, [], past_s=0.0) == DEFAULT
    assert choose_policy(made, [(0.0, 4)], past_s=8 * HOUR) == DEFAULT  # all are alike where spot stays
    cheap = {"dear": POLICIES["on-demand"], DEFAULT: POLICIES["on-demand"], "spot": POLICIES["greedy"]}
    assert choose_policy(made, [(0.0, 4)], past_s=8 * HOUR, policies=cheap) == "spot"


def check_study(windows):
    traces = [load_trace(path) for path in TRACES]
    for slack in (1.1, 1.25, 1.5, 2.0):
        result = study(traces, slack=slack, windows=windows, terms=Terms(), seed=1)
        assert sum(result.missed.values()) == 0
        assert result.chooser_over_best <= 1.02
        assert result.usd_per_node_hour[CHOOSER] < 0.6 * result.usd_per_node_hour["on-demand"]


@pytest.mark.skipif(not TRACES, reason="the recorded fleets are not here")
def test_on_recorded_fleets_none_is_missed_and_the_chooser_is_near_the_best():
    check_study(12)


@pytest.mark.long
@pytest.mark.skipif(not TRACES, reason="the recorded fleets are not here")
def test_over_a_thousand_windows_none_is_missed_and_the_chooser_is_near_the_best():
    check_study(1000)


def test_the_verb_says_what_policies_cost(capsys):
    assert main(["simulate", "--generate", "nodes=4,hours=60", "--slack", "1.5", "--windows", "2"]) == 0
    out = capsys.readouterr().out
    assert "0 missed" in out
    assert "chooser" in out
