"""A step whose NCCL collectives were aborted is void: NCCL itself ends them without an error."""

import pytest
import torch

from elastic.breaker import Presence
from tests.distributed._aborts import break_at_each_collective
from tests.distributed._ranks import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"),
    pytest.mark.filterwarnings("ignore"),
]


def test_a_rank_that_gave_up_is_not_counted_although_it_was_asked_before():
    """The number is read when the stream gets there: what an abort has spoiled lies before it."""
    device = torch.device("cuda", 0)
    presence = Presence(device)
    assert presence.read().item() == 1.0
    torch.cuda._sleep(2_000_000_000)  # about a second of cycles
    read = presence.read()
    presence.revoke()
    assert read.item() == 0.0


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL wants a GPU for each rank, and there is one")
@pytest.mark.parametrize("strategy", ["fsdp2", "ddp"])
def test_a_world_that_is_left_amid_any_nccl_collective_of_a_step_leaves_the_whole_step_or_nothing(strategy):
    of_ranks = run_ranks(break_at_each_collective, 2, strategy, 2, "cuda")
    print(strategy, of_ranks)
    assert all(outcome in ("void", "done") for found in of_ranks for outcome in found), of_ranks
    assert set(of_ranks[0]) == {"void"}
    assert len(of_ranks[0]) >= 3
