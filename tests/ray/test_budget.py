"""A run that may cost so much and no more: it saves and leaves before that, and goes on when it may cost more."""

import pytest

from cluster.ledger import check_dollars, check_tiling, read_ledger, totals_of
from elastic.records.rundir import read_rows
from tests.ray._runs import Run

CAP_USD = 1.5
"""At 18 USD an hour for each of up to 3 workers (1.5 cents a second in all), a minute and a quarter."""


@pytest.mark.long
def test_a_run_ends_durable_and_resumable_before_its_budget_is_passed(nodes, data, tmp_path):
    money = {"cost.usd_per_gpu_hour": 18.0, "budget.max_usd": CAP_USD, "budget.warn_at": 0.5}
    run = Run(nodes, data, tmp_path, **money, **{"train.steps": 100_000})
    run.start()
    assert run.wait() == 3
    output = run.get_output()
    assert "budget.max_usd=1.5 would be passed" in output
    assert "of budget.max_usd=1.5 are spent" in output  # warned before
    rows = read_ledger(read_rows(run.dir.ledger))
    assert 0.5 * CAP_USD < totals_of(rows).usd <= CAP_USD
    assert check_tiling(rows) == []
    assert check_dollars(rows) == []
    last = list(read_rows(run.dir.metrics))[-1]["step"]
    assert (run.dir.root / "checkpoints" / f"step-{last:08d}" / "COMMITTED").exists()

    run.start(budget__max_usd=2 * CAP_USD, train__steps=last + 5)
    assert run.wait() == 0
