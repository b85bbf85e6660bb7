"""A run along a fleet in a fake clock: the real controller, and every second in the real ledger."""

from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ledger import check_tiling
from cluster.simulator.engine import simulate
from cluster.simulator.generator import Weather, generate_fleet, parse_weather
from cluster.simulator.outcome import build_savings, compare
from cluster.simulator.plot import draw_page
from cluster.simulator.saving import Rhythm, Saving
from cluster.simulator.setup import Setup
from cluster.traces import Change, Fleet, as_gang, check_fleet, count_fleet, load_fleet
from elastic.errors import DataError

TRACES = sorted((Path(__file__).parents[3] / "shared" / "data" / "spot-traces").glob("*.csv"))
NEEDS_TRACES = pytest.mark.skipif(not TRACES, reason="the recorded fleets are not here")
JIT = Saving(name="jit", kind="jit", save_s=5.0, recovery_s=20.0)


def fleet(*changes, end_s=3600.0):
    return Fleet(
        name="f", end_s=end_s, changes=tuple(Change(time_s=t, added=tuple(a), removed=tuple(r)) for t, a, r in changes)
    )


def setup(saving=JIT, sizes=range(1, 9), **values):
    return Setup(saving=saving, world_sizes=tuple(sizes), **values)


def test_without_losses_all_but_the_start_is_work():
    """4 nodes for an hour; the first step is done after a recovery's 20 s."""
    tally = simulate(fleet((0, "abcd", "")), setup())
    assert tally.useful_node_s == pytest.approx(4 * (3600 - 20))
    assert tally.usd == pytest.approx(4.0)  # a dollar a node-hour
    assert (tally.losses, tally.changes, tally.redone_node_s) == (0, 1, 0)


def test_a_loss_costs_what_its_policy_says():
    """One of 4 goes at 1800 s. jit: the others leave in 0.5 s, save 5 s, recover 20 s, and redo half a step of 60 s."""
    tally = simulate(fleet((0, "abcd", ""), (1800, "", "d")), setup())
    assert tally.useful_node_s == pytest.approx(4 * 1780 - 30 + 3 * (1800 - 25.5))
    assert tally.losses == 1
    assert tally.redone_node_s == pytest.approx(30)


def test_fixed_saves_lose_what_came_after_the_last_one():
    """Saves every 600 s of 30 s: by 1780 s of training two are done, 520 s are lost."""
    saving = Saving(name="f", kind="fixed", save_s=30.0, recovery_s=20.0, interval_s=600.0)
    tally = simulate(fleet((0, "abcd", ""), (1800, "", "d")), setup(saving))
    assert tally.redone_node_s == pytest.approx(4 * (1780 - 2 * 630))


def test_a_copy_that_goes_with_its_owner_sends_the_run_back_to_storage():
    """Neighbours hold each other's copies: a and b together lose 500 s of 4, a and c none but three seconds' worth."""
    saving = Saving(name="m", kind="memory", save_s=0.0, recovery_s=20.0, interval_s=3.0, durable_s=500.0)
    both, apart = (simulate(fleet((0, "abcd", ""), (1800, "", gone)), setup(saving)) for gone in ("ab", "ac"))
    assert both.redone_node_s == pytest.approx(4 * 500)
    assert apart.redone_node_s <= 4 * 3


def test_nodes_that_go_at_once_are_one_loss():
    assert simulate(fleet((0, "abcd", ""), (1800, "", "bcd")), setup()).losses == 1


def test_a_world_grows_once_the_last_change_has_paid_for_itself():
    """Growth waits five outages after a change (`Policy.growth_patience`): both that came until then join together."""
    tally = simulate(fleet((0, "ab", ""), (30, "c", ""), (40, "d", "")), setup())
    assert [size for _, size in tally.sizes] == [2, 4]
    assert tally.sizes[1][0] == pytest.approx(20 + 5 * 25 + 2)  # asked for then, and parked for two seconds


def test_a_notice_leaves_nothing_to_redo():
    plain, told = (
        simulate(fleet((0, "abcd", ""), (1800, "", "d")), setup(notice_s=notice_s)) for notice_s in (0.0, 120.0)
    )
    assert plain.losses == 1
    assert (told.losses, told.redone_node_s) == (0, 0)


def test_a_gang_waits_until_all_are_there():
    tally = simulate(fleet((0, "ab", ""), (600, "c", ""), (1200, "d", "")), setup(sizes=(4,)))
    assert tally.sizes[0] == (1200, 4)
    assert tally.useful_node_s == pytest.approx(4 * (3600 - 1220))


def test_a_run_ends_when_its_work_is_done():
    tally = simulate(fleet((0, "abcd", "")), setup(work_node_s=4000.0))
    assert tally.finished_s == pytest.approx(1020)
    assert tally.usd == pytest.approx(4 * 1020 / 3600)


def test_young_s_interval_follows_the_losses():
    rhythm = Rhythm(saving=Saving(name="y", kind="young", save_s=30.0, recovery_s=180.0))
    before = rhythm.interval_s
    for _ in range(10):
        rhythm.observed(500.0)
        rhythm.lost()
    assert before == pytest.approx((2 * 30 * 3600) ** 0.5, rel=0.1)
    assert rhythm.interval_s == pytest.approx((2 * 30 * (3600 + 5000) / 11) ** 0.5, rel=0.15)


@given(seconds=st.floats(0, 1e5), interval_s=st.floats(1, 1e4), save_s=st.floats(0, 100))
def test_a_stretch_is_work_and_saves_and_nothing_else(seconds, interval_s, save_s):
    saving = Saving(name="f", kind="fixed", save_s=save_s, recovery_s=0.0, interval_s=interval_s)
    stretch = Rhythm(saving=saving).divide(seconds)
    assert stretch.worked_s + stretch.saved_s == pytest.approx(seconds)
    assert 0 <= stretch.kept_s <= stretch.worked_s + 1e-6
    assert stretch.worked_s - stretch.kept_s <= interval_s * (1 + 1e-9)


WEATHERS = st.builds(
    Weather,
    nodes=st.integers(1, 12),
    hours=st.just(24.0),
    mean_up_h=st.floats(0.2, 20),
    mean_down_h=st.floats(0.1, 5),
    batch_share=st.floats(0, 1),
    batch_mean=st.floats(1, 6),
    seed=st.integers(0, 10**6),
)


@settings(deadline=None, max_examples=60)
@given(weather=WEATHERS, saving=st.sampled_from(build_savings(save_s=30.0, recovery_s=180.0)), notice=st.booleans())
def test_every_paid_second_of_every_fleet_is_in_one_state(weather, saving, notice):
    """The ledger tiles; what is useful is no more than what was worked, and that no more than was paid."""
    made = generate_fleet(weather)
    assert check_fleet(made) == []
    tally = simulate(made, setup(saving, sizes=range(1, 13), notice_s=120.0 if notice else 0.0))
    assert check_tiling(tally.rows) == []
    assert tally.paid_node_s == pytest.approx(made.node_hours * 3600, abs=0.01 * len(tally.rows) + 0.01)
    assert tally.usd == pytest.approx(made.node_hours, abs=1e-4 * len(tally.rows) + 1e-4)
    assert 0 <= tally.useful_node_s <= tally.paid_node_s + 1e-6
    # in whole or it was redone: what the ledger calls training is what lasts and what did not
    trained = sum(row.gpu_ms for row in tally.rows if row.state in ("train", "redo")) / 1000
    assert trained >= tally.useful_node_s - 0.01 * len(tally.rows) - 1


def test_a_fleet_by_lot_is_the_same_for_its_seed_and_has_heavy_tails():
    weather = Weather(nodes=40, hours=2000.0, batch_share=0.0, seed=5)
    made = generate_fleet(weather)
    assert made == generate_fleet(weather)
    assert made != generate_fleet(replace(weather, seed=6))
    born, lives = {}, []
    for change in made.changes:
        born |= dict.fromkeys(change.added, change.time_s)
        lives += [change.time_s - born[node] for node in change.removed]
    mean = sum(lives) / len(lives)
    deviation = (sum((life - mean) ** 2 for life in lives) / len(lives)) ** 0.5
    assert mean == pytest.approx(8 * 3600, rel=0.15)
    assert deviation / mean > 1.8  # an exponential one has 1


def test_losses_come_in_batches_if_so_asked():
    alone, together = (
        [len(c.removed) for c in generate_fleet(Weather(nodes=30, batch_share=share, seed=1)).changes if c.removed]
        for share in (0.0, 1.0)
    )
    assert max(alone) == 1
    assert sum(together) / len(together) > 2


@pytest.mark.parametrize("text", ["nodes=many", "hours=-1", "colour=red", "batch_mean=0.5"])
def test_a_fleet_that_cannot_be_is_refused(text):
    with pytest.raises(DataError, match="--generate"):
        parse_weather(text)


def test_a_gang_s_fleet_is_whole_or_nothing():
    levels = [(0.0, 3), (100.0, 5), (200.0, 4), (300.0, 3), (400.0, 4), (500.0, 4)]
    gang = as_gang(count_fleet(levels, name="x"), 4)
    assert check_fleet(gang) == []
    # up at 100; one goes at 200, but four are left: all anew; away from 300 to 400
    assert [(c.time_s, len(c.added), len(c.removed)) for c in gang.changes] == [
        (100.0, 4, 0),
        (200.0, 0, 4),
        (200.0, 4, 0),
        (300.0, 0, 4),
        (400.0, 4, 0),
    ]


def test_the_page_shows_every_policy_and_is_closed():
    made = generate_fleet(Weather(nodes=4, hours=10.0))
    outcomes = compare(made, setup(), build_savings(save_s=1.0, recovery_s=5.0), gang=4)
    page = draw_page([(made, outcomes)])
    assert all(name in page for name in ("fixed-30min", "young", "jit", "solvent", "gang-4"))
    assert page.count("<svg") == page.count("</svg>") == 2


# ---- recorded fleets


@NEEDS_TRACES
@pytest.mark.parametrize("path", TRACES, ids=lambda path: path.stem)
def test_a_recorded_fleet_is_paid_to_the_second(path):
    made = load_fleet(path)
    assert check_fleet(made) == []
    tally = simulate(made, setup(Saving(name="j", kind="jit", save_s=0.5, recovery_s=10.0), sizes=range(1, 65)))
    assert check_tiling(tally.rows) == []
    assert tally.paid_node_s == pytest.approx(made.node_hours * 3600, rel=1e-6)


def play_p3(*, save_s, recovery_s, planned_s=None):
    path = next(path for path in TRACES if "p3_2xlarge" in path.stem)
    savings = build_savings(save_s=save_s, recovery_s=recovery_s)[:3]
    savings = tuple(replace(saving, planned_s=planned_s) for saving in savings)
    outcomes = compare(load_fleet(path), setup(sizes=range(1, 65)), savings, gang=None)
    return [round(100 * outcome.goodput) for outcome in outcomes]


@NEEDS_TRACES
def test_the_p3_fleet_is_used_as_published_figures_say_up_to_what_growth_costs():
    """Others count 13, 56 and 75 % (30 s, 180 s), and 22, 94 and 95 % (0.5 s, 10 s), where only losses cost.

    Where a planned growth costs nothing Young and just-in-time agree within 6 points. Where it costs an outage as well,
    as by default, they have less of it. A fixed interval does better here: a world that grows saves first.
    """
    (fixed, young, jit), (fixed_fast, young_fast, jit_fast) = (
        play_p3(save_s=30, recovery_s=180, planned_s=0.0),
        play_p3(save_s=0.5, recovery_s=10, planned_s=0.0),
    )
    assert (young, jit) == (pytest.approx(56, abs=6), pytest.approx(75, abs=6))
    assert (young_fast, jit_fast) == (pytest.approx(94, abs=3), pytest.approx(95, abs=3))
    assert fixed > 13
    assert fixed_fast > 22
    costly = play_p3(save_s=30, recovery_s=180)
    assert costly[0] < fixed and costly[1] < young and costly[2] < jit
    assert costly == sorted(costly)


@NEEDS_TRACES
def test_an_elastic_run_trains_where_a_gang_of_16_waits():
    ours = build_savings(save_s=30.0, recovery_s=180.0)[-1:]
    for path in (path for path in TRACES if path.stem.endswith(("europewest1c", "uswest1b"))):
        outcomes = {o.policy: o for o in compare(load_fleet(path), setup(sizes=range(4, 17)), ours, gang=16)}
        assert outcomes["solvent"].world_share > outcomes["gang-16"].world_share
        assert outcomes["solvent"].fleet_share > outcomes["gang-16"].fleet_share
