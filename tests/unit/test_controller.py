"""The controller against a simulated cluster: whatever happens, worlds are formed of living slots and runs end."""

from dataclasses import dataclass, field

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.controller import Policy, State, decide
from cluster.types import (
    AttemptEnded,
    AttemptStarted,
    Claimed,
    Done,
    Draining,
    Expired,
    Fork,
    Go,
    HostGone,
    Kill,
    Park,
    Slot,
    Stepped,
    Stop,
    Tick,
    TrainerEnded,
    TrainerReady,
)
from elastic.ports import Progress

A, B, C = Slot("a", "cpu0"), Slot("b", "cpu0"), Slot("c", "cpu0")


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
                case Fork(slot=slot, attempt=attempt):
                    assert slot not in self.trainers, "two trainers in one slot"
                    self.trainers[slot] = attempt
                    self.tell(TrainerReady(slot=slot, attempt=attempt, store_host="h", store_port=1))
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
            self.tell(TrainerEnded(slot=slot, attempt=attempt, kind=kind, reason=reason))

    def lose_node(self, node):
        for slot in [s for s in self.trainers if s.node == node]:
            del self.trainers[slot]
        self.tell(HostGone(node=node, reason="gone"))

    def step(self, step):
        self.tell(Stepped(attempt=self.state.attempt, progress=Progress(step=step, tokens=step)))

    def of(self, kind):
        return [action for action in self.log if isinstance(action, kind)]

    @property
    def worlds(self):
        return [action.members for action in self.of(AttemptStarted)]


def make(*slots, group=1, min_workers=1, max_workers=8, max_failures=3):
    policy = Policy(min_workers=min_workers, max_workers=max_workers, max_failures_without_progress=max_failures)
    cluster = Cluster(State(policy=policy))
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
    decide(state, TrainerEnded(slot=A, attempt=attempt, kind="lost", reason="connection closed by peer"), now_s=1)
    actions = decide(state, TrainerEnded(slot=B, attempt=attempt, kind="crashed", reason="signal 9"), now_s=1)
    (ended,) = [a for a in actions if isinstance(a, AttemptEnded)]
    assert (ended.reason, ended.cause) == ("signal 9", "b")


def test_notice_parks_all_trainers_and_the_next_world_is_without_the_node():
    cluster = make(A, B, C)
    cluster.tell(Draining(node="a", deadline_s=15.0, reason="spot"))
    assert [(p.slot, p.deadline_s) for p in cluster.of(Park)] == [(A, 15.0), (B, 15.0), (C, 15.0)]
    assert cluster.worlds == [(A, B, C), (B, C)]
    assert [(e.kind, e.change, e.cause) for e in cluster.of(AttemptEnded)] == [("interrupted", "node_drained", "a")]
    cluster.lose_node("a")
    assert len(cluster.worlds) == 2, "a node that has left the world can go without anybody noticing"


def test_new_node_joins_when_ray_has_formed_a_larger_group():
    cluster = make(A, B)
    cluster.tell(Claimed(slot=A, group=2, group_size=3))
    cluster.tell(Claimed(slot=C, group=2, group_size=3))
    assert cluster.worlds == [(A, B)], "one agent of the new group is still to come"
    cluster.tell(Claimed(slot=B, group=2, group_size=3))
    assert cluster.worlds == [(A, B), (A, B, C)]
    assert [(e.change, e.cause) for e in cluster.of(AttemptEnded)] == [("node_added", "c")]


def test_agents_that_come_back_change_nothing():
    cluster = make(A, B)
    for slot in (A, B):
        cluster.tell(Claimed(slot=slot, group=2, group_size=2))
    assert cluster.worlds == [(A, B)]


def test_world_keeps_its_members_when_there_are_more_slots_than_it_may_use():
    cluster = make(B, C, max_workers=2)
    cluster.tell(Claimed(slot=A, group=2, group_size=3))
    for slot in (B, C):
        cluster.tell(Claimed(slot=slot, group=2, group_size=3))
    cluster.end(C, "crashed")
    assert cluster.worlds == [(B, C), (B, C)]


def test_too_few_workers_wait():
    cluster = make(A, B, min_workers=2)
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
    cluster.tell(TrainerEnded(slot=A, attempt=slot_attempt, kind="failed", reason="no such file", exit_code=2))
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
    cluster.tell(TrainerEnded(slot=A, attempt=1, kind="finished", reason="late"))
    cluster.tell(Stepped(attempt=1, progress=Progress(step=99, tokens=1)))
    assert repr(cluster.state) == state_before


NODES = ("a", "b", "c", "d")
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(["lose", "crash", "drain", "claim", "group", "tick", "step", "expire"]),
        st.sampled_from(NODES),
        st.floats(0, 30),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(EVENTS)
def test_any_sequence_of_events_keeps_the_books_straight(events):
    cluster = make(*(Slot(node, "cpu0") for node in NODES))
    claimed, draining, step = set(NODES), set(), 0
    for kind, node, wait_s in events:
        cluster.now_s += wait_s
        slot = Slot(node, "cpu0")
        if cluster.done:
            break
        match kind:
            case "lose":
                claimed.discard(node)
                draining.discard(node)
                cluster.lose_node(node)
            case "crash":
                cluster.end(slot, "crashed")
            case "drain":
                draining.add(node)
                cluster.tell(Draining(node=node, deadline_s=cluster.now_s + 15, reason="spot"))
            case "claim" | "group":
                claimed.add(node)
                group = cluster.state.group + (kind == "group")
                cluster.tell(Claimed(slot=slot, group=group, group_size=1))
            case "step":
                step += 1
                cluster.step(step)
            case "expire":
                claimed.discard(node)
                cluster.trainers.pop(slot, None)
                cluster.tell(Expired(slot=slot))
            case _:
                cluster.tell(Tick())
        alive = {s.node for s in cluster.trainers}
        assert alive <= claimed - draining, "trains where it must not"
        if cluster.state.stage == "running":
            assert {s.node for s in cluster.state.members} == alive, "a world with a hole in it"
    started, ended = cluster.of(AttemptStarted), cluster.of(AttemptEnded)
    assert [s.attempt for s in started] == list(range(1, len(started) + 1))
    assert [e.attempt for e in ended] == list(range(1, len(ended) + 1)), "each attempt ends once, in order"
    usable = claimed - draining
    if not cluster.done and usable:
        cluster.now_s += 1000
        cluster.tell(Tick())
        assert cluster.state.stage == "running", "usable nodes and nobody trains"
