"""A limit is warned of, and left before it is passed."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.budget import Spent, judge
from cluster.ledger import Ledger
from elastic.config import BudgetConfig
from elastic.errors import ConfigError


def spent(usd=0.0, rate=0.01, hours=0.0, most=0.0):
    return Spent(usd=usd, usd_per_s=rate, usd_per_s_at_most=most, hours=hours)


def test_without_a_limit_nothing_is_said():
    assert judge(BudgetConfig(), spent(usd=1e9, hours=1e9), leave_s=60) == judge(BudgetConfig(), spent(), leave_s=60)


def test_at_four_fifths_it_warns_and_tells_how_long_the_rest_lasts():
    verdict = judge(BudgetConfig(max_usd=10), spent(usd=8.0), leave_s=60)
    assert "8.0000 of budget.max_usd=10 are spent; 0.06 h are left" in verdict.warning  # 2 USD at 36 an hour
    assert not verdict.leave
    assert not judge(BudgetConfig(max_usd=10), spent(usd=7.9), leave_s=60).warning


def test_it_leaves_while_there_is_just_enough_to_leave():
    """A cent a second, 60 s to leave: at 9.40 of 10 USD."""
    budget = BudgetConfig(max_usd=10)
    assert not judge(budget, spent(usd=9.39), leave_s=60).leave
    leave = judge(budget, spent(usd=9.41), leave_s=60).leave
    assert "budget.max_usd=10 would be passed" in leave
    assert "Raise it, and the same command goes on" in leave


def test_hours_are_a_limit_as_well():
    budget = BudgetConfig(max_hours=2)
    assert not judge(budget, spent(hours=1.5), leave_s=360).warning
    assert "1.70 of budget.max_hours=2 are over" in judge(budget, spent(hours=1.7), leave_s=360).warning
    assert "budget.max_hours=2" in judge(budget, spent(hours=1.95), leave_s=360).leave


@given(
    limit=st.floats(0.01, 1000),
    most=st.floats(0.001, 1),
    shares=st.lists(st.floats(0, 1), min_size=1, max_size=200),
    leave_s=st.floats(2, 100),
)
def test_however_nodes_come_and_go_the_limit_is_not_passed(limit, most, shares, leave_s):
    """It looks every second; to leave takes all that it may, less the second that a look can come late."""
    budget, usd = BudgetConfig(max_usd=limit), 0.0
    if most * leave_s >= limit:  # it leaves at once
        shares = []
    for share in shares:
        if judge(budget, spent(usd=usd, rate=share * most, most=most), leave_s=leave_s).leave:
            break
        usd += most * share
    assert usd + most * (leave_s - 1) * bool(shares) <= limit * (1 + 1e-9)


def test_the_ledger_knows_what_is_not_written_yet():
    ledger = Ledger()
    ledger.join("a", 0.0, gpus=2, usd_per_gpu_hour=1800.0)  # a dollar a second
    ledger.flush(10.0)
    ledger.join("b", 12.0, gpus=1, usd_per_gpu_hour=3600.0)
    assert ledger.get_usd_per_s() == pytest.approx(2.0)
    assert ledger.estimate_usd(15.0) == pytest.approx(15 + 3)
    ledger.leave("a", 16.0)
    assert ledger.estimate_usd(20.0) == pytest.approx(16 + 8)
    assert ledger.get_usd_per_s() == pytest.approx(1.0)
    ledger.leave("b", 20.0)
    ledger.flush(20.0)
    assert ledger.totals().usd == pytest.approx(ledger.estimate_usd(20.0))


@pytest.mark.parametrize("values", [{"max_usd": -1.0}, {"warn_at": 0.0}, {"warn_at": 1.5}])
def test_a_budget_that_cannot_be_is_refused(values):
    with pytest.raises(ConfigError, match=r"budget\."):
        BudgetConfig(**values)
