"""The controller against a cluster with a delay: any sequence of losses, notices, joins and late words ends well.

Every message takes its time, in order per node as over TCP, so that events are old when they arrive. Trainers do what
real ones do: they wait for their world, step together, save, park together, and fall when a peer is gone.
"""

from collections import deque
from dataclasses import dataclass, field, replace
from functools import cache

from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.chaos.verdict import count_samples
from cluster.controller import Policy, State, decide, get_usable
from cluster.types import (
    AttemptEnded,
    AttemptStarted,
    Claimed,
    Done,
    Draining,
    Expired,
    GenerationTaken,
    GiveUp,
    Go,
    HostGone,
    Join,
    Kill,
    Leave,
    LeaveOut,
    Park,
    Slot,
    Stalled,
    Stepped,
    Stop,
    TakeBack,
    TakeGeneration,
    Tick,
    TrainerDying,
    TrainerEnded,
    TrainerReady,
    Undrained,
    Unkillable,
)
from elastic.data.order import rank_slice, sample_ids
from elastic.ports import Progress
from elastic.records.attempts import final_rows

MAX_STEPS = 40
SAVE_EVERY = 7
BATCH, NUM_SAMPLES = 6, 100


@dataclass
class Trainer:
    attempt: int
    stage: str = "waiting"
    """waiting (for its world), training, parking or frozen"""
    is_stuck: bool = False
    """Its process is in state D: no signal ends it."""


@dataclass
class SlowCluster:
    """Nodes with hosts and trainers, the messages under way, and the truth about what was trained."""

    state: State
    now_s: float = 0.0
    under_way: dict[str, deque] = field(default_factory=dict)
    """Events that a node has sent and nobody has heard yet."""
    trainers: dict[Slot, Trainer] = field(default_factory=dict)
    worlds: dict[int, tuple[Slot, ...]] = field(default_factory=dict)
    """Members of each attempt that was told to go."""
    nodes: set[str] = field(default_factory=set)
    num_nodes: int = 0
    group: int = 0
    step: int = 0
    """Of the current world."""
    saved: int = 0
    rows: list[dict[str, int]] = field(default_factory=list)
    """`step` and `attempt` of each step, as they were trained: `metrics.jsonl`."""
    consumed: dict[int, list[dict]] = field(default_factory=dict)
    """By attempt, the samples that its ranks consumed: its `samples-*.jsonl`."""
    started: list[AttemptStarted] = field(default_factory=list)
    ended: list[AttemptEnded] = field(default_factory=list)
    left_out: set[Slot] = field(default_factory=set)
    given_up: list[str] = field(default_factory=list)
    done: Done | None = None

    # ---- the controller's side

    def tell(self, event):
        if isinstance(event, HostGone):
            self.left_out = {slot for slot in self.left_out if slot.node != event.node}
        if isinstance(event, Expired):
            self.left_out.discard(event.slot)
        actions = decide(self.state, event, now_s=self.now_s)
        assert not (self.done and actions), "it acts after its end"
        for action in actions:
            self.obey(action)
        self.check()

    def obey(self, action):  # noqa: PLR0912 (a case per action)
        match action:
            case TakeGeneration(attempt=attempt):
                assert len(self.started) == len(self.ended)
                assert attempt == len(self.started) + 1
                self.send("storage", GenerationTaken(attempt=attempt))
            case AttemptStarted():
                assert len(self.started) == len(self.ended), "two worlds at once"
                assert len(action.members) in self.state.policy.world_sizes
                assert len(set(action.members)) == len(action.members)
                assert all(slot in self.state.claims for slot in action.members)
                assert not {slot.node for slot in action.members} & set(self.state.draining), "a node that will leave"
                self.started.append(action)
                self.step = self.saved
            case AttemptEnded():
                assert action.attempt == self.started[-1].attempt
                assert len(self.ended) == len(self.started) - 1, "each attempt ends once"
                left = {slot for slot, trainer in self.trainers.items() if trainer.attempt <= action.attempt}
                assert left <= self.left_out, "a trainer outlives its attempt"
                self.ended.append(action)
            case Done():
                assert len(self.started) == len(self.ended)
                self.done = action
            case Join(slot=slot, attempt=attempt):
                if slot.node in self.nodes:
                    assert slot not in self.trainers, "two trainers in one slot"
                    self.trainers[slot] = Trainer(attempt)
                    self.send(slot.node, TrainerReady(slot=slot, attempt=attempt, store_host="h", store_port=1))
            case LeaveOut(slot=slot):
                assert slot not in self.left_out
                self.left_out.add(slot)
            case TakeBack(slot=slot):
                self.left_out.remove(slot)
            case GiveUp(node=node):
                assert not any(slot.node == node for slot in self.state.alive), "a node that trains is given up"
                self.given_up.append(node)
            case Go(slot=slot, attempt=attempt):
                if slot in self.trainers:
                    self.trainers[slot].stage = "training"
                    self.worlds[attempt] = self.started[-1].members
            case Park(slot=slot):
                if self.hears(slot):
                    self.trainers[slot].stage = "parking"
            case Leave(slot=slot):
                if self.hears(slot):
                    self.end(slot, "lost")
            case Kill(slot=slot, attempt=attempt):
                assert attempt == self.started[-1].attempt
                if slot in self.trainers and not self.trainers[slot].is_stuck:
                    self.end(slot, "killed")

    def hears(self, slot):
        trainer = self.trainers.get(slot)
        return trainer is not None and trainer.stage != "frozen" and not trainer.is_stuck

    def check(self):
        state = self.state
        if state.stage in ("forming", "running", "parking"):
            assert state.alive, "a world of nobody"
        assert get_usable(state) == get_usable(replace(state, usable=None)), "it goes by what was so before"
        assert state.newest == {slot for slot, group in state.claims.items() if group == state.group}
        assert not self.left_out & state.alive, "a slot whose process does not end is in a world"
        if state.stage in ("waiting", "done"):
            assert not state.alive
            assert len(self.started) == len(self.ended)

    # ---- the cluster's side

    def send(self, node, event):
        self.under_way.setdefault(node, deque()).append(event)

    def deliver(self, node):
        if self.under_way.get(node):
            self.tell(self.under_way[node].popleft())

    def deliver_all(self):
        while nodes := [node for node, events in self.under_way.items() if events]:
            self.deliver(nodes[0])

    def end(self, slot, kind):
        if slot in self.trainers:
            trainer = self.trainers.pop(slot)
            if kind == "crashed" and trainer.attempt % 2:  # its host has seen it dying first
                self.send(slot.node, TrainerDying(slot=slot, attempt=trainer.attempt))
            self.send(slot.node, TrainerEnded(slot=slot, attempt=trainer.attempt, outcome=kind, reason=kind))

    def join(self):
        self.num_nodes += 1
        node = f"n{self.num_nodes:03d}"
        self.nodes.add(node)
        self.regroup()

    def regroup(self):
        """Ray Train starts its agents anew on all nodes that live."""
        self.group += 1
        for node in sorted(self.nodes):
            self.send(node, Claimed(slot=Slot(node, "cpu0"), group=self.group, group_size=len(self.nodes)))

    def lose(self, node):
        self.nodes.discard(node)
        for slot in [slot for slot in self.trainers if slot.node == node]:
            del self.trainers[slot]
        self.send(node, HostGone(node=node, reason="gone"))

    def expire(self, node):
        """The agents of a node are gone for good; its host ends."""
        slot = Slot(node, "cpu0")
        self.send(node, Expired(slot=slot))
        self.end(slot, "killed")
        self.lose(node)

    def let_go(self, slot):
        """The kernel lets go of a process that was killed meanwhile."""
        if slot in self.trainers and self.trainers[slot].is_stuck:
            self.end(slot, "killed")

    def train(self, num_steps):
        """Let the world do what it does meanwhile; the members that live, if one has ended, see that."""
        if not self.started or len(self.ended) == len(self.started):
            return
        attempt, members = self.started[-1].attempt, self.started[-1].members
        mine = {slot: trainer for slot, trainer in self.trainers.items() if trainer.attempt == attempt}
        if attempt not in self.worlds:
            return
        if set(mine) != set(members):
            for slot, trainer in mine.items():
                if trainer.stage not in ("waiting", "frozen") and not trainer.is_stuck:
                    self.end(slot, "lost")
                    return
        if any(trainer.stage in ("waiting", "frozen") or trainer.is_stuck for trainer in mine.values()):
            self.complain_of_frozen()
            return
        for _ in range(num_steps):
            if self.step < MAX_STEPS:  # else it has come back after its last step and has nothing left to do
                self.step += 1
                self.consume(attempt, len(members))
                event = Stepped(attempt=attempt, progress=Progress(step=self.step, tokens=self.step))
                self.send(members[0].node, event)
            is_last, parks = self.step == MAX_STEPS, all(trainer.stage == "parking" for trainer in mine.values())
            if self.step % SAVE_EVERY == 0 or parks or is_last:
                self.saved = self.step
            if parks or is_last:
                for slot in members:
                    self.end(slot, "finished" if is_last else "interrupted")
                return

    def consume(self, attempt, world_size):
        """Each rank reads its share of the step's samples; then rank 0 writes the row."""
        for rank in range(world_size):
            row = {"step": self.step, "ids": get_share(self.step, rank, world_size)}
            self.consumed.setdefault(attempt, []).append(row)
        self.rows.append({"step": self.step, "attempt": attempt})

    def complain(self, slot, where):
        attempt = self.trainers[slot].attempt
        self.send(slot.node, Stalled(slot=slot, attempt=attempt, step=self.step, where=where))

    def complain_of_frozen(self):
        for slot, trainer in self.trainers.items():
            if trainer.stage == "frozen" or trainer.is_stuck:
                self.complain(slot, "silent")

    def settle(self):
        """Let everything arrive and enough time pass."""
        for _ in range(200):
            self.deliver_all()
            if self.done:
                return
            self.train(1)
            self.now_s += 5
            self.tell(Tick())


SIZES = st.sampled_from([(1, 2, 3, 4), (2, 3), (2, 4), (1,), (3,)])
EVENTS = st.lists(
    st.tuples(
        st.sampled_from(
            ["deliver"] * 8 + ["train"] * 6 + ["tick"] * 3 + ["drain", "join"]
            + ["lose", "crash", "drain", "move", "undrain", "join", "regroup", "expire", "late", "hang"]
            + ["freeze", "complain", "stick", "stick", "say_stuck", "let_go"]
        ),
        st.integers(0, 5),
        st.sampled_from([0.0, 0.1, 0.5, 2.0, 15.0, 70.0]),
    ),
    max_size=120,
)  # fmt: skip


def play(sizes, events) -> SlowCluster:  # noqa: PLR0912, PLR0915 (a case per event)
    policy = Policy(world_sizes=sizes, max_failures_without_progress=10_000)
    cluster = SlowCluster(State(policy=policy))
    for _ in range(3):
        cluster.join()
    if len(events) % 2:  # half of the runs begin with a world at work: few sequences come as far by themselves
        cluster.deliver_all()
    for kind, number, seconds in events:
        cluster.now_s += seconds
        nodes = sorted(cluster.nodes | {node for node, left in cluster.under_way.items() if left})
        node = nodes[number % len(nodes)] if nodes else ""
        living = node if node in cluster.nodes else ""
        match kind:
            case "deliver":
                cluster.deliver(node)
            case "train":
                cluster.train(number)
            case "tick":
                cluster.tell(Tick())
            case "join" if len(cluster.nodes) < 6:
                cluster.join()
            case "regroup":
                cluster.regroup()
            case "lose" if living:
                cluster.lose(node)
            case "crash" if living and cluster.hears(Slot(node, "cpu0")):
                cluster.end(Slot(node, "cpu0"), "crashed")
            case "stick" if (slot := Slot(node, "cpu0")) in cluster.trainers:
                cluster.trainers[slot].is_stuck = True
            case "say_stuck" if (slot := Slot(node, "cpu0")) in cluster.trainers:
                if cluster.trainers[slot].is_stuck:
                    attempt = cluster.trainers[slot].attempt
                    cluster.send(node, Unkillable(slot=slot, attempt=attempt, reason="state D"))
            case "let_go":
                cluster.let_go(Slot(node, "cpu0"))
            case "drain" | "move" if living:
                deadline_s = None if number == 5 else cluster.now_s + 15 * number
                cluster.send(node, Draining(node=node, deadline_s=deadline_s, reason="spot"))
            case "undrain":
                cluster.send(node, Undrained(node=node))
            case "expire" if living:
                cluster.expire(node)
            case "freeze" if (slot := Slot(node, "cpu0")) in cluster.trainers:
                if cluster.trainers[slot].stage != "waiting":
                    cluster.trainers[slot].stage = "frozen"
            case "complain" if (slot := Slot(node, "cpu0")) in cluster.trainers:
                cluster.complain(slot, ("in a collective", "loading data")[number % 2])
            case "hang":  # its trainer never says that it is ready
                left = cluster.under_way.get(node, deque())
                cluster.under_way[node] = deque(event for event in left if not isinstance(event, TrainerReady))
            case "late" if cluster.started:
                attempt = max(1, cluster.started[-1].attempt - 1 - number)
                slot = cluster.started[0].members[0]
                cluster.tell(TrainerReady(slot=slot, attempt=attempt - 1, store_host="h", store_port=1))
                cluster.tell(TrainerEnded(slot=slot, attempt=attempt - 1, outcome="finished", reason="late"))
                cluster.tell(Stepped(attempt=attempt - 1, progress=Progress(step=10**6, tokens=1)))
            case _:
                pass
    return cluster


@settings(max_examples=2000, deadline=None)
@given(SIZES, EVENTS)
def test_a_run_ends_finished_with_the_samples_of_an_unbroken_one_whatever_happens_on_the_way(sizes, events):
    cluster = play(sizes, events)
    cluster.deliver_all()
    for node in sorted(cluster.state.draining):
        cluster.tell(Undrained(node=node))
    for slot in list(cluster.trainers):
        cluster.let_go(slot)
    while len(cluster.nodes) < max(sizes):
        cluster.join()
    cluster.regroup()
    cluster.settle()

    assert cluster.done == Done(kind="finished", reason="finished", exit_code=0), "there are nodes, and nobody trains"
    assert [s.attempt for s in cluster.started] == list(range(1, len(cluster.started) + 1))
    assert [e.attempt for e in cluster.ended] == list(range(1, len(cluster.ended) + 1))
    assert_samples_of_an_unbroken_run(cluster)
    for event in (Tick(), Stop(reason="late"), Draining(node="n001", deadline_s=None, reason="late")):
        assert decide(cluster.state, event, now_s=cluster.now_s) == [], "it acts after its end"


@settings(max_examples=500, deadline=None)
@given(SIZES, EVENTS, st.booleans())
def test_no_world_takes_longer_to_end_than_its_limits_whatever_does_not_die(sizes, events, all_stick):
    cluster = play(sizes, events)
    policy = cluster.state.policy
    if all_stick:
        for trainer in cluster.trainers.values():
            trainer.is_stuck = True
    cluster.tell(Stop(reason="keyboard"))
    start_s, limit_s = cluster.now_s, policy.leave_s + policy.kill_s + 1
    clearing_s, clearing = start_s, 0
    while not cluster.done and cluster.now_s < start_s + policy.park_s + limit_s + 1:
        cluster.deliver_all()
        cluster.now_s += 0.5
        cluster.tell(Tick())
        if cluster.state.stage != "clearing" or cluster.state.attempt != clearing:
            clearing_s = cluster.now_s
        clearing = cluster.state.attempt
        assert cluster.now_s <= clearing_s + limit_s, "it waits for a process that does not end"
    assert cluster.done is not None


@cache
def get_share(step, rank=0, world_size=1):
    whole = sample_ids(seed=3, step=step - 1, global_batch=BATCH, num_samples=NUM_SAMPLES)
    return rank_slice(whole, rank=rank, world_size=world_size).tolist()


def assert_samples_of_an_unbroken_run(cluster):
    applied = final_rows(cluster.rows)
    assert [row["step"] for row in applied] == list(range(1, MAX_STEPS + 1)), "a step is missing"
    samples = count_samples(cluster.rows, cluster.consumed, get_share)
    assert (samples.lost, samples.repeated) == (0, 0)
    by_attempt: dict[int, list[int]] = {}
    for row in cluster.rows:
        by_attempt.setdefault(row["attempt"], []).append(row["step"])
    best = 0
    for ended in cluster.ended:
        steps = by_attempt.get(ended.attempt, [])
        if steps:
            assert steps == list(range(steps[0], steps[-1] + 1)), "a world skips a step"
            assert best - SAVE_EVERY < steps[0] <= best + 1, "more is done again than since the last save, or less"
            best = max(best, steps[-1])


@settings(max_examples=200, deadline=None)
@given(SIZES, EVENTS, st.integers(0, 119))
def test_a_run_that_is_stopped_at_any_moment_ends_soon_and_resumable(sizes, events, at):
    cluster = play(sizes, events[:at])
    cluster.tell(Stop(reason="keyboard"))
    for kind, number, seconds in events[at:]:
        cluster.now_s += seconds
        if kind == "deliver" and cluster.under_way:
            cluster.deliver(sorted(cluster.under_way)[number % len(cluster.under_way)])
    num_started = len(cluster.started)
    cluster.settle()
    assert cluster.done is not None
    assert cluster.done.exit_code in (0, 3)  # it may just have finished
    assert len(cluster.started) == num_started, "a world is started though the run shall end"
    assert all(trainer.is_stuck for trainer in cluster.trainers.values())


@settings(max_examples=200, deadline=None)
@given(SIZES, EVENTS, st.integers(2, 5))
def test_a_step_that_always_fails_ends_the_run_after_its_budget(sizes, events, budget):
    cluster = play(sizes, events)
    cluster.state.policy = Policy(world_sizes=sizes, max_failures_without_progress=budget)
    cluster.deliver_all()
    for node in sorted(cluster.state.draining):
        cluster.tell(Undrained(node=node))
    while len(cluster.nodes) < max(sizes):
        cluster.join()
    for slot in list(cluster.trainers):
        cluster.let_go(slot)
    num_failed = 0
    for _ in range(50):
        cluster.deliver_all()
        cluster.now_s += 15
        cluster.tell(Tick())
        cluster.deliver_all()
        if cluster.done:
            break
        if cluster.trainers:
            cluster.end(sorted(cluster.trainers)[num_failed % len(cluster.trainers)], "crashed")
            num_failed += 1
    assert cluster.done is not None
    assert cluster.done.kind in ("failed", "finished")
    if cluster.done.kind == "failed":
        assert cluster.done.exit_code == 1
        assert f"step {cluster.state.failures.best_step + 1} failed" in cluster.done.reason
        # failures before count as well; denying a node gives one more try
        assert num_failed <= budget + 1 + len(cluster.state.failures.denied)
