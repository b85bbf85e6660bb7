"""How much the ranks of a world say: one row per step, whatever their number, and signs of life."""

import socket

import pytest

from cluster.runtime.messages import FROM_TRAINER, Phases, Progressed, Stepped, StepTimes
from cluster.runtime.trainers.link_observer import LinkObserver
from elastic.ports import Progress
from elastic.transport import Link, Peer

STEPS = range(1, 41)
STEP_S = 0.25
ROW = {"step": 1, "loss": 2.0}


def train(rank, local_rank):
    """Train 10 s at 4 steps/s; return what the host hears."""
    ours, theirs = socket.socketpair()
    link = Link(Peer(theirs, None), FROM_TRAINER, sends="waiting")
    heard = Link(Peer(ours, None), FROM_TRAINER, sends="at once")
    now_s = [100.0]
    observer = LinkObserver(link, rank=rank, local_rank=local_rank, on_restored=lambda: None, now_s=lambda: now_s[0])
    for step in STEPS:
        now_s[0] += STEP_S
        observer.phase("train", now_s[0] - STEP_S, now_s[0])
        observer.stepped(Progress(step=step, tokens=step), ROW)
    observer.phase("save", now_s[0], now_s[0] + 1)
    observer.flush()
    link.close()
    messages = []
    while (new := heard.receive(1)) is not None:
        messages += new
    heard.close()
    return messages


def test_rank_0_sends_the_row_of_each_step():
    messages = train(rank=0, local_rank=0)
    assert [message.progress.step for message in messages if isinstance(message, Stepped)] == list(STEPS)
    assert not [message for message in messages if isinstance(message, Progressed)]


@pytest.mark.parametrize(("rank", "local_rank"), [(1, 1), (8, 0), (9, 1)])
def test_no_other_rank_sends_a_row_or_says_more_than_about_one_thing_a_second(rank, local_rank):
    messages = train(rank, local_rank)
    assert not [message for message in messages if isinstance(message, Stepped)]
    told = [message for message in messages if isinstance(message, Progressed)]
    assert 10 <= len(told) <= 12
    assert told[0].step == 1, "the first step is told at once"
    assert (told[-1].step, told[-1].num_steps) == (40, 40)


def test_the_first_rank_of_a_node_tells_the_times_of_every_step_and_the_others_of_none():
    first = train(rank=8, local_rank=0)
    times = [each for message in first if isinstance(message, Progressed) for each in message.times]
    assert [each.step for each in times] == list(STEPS)
    assert times[3] == StepTimes(step=4, phases=(("train", 100.75, 101.0),))
    assert [message.phases for message in first if isinstance(message, Phases)] == [(("save", 110.0, 111.0),)]
    for message in train(rank=9, local_rank=1):
        assert isinstance(message, Progressed)
        assert message.times == ()
