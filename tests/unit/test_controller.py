"""The controller case by case, against a cluster that obeys at once (`test_controller_sequences` has a slow one)."""

from dataclasses import dataclass, field

import pytest

from cluster import controller
from cluster.controller import Policy, State
from cluster.controller.failures import Failures, read_failures
from cluster.types import (
    AttemptEnded,
    AttemptStarted,
    Claimed,
    Done,
    Draining,
    Expired,
    GenerationTaken,
    Go,
    HostGone,
    Join,
    Kill,
    Leave,
    LeaveOut,
    Park,
    Slot,
    Stepped,
    Stop,
    TakeGeneration,
    Tick,
    TrainerDying,
    TrainerEnded,
    TrainerReady,
    Undrained,
)
from elastic.ports import Progress

A, B, C, D = (Slot(node, "cpu0") for node in "abcd")
GROWTH_S = Policy.growth_patience * Policy.first_outage_s
"""A world grows no sooner after its first step, as long as nothing was measured."""


def decide(state, event, *, now_s):
    """Decide, with a storage that gives out generations at once."""
    actions = controller.decide(state, event, now_s=now_s)
    if actions and isinstance(actions[-1], TakeGeneration):
        actions = actions[:-1] + decide(state, GenerationTaken(attempt=actions[-1].attempt), now_s=now_s)
    return actions


@dataclass
class Cluster:
    """Hosts and trainers that obey the controller at once, and remember what it did."""

    state: State
    now_s: float = 0.0
    log: list = field(default_factory=list)
    trainers: dict = field(default_factory=dict)
    """Slot to (attempt, "ready" | "training")."""
    done: Done | None = None

    def tell(self, event):
        actions = decide(self.state, event, now_s=self.now_s)
        self.log += actions
        for action in actions:
            match action:
                case Join(slot=slot, attempt=attempt):
                    assert slot not in self.trainers, "two trainers in one slot"
                    self.trainers[slot] = attempt
                    self.tell(TrainerReady(slot=slot, attempt=attempt, store_host="h", store_port=1))
                case Leave(slot=slot):
                    self.end(slot, "lost")
                case Kill(slot=slot, attempt=attempt):
                    self.end(slot, "killed")
                case Park(slot=slot, attempt=attempt):
                    self.end(slot, "interrupted")
                case Done():
                    self.done = action
                case _:
                    pass
        return actions

    def end(self, slot, kind, reason="told"):
        attempt = self.trainers.pop(slot, None)
        if attempt is not None:
            self.tell(TrainerEnded(slot=slot, attempt=attempt, outcome=kind, reason=reason))

    def lose_node(self, node):
        for slot in [s for s in self.trainers if s.node == node]:
            del self.trainers[slot]
        self.tell(HostGone(node=node, reason="gone"))

    def wait(self, seconds):
        self.now_s += seconds
        return self.tell(Tick())

    def step(self, step):
        self.tell(Stepped(attempt=self.state.attempt, progress=Progress(step=step, tokens=step)))

    def of(self, kind):
        return [action for action in self.log if isinstance(action, kind)]

    @property
    def worlds(self):
        return [action.members for action in self.of(AttemptStarted)]


def make(*slots, group=1, sizes=tuple(range(1, 9)), max_failures=3, notice_window_s=0.0, **state):
    policy = Policy(
        world_sizes=sizes,
        max_failures_without_progress=max_failures,
        notice_window_s=notice_window_s,
        max_node_failures=3,
    )
    cluster = Cluster(State(policy=policy, **state))
    for slot in slots:
        cluster.tell(Claimed(slot=slot, group=group, group_size=len(slots)))
    return cluster


def test_world_starts_once_every_agent_of_the_group_has_claimed():
    cluster = make()
    cluster.tell(Claimed(slot=A, group=1, group_size=2))
    assert cluster.worlds == []
    cluster.tell(Claimed(slot=B, group=1, group_size=2))
    assert cluster.worlds == [(A, B)]
    assert [(go.slot, go.rank, go.world_size) for go in cluster.of(Go)] == [(A, 0, 2), (B, 1, 2)]


def test_world_starts_without_an_agent_that_does_not_come():
    cluster = make()
    cluster.tell(Claimed(slot=A, group=1, group_size=2))
    cluster.now_s = cluster.state.policy.gather_s
    cluster.tell(Tick())
    assert cluster.worlds == [(A,)]


def test_ranks_of_one_node_are_neighbours_and_know_their_local_rank():
    cluster = make(Slot("a", "gpu1"), Slot("b", "gpu0"), Slot("a", "gpu0"))
    assert [(go.slot.node, go.rank, go.local_rank, go.local_world_size) for go in cluster.of(Go)] == [
        ("a", 0, 0, 2),
        ("a", 1, 1, 2),
        ("b", 2, 0, 1),
    ]


def test_lost_node_shrinks_the_world_at_once_without_waiting_for_ray():
    cluster = make(A, B, C)
    cluster.lose_node("b")
    assert cluster.worlds == [(A, B, C), (A, C)]
    assert [(e.kind, e.change, e.cause) for e in cluster.of(AttemptEnded)] == [("lost", "node_lost", "b")]


def test_killed_trainer_is_replaced_in_a_world_of_the_same_size():
    cluster = make(A, B, C)
    cluster.end(B, "crashed", "signal 9")
    assert cluster.worlds == [(A, B, C), (A, B, C)]
    assert [(e.change, e.reason) for e in cluster.of(AttemptEnded)] == [("trainer_lost", "signal 9")]


def test_the_trainer_that_crashed_is_blamed_although_a_peer_reports_first():
    cluster = make(A, B)
    attempt = cluster.state.attempt
    policy = cluster.state.policy
    state = State(policy=policy)
    for slot in (A, B):
        decide(state, Claimed(slot=slot, group=1, group_size=2), now_s=0)
    for slot in (A, B):
        decide(state, TrainerReady(slot=slot, attempt=attempt, store_host="h", store_port=1), now_s=0)
    decide(state, TrainerEnded(slot=A, attempt=attempt, outcome="lost", reason="connection closed by peer"), now_s=1)
    actions = decide(state, TrainerEnded(slot=B, attempt=attempt, outcome="crashed", reason="signal 9"), now_s=1)
    (ended,) = [a for a in actions if isinstance(a, AttemptEnded)]
    assert (ended.reason, ended.cause) == ("signal 9", "b")


def test_the_others_leave_while_a_trainer_dies_and_the_next_world_waits_for_its_end():
    cluster = make(A, B)
    (attempt,) = set(cluster.trainers.values())
    actions = decide(cluster.state, TrainerDying(slot=B, attempt=attempt), now_s=1.0)
    assert [(type(each), each.slot) for each in actions] == [(Leave, A), (Leave, B)]
    assert not decide(cluster.state, TrainerDying(slot=B, attempt=attempt), now_s=1.1)
    decide(cluster.state, TrainerEnded(slot=A, attempt=attempt, outcome="lost", reason="asked to"), now_s=1.2)
    assert cluster.state.stage == "clearing"
    ended = TrainerEnded(slot=B, attempt=attempt, outcome="crashed", reason="signal 9")
    actions = decide(cluster.state, ended, now_s=2.0)
    (left,) = [each for each in actions if isinstance(each, AttemptEnded)]
    assert (left.change, left.reason, left.cause, left.noticed_s) == ("trainer_lost", "signal 9", "b", 1.0)


def test_a_trainer_that_dies_after_its_world_or_beside_its_end_changes_nothing():
    cluster = make(A, B)
    assert not decide(cluster.state, TrainerDying(slot=B, attempt=0), now_s=1.0)
    assert not decide(cluster.state, TrainerDying(slot=C, attempt=cluster.state.attempt), now_s=1.0)


def test_notice_parks_all_trainers_and_the_next_world_is_without_the_node():
    cluster = make(A, B, C)
    cluster.tell(Draining(node="a", deadline_s=15.0, reason="spot"))
    assert [(p.slot, p.deadline_s) for p in cluster.of(Park)] == [(A, 15.0), (B, 15.0), (C, 15.0)]
    assert [p.leaves for p in cluster.of(Park)] == [True, False, False]
    assert cluster.worlds == [(A, B, C), (B, C)]
    assert [(e.kind, e.change, e.cause) for e in cluster.of(AttemptEnded)] == [("interrupted", "node_drained", "a")]
    cluster.lose_node("a")
    assert len(cluster.worlds) == 2, "a node that has left the world can go without anybody noticing"


def test_new_node_joins_when_ray_has_formed_a_larger_group():
    cluster = make(A, B)
    cluster.step(1)
    cluster.wait(GROWTH_S)
    cluster.tell(Claimed(slot=A, group=2, group_size=3))
    cluster.tell(Claimed(slot=C, group=2, group_size=3))
    assert cluster.worlds == [(A, B)], "one agent of the new group is still to come"
    cluster.tell(Claimed(slot=B, group=2, group_size=3))
    assert cluster.worlds == [(A, B), (A, B, C)]
    assert not any(park.leaves for park in cluster.of(Park))
    assert [(e.change, e.cause) for e in cluster.of(AttemptEnded)] == [("node_added", "c")]


def test_agents_that_come_back_change_nothing():
    cluster = make(A, B)
    for slot in (A, B):
        cluster.tell(Claimed(slot=slot, group=2, group_size=2))
    assert cluster.worlds == [(A, B)]


def test_world_keeps_its_members_when_there_are_more_slots_than_it_may_use():
    cluster = make(B, C, sizes=(1, 2))
    cluster.tell(Claimed(slot=A, group=2, group_size=3))
    for slot in (B, C):
        cluster.tell(Claimed(slot=slot, group=2, group_size=3))
    cluster.end(C, "crashed")
    assert cluster.worlds == [(B, C), (B, C)]


def test_too_few_workers_wait():
    cluster = make(A, B, sizes=(2, 3))
    cluster.lose_node("b")
    assert cluster.state.stage == "waiting"
    cluster.tell(Claimed(slot=C, group=2, group_size=2))
    assert cluster.worlds == [(A, B), (A, C)]


def test_crash_loop_ends_the_run_with_its_reason():
    cluster = make(A, max_failures=3)
    for _ in range(3):
        cluster.end(A, "crashed", "segmentation fault")
    assert cluster.done is not None
    assert (cluster.done.kind, cluster.done.exit_code) == ("failed", 1)
    assert "segmentation fault" in cluster.done.reason


def test_crashes_with_progress_in_between_go_on_for_ever():
    cluster = make(A, max_failures=2)
    for step in range(1, 8):
        cluster.step(step)
        cluster.end(A, "crashed")
    assert cluster.done is None
    assert len(cluster.worlds) == 8


def test_lost_nodes_are_no_crash_loop():
    cluster = make(A, B, C, max_failures=2)
    for _ in range(5):
        cluster.lose_node("c")
        cluster.tell(Claimed(slot=C, group=cluster.state.group + 1, group_size=1))
    assert cluster.done is None


def test_wrong_input_ends_the_run_with_its_exit_code():
    cluster = make(A, B)
    slot_attempt = cluster.trainers.pop(A)
    cluster.tell(TrainerEnded(slot=A, attempt=slot_attempt, outcome="failed", reason="no such file", exit_code=2))
    assert cluster.done == Done(kind="failed", reason="no such file", exit_code=2)
    assert not cluster.trainers


def test_slot_without_an_agent_leaves_the_world():
    cluster = make(A, B)
    cluster.tell(Expired(slot=B))
    assert cluster.worlds == [(A, B), (A,)]


def test_trainer_that_was_killed_without_our_asking_takes_the_world_down_with_it():
    """Its peers would wait for it in a collective."""
    cluster = make(A, B)
    cluster.end(B, "killed")
    assert cluster.worlds == [(A, B), (A, B)]


def test_finished_run_is_done_when_its_last_trainer_has_ended():
    cluster = make(A, B)
    cluster.end(A, "finished")
    assert cluster.done is None
    cluster.end(B, "finished")
    assert cluster.done is not None
    assert cluster.done.kind == "finished"


def test_node_that_goes_after_the_run_has_finished_does_not_undo_it():
    cluster = make(A, B)
    cluster.end(A, "finished")
    cluster.lose_node("b")
    assert cluster.done is not None
    assert cluster.done.kind == "finished"


def test_stop_saves_and_ends_resumable():
    cluster = make(A, B)
    cluster.tell(Stop(reason="keyboard"))
    assert len(cluster.of(Park)) == 2
    assert cluster.done == Done(kind="interrupted", reason="keyboard", exit_code=3)


def test_world_that_does_not_park_before_the_deadline_is_killed():
    state = make(A, B).state
    decide(state, Draining(node="a", deadline_s=15.0, reason="spot"), now_s=0)
    assert state.stage == "parking"
    assert [type(a) for a in decide(state, Tick(), now_s=15.1)] == [Kill, Kill]


def test_word_of_an_older_attempt_is_not_heard():
    cluster = make(A)
    cluster.end(A, "crashed")
    state_before = repr(cluster.state)
    cluster.tell(TrainerEnded(slot=A, attempt=1, outcome="finished", reason="late"))
    cluster.tell(Stepped(attempt=1, progress=Progress(step=99, tokens=1)))
    assert repr(cluster.state) == state_before


# ---- notices


def drain(cluster, *nodes, notice_s=60.0):
    for node in nodes:
        deadline_s = None if notice_s is None else cluster.now_s + notice_s
        cluster.tell(Draining(node=node, deadline_s=deadline_s, reason="spot"))


def test_notices_that_come_within_a_window_are_one_change():
    cluster = make(A, B, C, notice_window_s=1.0)
    drain(cluster, "a")
    cluster.wait(0.9)
    drain(cluster, "b")
    assert cluster.of(Park) == []
    cluster.wait(0.1)
    assert cluster.worlds == [(A, B, C), (C,)]
    (ended,) = cluster.of(AttemptEnded)
    assert (ended.change, ended.cause, ended.noticed_s) == ("node_drained", "a", 0.0)


@pytest.mark.parametrize(("notice_s", "waits"), [(5.0, False), (10.5, False), (11.5, True), (None, True)])
def test_a_notice_waits_for_others_only_if_its_deadline_allows_it(notice_s, waits):
    cluster = make(A, B, C, notice_window_s=1.0)
    drain(cluster, "a", notice_s=notice_s)
    cluster.wait(0.6)
    assert (cluster.of(Park) == []) is waits


def test_a_notice_that_comes_while_the_world_parks_joins_it_and_its_nearer_deadline_is_told():
    state = make(A, B, C).state
    decide(state, Draining(node="a", deadline_s=60.0, reason="spot"), now_s=0)
    assert state.stage == "parking"
    actions = decide(state, Draining(node="b", deadline_s=20.0, reason="spot"), now_s=1)
    assert [(type(a), a.deadline_s) for a in actions] == [(Park, 20.0)] * 3
    for slot in (A, B, C):
        actions = decide(state, TrainerEnded(slot=slot, attempt=1, outcome="interrupted", reason="spot"), now_s=2)
    assert [a.members for a in actions if isinstance(a, AttemptStarted)] == [(C,)]


def test_a_deadline_that_moves_nearer_is_told_to_those_who_park_and_one_that_moves_away_gives_them_time():
    state = make(A, B).state
    for deadline_s, told in [(60.0, [60.0] * 2), (60.0, []), (30.0, [30.0] * 2), (90.0, [90.0] * 2)]:
        actions = decide(state, Draining(node="a", deadline_s=deadline_s, reason="spot"), now_s=0)
        assert [a.deadline_s for a in actions] == told
    assert decide(state, Tick(), now_s=80.0) == []
    assert [type(a) for a in decide(state, Tick(), now_s=91.0)] == [Kill, Kill]


def test_a_notice_that_is_withdrawn_in_time_changes_nothing():
    cluster = make(A, B, notice_window_s=1.0)
    drain(cluster, "a")
    cluster.tell(Undrained(node="a"))
    cluster.wait(100)
    assert cluster.worlds == [(A, B)]


def test_a_node_whose_notice_is_withdrawn_later_comes_back():
    cluster = make(A, B)
    drain(cluster, "a")
    cluster.step(1)
    cluster.tell(Undrained(node="a"))
    cluster.wait(GROWTH_S)
    assert cluster.worlds == [(A, B), (B,), (A, B)]


def test_a_world_that_nobody_could_follow_trains_on_until_shortly_before_the_deadline():
    cluster = make(A, B, C, sizes=(2, 3))
    drain(cluster, "c")  # now it is known how long a park takes
    drain(cluster, "a", notice_s=60.0)
    cluster.wait(49)
    assert len(cluster.of(Park)) == 3
    cluster.wait(1)
    assert len(cluster.of(Park)) == 5
    assert cluster.state.stage == "waiting"


def test_a_world_that_still_forms_is_formed_anew_without_a_node_that_will_leave():
    state = State(policy=Policy(world_sizes=(1, 2), max_failures_without_progress=3))
    for slot in (A, B):
        decide(state, Claimed(slot=slot, group=1, group_size=2), now_s=0)
    actions = decide(state, Draining(node="a", deadline_s=60.0, reason="spot"), now_s=0)
    assert [type(a) for a in actions] == [Leave, Leave]
    for slot in (A, B):
        actions = decide(state, TrainerEnded(slot=slot, attempt=1, outcome="killed", reason=""), now_s=0)
    assert [a.members for a in actions if isinstance(a, AttemptStarted)] == [(B,)]


def test_a_node_that_drains_stays_out_when_its_host_comes_back():
    cluster = make(A, B)
    drain(cluster, "a")
    cluster.lose_node("a")
    cluster.tell(Claimed(slot=A, group=2, group_size=2))
    cluster.step(1)
    cluster.wait(1000)
    assert cluster.worlds == [(A, B), (B,)]


# ---- growth


def test_a_world_grows_once_for_all_nodes_that_came_since_its_last_change():
    cluster = make(A)
    cluster.step(1)
    cluster.wait(0.4 * GROWTH_S)
    cluster.tell(Claimed(slot=B, group=2, group_size=2))
    cluster.wait(0.4 * GROWTH_S)
    cluster.tell(Claimed(slot=A, group=3, group_size=3))
    cluster.tell(Claimed(slot=B, group=3, group_size=3))
    cluster.tell(Claimed(slot=C, group=3, group_size=3))
    cluster.wait(0.1 * GROWTH_S)
    assert cluster.worlds == [(A,)]
    cluster.wait(0.1 * GROWTH_S)
    assert cluster.worlds == [(A,), (A, B, C)]


@pytest.mark.parametrize("outage_s", [1.0, 30.0])
def test_the_wait_before_growing_follows_the_measured_outage(outage_s):
    cluster = make(A, B)
    cluster.step(1)
    cluster.lose_node("b")
    cluster.now_s += outage_s
    cluster.step(2)
    cluster.tell(Claimed(slot=A, group=2, group_size=2))
    cluster.tell(Claimed(slot=B, group=2, group_size=2))
    cluster.wait(4.9 * outage_s)
    assert len(cluster.worlds) == 2
    cluster.wait(0.2 * outage_s)
    assert cluster.worlds == [(A, B), (A,), (A, B)]


def test_time_without_enough_nodes_is_no_outage():
    cluster = make(A, B, sizes=(2,))
    cluster.step(1)
    cluster.lose_node("b")
    cluster.wait(1000)
    cluster.tell(Claimed(slot=B, group=2, group_size=1))
    cluster.now_s += 3
    cluster.step(2)
    assert cluster.state.outages_s == (3.0,)


# ---- sizes


def test_worlds_have_only_sizes_that_the_strategy_can_use():
    cluster = make(A, B, C, sizes=(2, 4))
    assert cluster.worlds == [(A, B)]
    cluster.step(1)
    cluster.tell(Claimed(slot=D, group=1, group_size=3))
    cluster.wait(GROWTH_S)
    assert cluster.worlds == [(A, B), (A, B, C, D)]
    cluster.lose_node("a")
    assert cluster.worlds[-1] == (B, C)
    cluster.lose_node("b")
    assert cluster.worlds[-1] == (C, D)
    cluster.lose_node("c")
    assert cluster.state.stage == "waiting"


# ---- failures in a row


def test_a_node_whose_trainers_fail_again_and_again_is_left_out():
    cluster = make(A, B, C)
    for step in range(1, 4):
        cluster.step(step)
        cluster.end(B, "crashed", "signal 11")
    assert cluster.worlds == [(A, B, C)] * 3 + [(A, C)]
    assert [e.denied for e in cluster.of(AttemptEnded)] == [None, None, "b"]
    cluster.step(9)
    cluster.wait(1000)
    assert len(cluster.worlds) == 4


def test_failures_that_strike_here_and_there_deny_nobody():
    cluster = make(A, B, C)
    for step, slot in enumerate([A, B, B, A, C, C, A, B], start=1):
        cluster.step(step)
        cluster.end(slot, "crashed")
    assert cluster.worlds == [(A, B, C)] * 9


def test_a_node_without_which_there_is_no_world_is_never_left_out():
    cluster = make(A, B, sizes=(2,), max_failures=9)
    for step in range(1, 8):
        cluster.step(step)
        cluster.end(B, "crashed")
    assert cluster.worlds == [(A, B)] * 8


def test_a_denied_node_is_used_again_when_no_other_is_left():
    cluster = make(A, B)
    for step in range(1, 4):
        cluster.step(step)
        cluster.end(B, "crashed")
    assert cluster.worlds[-1] == (A,)
    cluster.lose_node("a")
    cluster.wait(cluster.state.policy.gather_s)  # another node might come
    assert cluster.worlds[-1] == (B,)


def test_a_node_that_fails_the_same_step_is_left_out_and_the_others_have_one_more_try():
    cluster = make(A, B, failures=Failures(best_step=7))
    for _ in range(3):
        cluster.end(B, "crashed")
    assert (cluster.worlds[-1], cluster.done) == ((A,), None)
    cluster.end(A, "crashed", "segmentation fault")
    assert cluster.done is not None
    assert "step 8 failed 4 times in a row" in cluster.done.reason
    assert "segmentation fault" in cluster.done.reason


def test_a_world_that_does_not_form_for_want_of_one_trainer_counts_against_its_node():
    state = make(A, B).state
    for _ in range(3):
        for slot in (A, B):
            decide(state, TrainerEnded(slot=slot, attempt=state.attempt, outcome="crashed", reason=""), now_s=0)
    state = State(policy=state.policy)
    for slot in (A, B):
        decide(state, Claimed(slot=slot, group=1, group_size=2), now_s=0)
    decide(state, TrainerReady(slot=A, attempt=1, store_host="h", store_port=1), now_s=0)
    assert [type(a) for a in decide(state, Tick(), now_s=61)] == [Kill, Kill]
    for slot in (A, B):
        actions = decide(state, TrainerEnded(slot=slot, attempt=1, outcome="killed", reason=""), now_s=61)
    assert (actions[0].change, actions[0].cause) == ("trainer_lost", "b")


def test_notices_between_failures_do_not_hide_a_crash_loop():
    cluster = make(A, B, max_failures=3)
    cluster.end(A, "crashed")
    drain(cluster, "b")
    cluster.tell(Undrained(node="b"))
    cluster.end(A, "crashed")
    cluster.end(B, "crashed")
    assert cluster.done is not None


def test_who_does_not_leave_is_killed_and_what_kills_did_not_reach_is_killed_again():
    state = make(A, B).state
    assert decide(state, HostGone(node="a", reason="gone"), now_s=0) == [Leave(slot=B, attempt=1)]
    assert decide(state, Tick(), now_s=state.policy.leave_s) == []
    for now_s in (3, 6, 9):
        assert decide(state, Tick(), now_s=now_s) == [Kill(slot=B, attempt=1)]
    last = decide(state, Tick(), now_s=3.1 + state.policy.kill_s)
    assert [type(action) for action in last] == [LeaveOut, AttemptEnded]


# ---- what a run that is submitted again knows


def row(last_step, *, change, cause=None, denied=None):
    return {"last_step": last_step, "change": change, "cause": cause, "denied": denied}


def test_rows_of_earlier_submissions_tell_what_is_left_of_the_budgets():
    rows = [
        row(5, change="trainer_lost", cause="a"),
        row(None, change="trainer_lost", cause="b"),
        {"last_step": None},  # of a writer that was killed, or of `python -m elastic`
        row(None, change="node_lost", cause="a"),
        row(4, change="trainer_lost", cause="b"),
        row(None, change="trainer_lost", cause="c", denied="c"),
        row(None, change="trainer_lost", cause="b"),
    ]
    failures = read_failures(rows)
    assert failures == Failures(best_step=5, without_progress=4, suspect="b", strikes=1, denied=frozenset({"c"}))


def test_a_crash_loop_goes_on_counting_after_a_submission():
    cluster = make(A, failures=Failures(best_step=7, without_progress=3))
    assert cluster.state.stage == "running", "whoever submits again may have found the cause: one try is free"
    cluster.end(A, "crashed")
    assert cluster.done is not None
    assert "step 8 failed 4 times" in cluster.done.reason


# ---- the generation of an attempt


def test_no_world_begins_before_the_storage_has_given_us_its_epoch():
    state = State(policy=Policy(world_sizes=(1, 2, 3), max_failures_without_progress=3))
    controller.decide(state, Claimed(slot=A, group=1, group_size=2), now_s=0)
    claimed = controller.decide(state, Claimed(slot=B, group=1, group_size=2), now_s=0)
    assert claimed == [TakeGeneration(attempt=1)]
    assert controller.decide(state, Tick(), now_s=90) == [], "it asks twice, or counts the storage's time as its own"
    assert state.stage == "waiting"
    started, *_ = controller.decide(state, GenerationTaken(attempt=1), now_s=91)
    assert started == AttemptStarted(attempt=1, members=(A, B))


def test_who_goes_while_the_epoch_is_taken_is_in_no_world():
    state = State(policy=Policy(world_sizes=(1, 2, 3), max_failures_without_progress=3))
    for slot in (A, B):
        controller.decide(state, Claimed(slot=slot, group=1, group_size=2), now_s=0)
    assert controller.decide(state, HostGone(node="b", reason="gone"), now_s=1) == []
    started, *_ = controller.decide(state, GenerationTaken(attempt=1), now_s=20)
    assert started == AttemptStarted(attempt=1, members=(A,))


def test_an_epoch_that_comes_when_nobody_is_left_is_that_of_the_next_world():
    state = State(policy=Policy(world_sizes=(1, 2, 3), max_failures_without_progress=3))
    controller.decide(state, Claimed(slot=A, group=1, group_size=1), now_s=0)
    controller.decide(state, HostGone(node="a", reason="gone"), now_s=1)
    assert controller.decide(state, GenerationTaken(attempt=1), now_s=2) == []
    started, *_ = controller.decide(state, Claimed(slot=B, group=2, group_size=1), now_s=3)
    assert started == AttemptStarted(attempt=1, members=(B,))
