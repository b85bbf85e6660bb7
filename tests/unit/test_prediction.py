"""What a run will come to, told before it begins from what an earlier one has measured."""

import pytest

from cluster.chaos.faults import Fault
from cluster.cli._prediction import measure_boot_s, predict
from cluster.ledger import LedgerRow
from cluster.simulator.measured import Measured, measure
from elastic.config import CheckpointConfig, ClusterConfig, RunConfig
from elastic.errors import DataError
from elastic.records.rundir import format_utc

CONFIG = RunConfig(cluster=ClusterConfig(max_workers=2), checkpoint=CheckpointConfig(every_steps=40))
MEASURED = Measured(
    step_s=0.1,
    rates={2: 2.0, 1: 2.0},  # paced: as fast alone
    loss_s=1.0,
    planned_s=0.5,
    unsaved_s=2.0,
    start_s=10.0,
    linger_s=4.0,
    steady_share=1.0,
    step_share=1.0,
)


def tiles(node, *spans):
    return [
        LedgerRow(node=node, start_ms=round(1e3 * a), end_ms=round(1e3 * b), state=state, gpus=1, usd=0.0)
        for a, b, state in spans
    ]


def metrics(*steps):
    """Rows a second apart."""
    return [
        {"step_s": step_s, "world_size": size, "attempt": 1, "time_utc": format_utc(1000.0 + index)}
        for index, (size, step_s) in enumerate(steps)
    ]


def test_a_run_s_rows_say_what_its_changes_took():
    """Lost at 20 s, found at 24 that b is gone; c is paid from 30, trains from 41; two of three steps lost."""
    ledger = [
        *tiles("a", (0, 5, "start"), (5, 20, "train"), (20, 21, "load"), (21, 22, "redo"), (22, 40.5, "train")),
        *tiles("a", (40.5, 41, "load"), (41, 59, "train"), (59, 60, "data")),
        *tiles("b", (0, 5, "start"), (5, 20, "train"), (20, 24, "idle")),
        *tiles("c", (30, 38, "start"), (38, 40.5, "wait"), (40.5, 41, "load"), (41, 60, "train")),
    ]
    attempts = [
        {"end": "lost"},
        {"end": "interrupted", "outage_s": 1.0, "lost_steps": 3},
        {"end": "interrupted", "outage_s": 0.5, "lost_steps": 0},
    ]
    found = measure(metrics((2, 0.4), (2, 0.4), (1, 0.5)), attempts, ledger)
    assert (found.step_s, found.loss_s, found.planned_s) == (0.4, 1.0, 0.5)
    assert found.rates == {2: 2.0, 1: pytest.approx(1.6)}
    assert found.unsaved_s == pytest.approx(1.2)
    told = [
        row | {"redo_steps_node_lost": steps} for row, steps in zip(metrics((2, 0.4), (2, 0.4)), (1, 4), strict=True)
    ]
    assert measure(told, attempts, ledger).unsaved_s == pytest.approx(0.4 * 2.5)  # each row says what a loss would redo
    assert (found.start_s, found.linger_s) == (10.5, 4.0)
    working = 15 + 1 + 18.5 + 18 + 15 + 19
    assert found.step_share == pytest.approx((0.4 + 0.5) / 2)
    assert found.steady_share == pytest.approx(working / (working + 1))


@pytest.mark.parametrize("attempts", [[{"end": "interrupted"}], [{"end": "lost"}, {"end": "running", "outage_s": 1.0}]])
def test_a_run_that_has_not_lost_and_got_a_node_tells_nothing(attempts):
    with pytest.raises(DataError, match="one of each is needed"):
        measure(metrics((1, 0.1)), attempts, tiles("a", (0, 5, "train")))


def test_a_run_without_faults_is_all_progress():
    found = predict(CONFIG, [], num_nodes=2, end_s=100.0, measured=MEASURED, boot_s=0.0)
    assert (found.measured, found.paid, found.losses) == (1.0, 1.0, 0)


def test_a_loss_and_a_new_node_cost_what_they_did_before():
    """One of two goes at 20 s: an outage of 1 s and 2 s again; the new one comes at 42 and joins at 52 for 0.5 s.

    Paid: both for 20 s, one for 80, 4 s after its end, the new one for 58 s. Of that no progress: 3 s of one, 4 s, the
    10 s of the start, 0.5 s of two.
    """
    faults = [Fault(fault="remove", at_s=20.0), Fault(fault="add", at_s=40.0)]
    found = predict(CONFIG, faults, num_nodes=2, end_s=100.0, measured=MEASURED, boot_s=2.0)
    assert found.losses == 1
    assert found.measured == pytest.approx((100 - 3 - 0.5) / 100, abs=1e-3)
    paid = 100 + 20 + 4 + 58
    assert found.paid == pytest.approx((paid - 3 - 4 - 10 - 2 * 0.5) / paid, abs=1e-3)


def test_nodes_are_started_one_after_the_other():
    rows = [
        {"is_add": True, "due_s": 10.0, "elapsed_s": 12.0},
        {"is_add": True, "due_s": None, "elapsed_s": 50.0},
        {"is_add": False, "due_s": 20.0, "elapsed_s": 20.1},
        {"is_add": True, "due_s": 30.0, "elapsed_s": 34.0},
    ]
    assert measure_boot_s(rows) == 3.0
    assert measure_boot_s([]) == 0.0
