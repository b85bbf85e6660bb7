"""A real SIGTERM to rank 0 or to another rank, with time for a step and a save, for a save, or for neither."""

import os
import signal
import statistics
import time
from dataclasses import replace

import pytest

from elastic.__main__ import SignalNotices
from elastic.checkpoint.format.manifest import list_committed
from elastic.ports import Finished, Interrupted, Progress
from elastic.storage import open_storage
from tests.distributed._loops import SEQ_LEN, Watcher, make_config, train_rank, write_data
from tests.distributed._ranks import run_ranks

STEPS, TERM_AFTER, EVERY_STEPS = 5, 3, 2
SCENARIOS = {
    # grace in usual steps, save_margin: a save takes less than a thousand steps, and a millionth of it no time
    "finish_and_save": (2000.0, 2.0),
    "save_now": (0.5, 1e-6),
    "leave_now": (1e-6, 2.0),
}
CASES = [("finish_and_save", 0), ("finish_and_save", 2), ("save_now", 2), ("leave_now", 0)]
"""And the rank that is told: who it is makes no difference once all have agreed, however they leave."""
MICROBATCHES = 12


def slow_config(folder, run, **fault):
    """Steps of many microbatches, so that half of one is much longer than what happens between two steps."""
    config = make_config(folder, run, steps=STEPS, every_steps=EVERY_STEPS, **fault)
    return replace(config, train=replace(config.train, global_batch=3 * MICROBATCHES, micro_batch=1))


def _hand_over(folder, rank, port, *, victim, outcome, attempt):
    """Train to a step, terminate one rank as its machine would, and train on; return what both attempts tell."""
    grace_steps, margin = SCENARIOS[outcome]
    config = slow_config(folder, f"{outcome}-{victim}", save_margin=margin)
    notices, told_s = SignalNotices(), []

    def terminate(rows):
        if rank == victim and rows[-1]["step"] == TERM_AFTER:
            notices.grace_s = grace_steps * statistics.median(row["step_s"] for row in rows)
            told_s.append(time.monotonic())
            os.kill(os.getpid(), signal.SIGTERM)

    place = {"world_size": 3, "watcher": Watcher(terminate), "notices": notices}
    first = train_rank(config, rank, port, **place, attempt=attempt)
    left_s = time.monotonic() - told_s[0] if told_s else None
    committed = [
        0,
        *(checkpoint.step for checkpoint in list_committed(open_storage(folder / "runs" / config.run))),
    ]
    second = train_rank(config, rank, port, world_size=3, attempt=attempt + 1)
    return first, left_s, committed, second


def _all_handovers(rank, port, folder):
    results = {"unbroken": train_rank(slow_config(folder, "unbroken"), rank, port, world_size=3, attempt=1)}
    for index, (outcome, victim) in enumerate(CASES):
        results[victim, outcome] = _hand_over(
            folder, rank, port, victim=victim, outcome=outcome, attempt=2 * (index + 1)
        )
    return results


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    folder = tmp_path_factory.mktemp("handover")
    write_data(folder)
    return run_ranks(_all_handovers, 3, folder)


@pytest.mark.parametrize(("outcome", "victim"), CASES)
def test_all_ranks_leave_together_with_what_the_time_allows(ranks, victim, outcome):
    last_step, saved_steps, how = {
        "finish_and_save": (TERM_AFTER + 1, {TERM_AFTER + 1}, ""),
        "save_now": (TERM_AFTER, {TERM_AFTER}, ": no time to finish a step"),
        "leave_now": (TERM_AFTER, {0, EVERY_STEPS}, ": no time to save"),  # the save in flight may be given up
    }[outcome]
    for rank, results in enumerate(ranks):
        (end, _), left_s, committed, _ = results[victim, outcome]
        if left_s is not None:
            print(f"{outcome}: rank {rank} left {left_s:.2f} s after its SIGTERM")
        assert end == Interrupted(
            progress=Progress(step=last_step, tokens=last_step * 3 * MICROBATCHES * SEQ_LEN),
            reason=("SIGTERM" if rank == victim else "a peer leaves") + how,
        )
        assert committed[-1] in saved_steps


@pytest.mark.parametrize(("outcome", "victim"), CASES)
def test_the_next_attempt_goes_on_exactly_where_this_one_was_saved(ranks, victim, outcome):
    (_, before), _, committed, (end, after) = ranks[0][victim, outcome]
    assert isinstance(end, Finished)
    assert after[0]["step"] == committed[-1] + 1
    expected = {row["step"]: (row["loss"], row["grad_norm"]) for row in ranks[0]["unbroken"][1]}
    assert {row["step"]: (row["loss"], row["grad_norm"]) for row in [*before, *after]} == expected
