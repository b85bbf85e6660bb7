"""Blocking work beside a thread that must answer: its order, its end, and its failures."""

import threading

from cluster.runtime.coordinator.background import Background


def test_jobs_are_done_in_order_and_the_end_of_all_can_be_waited_for():
    done: list[int] = []
    work = Background("test", on_failure=lambda error: None)
    for number in range(3):
        work.submit(lambda number=number: done.append(number))
    assert work.wait(5)
    assert done == [0, 1, 2]


def test_a_job_that_takes_its_time_keeps_nobody_but_those_behind_it():
    go = threading.Event()
    work = Background("test", on_failure=lambda error: None)
    work.submit(go.wait)
    assert not work.wait(0.01)
    go.set()
    assert work.wait(5)


def test_what_a_job_raises_reaches_somebody_and_the_next_job_is_done_all_the_same():
    failures: list[BaseException] = []
    done = threading.Event()
    work = Background("test", on_failure=failures.append)
    work.submit(lambda: {}["key"])
    work.submit(done.set)
    assert done.wait(5)
    assert [type(failure) for failure in failures] == [KeyError]
