"""A ballot as numbers: what comes out of the least of all ranks' numbers is what all of them have agreed on."""

from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.consensus import Ballot, Job, TierBallot, pack, unpack

JOBS = st.builds(Job, is_over=st.booleans(), is_done=st.booleans())
STEPS = st.integers(1, 10**9)
BALLOTS = st.builds(
    Ballot,
    memory_save=JOBS,
    storage_save=JOBS,
    is_written=st.booleans(),
    has_left_device=st.booleans(),
    tiers=st.builds(TierBallot, copy=JOBS, disk_write=JOBS, is_disk_write_due=st.booleans()),
    memory_every_steps=STEPS,
    storage_every_steps=STEPS,
)


def agree(*ballots):
    return unpack([min(values) for values in zip(*map(pack, ballots), strict=True)])


@given(BALLOTS)
def test_one_rank_alone_decides(ballot):
    assert agree(ballot) == ballot


@given(BALLOTS)
def test_a_rank_that_has_nothing_to_do_holds_up_nobody(ballot):
    idle = Ballot(tiers=TierBallot(is_disk_write_due=True))
    assert agree(ballot, idle) == ballot


@given(BALLOTS, BALLOTS)
def test_a_yes_needs_all_ranks_and_the_longest_interval_counts(one, other):
    both = agree(one, other)
    assert both.memory_save.is_over == (one.memory_save.is_over and other.memory_save.is_over)
    assert both.storage_save.is_done == (one.storage_save.is_done and other.storage_save.is_done)
    assert both.is_written == (one.is_written and other.is_written)
    assert both.tiers.copy.is_done == (one.tiers.copy.is_done and other.tiers.copy.is_done)
    assert both.tiers.disk_write.is_over == (one.tiers.disk_write.is_over and other.tiers.disk_write.is_over)
    assert both.memory_every_steps == max(one.memory_every_steps, other.memory_every_steps)
    assert both.storage_every_steps == max(one.storage_every_steps, other.storage_every_steps)
