"""How long a phase may take, and what a stack says about who waits for whom."""

import math
import traceback
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.consensus import Ballot, Votes, pack
from elastic.config import FaultConfig
from elastic.ports import Phase
from elastic.training.timeline import OpenPhase, Timeline
from elastic.training.watchdog import get_limit_s, locate

FAULT = FaultConfig(hang_factor=5.0, hang_step_s=10.0, hang_first_step_s=900.0, hang_data_s=30.0)
PHASES: tuple[Phase, ...] = ("load", "data", "train", "eval", "save")
MINE = [("/x/elastic/training/loop.py", "run_loop"), ("/x/elastic/training/run.py", "train")]


def limit_s(phase, usual_s, fault=FAULT):
    return get_limit_s(OpenPhase(number=1, phase=phase, usual_s=usual_s), fault)


def test_a_step_is_hung_after_its_floor_or_a_few_usual_times_the_longer():
    assert limit_s("train", 0.1) == 10.0
    assert limit_s("train", 4.0) == 20.0


def test_the_first_step_may_compile():
    assert limit_s("train", None) == 900.0


@given(st.sampled_from(PHASES), st.none() | st.floats(min_value=0, max_value=1e4))
def test_no_phase_is_called_hung_within_its_usual_time(phase, usual_s):
    assert limit_s(phase, usual_s) > (usual_s or 0.0)


@pytest.mark.parametrize("phase", PHASES)
def test_factor_0_calls_nothing_hung(phase):
    assert limit_s(phase, 1.0, replace(FAULT, hang_factor=0.0)) == math.inf


@pytest.mark.parametrize(
    ("inner", "phase", "where"),
    [
        (("/v/torch/distributed/distributed_c10d.py", "all_reduce"), "train", "in a collective"),
        (("/v/torch/distributed/fsdp/_fully_shard/_fsdp_collectives.py", "foreach_reduce"), "train", "in a collective"),
        (("/v/torch/distributed/distributed_c10d.py", "broadcast_object_list"), "load", "in a collective"),
        (("/v/torch/autograd/graph.py", "_engine_run_backward"), "train", "waiting"),
        (("/v/torch/cuda/streams.py", "synchronize"), "train", "waiting"),
        (("/x/elastic/training/step.py", "train_step"), "train", "waiting"),
        (("/x/elastic/checkpoint/consensus.py", "_wait"), "data", "waiting"),
        (("/x/elastic/nn/layers.py", "forward"), "train", "computing"),
        (("/v/threading.py", "wait"), "data", "loading data"),
        (("/v/threading.py", "wait"), "save", "saving"),
        (("/x/elastic/records/rundir.py", "append_row"), "data", "writing its rows"),
    ],
)
def test_the_innermost_frame_tells_what_is_waited_for(inner, phase, where):
    assert locate([inner, *MINE], phase) == where


class Phases:
    """An observer of nothing but phases."""

    def __init__(self):
        self.seen = []

    def phase(self, phase, start_s, end_s):
        self.seen.append((phase, start_s, end_s))


def test_phases_follow_each_other_without_a_gap_and_their_usual_time_is_a_median():
    observer = Phases()
    timeline = Timeline(observer, phase="load", start_s=0.0)
    for phase in ("data", "train", "data", "train"):
        timeline.begin(phase)
    assert [phase for phase, *_ in observer.seen] == ["load", "data", "train", "data"]
    for (_, _, end_s), (_, start_s, _) in zip(observer.seen, observer.seen[1:], strict=False):
        assert start_s == end_s
    assert timeline.open.number == 4
    assert timeline.open.usual_s == pytest.approx(observer.seen[2][2] - observer.seen[2][1])
    assert timeline.get_usual_s("save") is None


def test_the_wait_for_the_votes_of_other_ranks_is_where_the_stack_says():
    """Red when the call moves to another file: the innermost frame of ours is the one that calls torch."""
    stacks = []

    class Work:
        def wait(self):  # torch's own has no frame
            stacks.append([(frame.filename, frame.name) for frame in reversed(traceback.extract_stack()[:-1])])

    votes = object.__new__(Votes)
    votes._open = torch.tensor(pack(Ballot()), dtype=torch.float64), Work()
    votes.count()
    assert locate(stacks[0], "data") == "waiting"
