"""A step whose collectives were aborted is void: never applied, never reported."""

from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from elastic.breaker import Breaker, Presence
from elastic.training.step import build_trainable, eval_loss, train_step
from elastic.world import World, close_world
from tests.distributed._aborts import break_at_each_collective
from tests.distributed._ranks import run_ranks
from tests.distributed._tiny import CONFIG, global_batch, rank_microbatches


def _with_silent_collectives(rank: int, port: int, strategy: str):
    """A world of four whose collectives end without an error and leave a rank with what it brought.

    So NCCL's do after an abort; torch's fake group does it on any machine.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=4)
    device = torch.device("cpu")
    place = {"rank": 0, "local_rank": 0, "local_world_size": 2, "attempt": 1, "node": ""}
    world = World(**place, world_size=4, device=device, presence=Presence(device))
    trainable = build_trainable(replace(CONFIG, strategy=strategy), world)
    before = {name: param.detach().clone() for name, param in trainable.model.named_parameters()}
    pairs = rank_microbatches(global_batch(0, samples=16), world)
    with pytest.raises(dist.DistError) as in_step:
        train_step(trainable, pairs, lr=1.0, max_grad_norm=1.0, world=world)
    with pytest.raises(dist.DistError) as in_evaluation:
        eval_loss(trainable, pairs, world)
    told = [str(in_step.value), str(in_evaluation.value)]
    after = dict(trainable.model.named_parameters())
    is_unchanged = all(torch.equal(_local(before[name]), _local(after[name])) for name in before)
    moments = [value for state in trainable.optimizer.state.values() for value in state.values()]
    has_moments = any(_local(moment).abs().sum() > 0 for moment in moments)
    del trainable
    close_world(world)
    return told, is_unchanged, has_moments


def _local(tensor):
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor


@pytest.mark.parametrize("strategy", ["fsdp2", "hsdp", "ddp"])
def test_a_step_whose_collectives_return_what_a_rank_has_by_itself_is_neither_applied_nor_reported(strategy):
    ((told, is_unchanged, has_moments),) = run_ranks(_with_silent_collectives, 1, strategy)
    words = "a collective of the world was aborted: not all of its 4 ranks took part"
    assert told == [words, words]
    assert is_unchanged
    assert not has_moments


@pytest.mark.parametrize(
    ("strategy", "num_ranks"),
    [("ddp", 2), ("hsdp", 4), pytest.param("fsdp2", 2, marks=pytest.mark.long)],  # hsdp has all collectives of fsdp2
)
def test_a_world_that_is_left_amid_any_collective_of_a_step_leaves_the_whole_step_or_nothing(strategy, num_ranks):
    of_ranks = run_ranks(break_at_each_collective, num_ranks, strategy, num_ranks, "cpu")
    assert all(outcome in ("void", "done") for found in of_ranks for outcome in found), of_ranks
    assert set(of_ranks[0]) == {"void"}  # who leaves before the last collective never makes the update
    assert len(of_ranks[0]) >= 3


def test_a_rank_that_gave_up_adds_nothing_and_believes_nothing():
    breaker = Breaker()
    presence, peer = breaker.arm(torch.device("cpu")), Presence(torch.device("cpu"))
    presence.check((presence.read() + peer.read()).item(), world_size=2)
    breaker.break_world()
    with pytest.raises(dist.DistError, match="not all of its 2 ranks took part"):
        peer.check((presence.read() + peer.read()).item(), world_size=2)
    with pytest.raises(dist.DistError, match="this rank gave it up"):
        presence.check(4.0, world_size=2)


@given(
    world_size=st.integers(2, 5000),
    turn=st.integers(2, 10**9),
    data=st.data(),
)
def test_what_ranks_have_sent_in_earlier_turns_never_makes_a_whole_sum(world_size, turn, data):
    """NCCL leaves such numbers in its buffers, and an aborted collective adds them up."""
    ages = data.draw(st.lists(st.integers(0, turn), min_size=1, max_size=world_size - 1))
    presence = Presence(torch.device("cpu"))
    presence._turn = turn - 1
    own = presence.read().item()
    total = own * (world_size - len(ages)) + sum(turn - age for age in ages)
    if any(ages):
        with pytest.raises(dist.DistError):
            presence.check(total, world_size=world_size)
    else:
        presence.check(total, world_size=world_size)
