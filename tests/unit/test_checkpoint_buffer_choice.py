"""Which buffer a snapshot takes, and what it never takes the place of."""

from hypothesis import assume, given
from hypothesis import strategies as st

from elastic.checkpoint.staging.buffer_choice import Uses, choose_buffer

NONE = Uses(busy=frozenset(), newest=None, safe=None, copying=None, restored=None)
URGENCIES = st.sampled_from(["routine", "leaving"])


@st.composite
def situations(draw):
    """Return the buffers of a rank, what they are needed for, and how many all ranks have."""
    limit = draw(st.integers(1, 4))
    indices = list(range(10, 10 + limit + draw(st.integers(0, 2))))
    one = st.none() | st.sampled_from(indices)
    busy = frozenset(draw(st.sets(st.sampled_from(indices))))
    uses = Uses(busy=busy, newest=draw(one), safe=draw(one), copying=draw(one), restored=draw(one))
    return indices, uses, limit


@given(situations(), URGENCIES)
def test_what_is_being_filled_or_written_is_never_taken(situation, urgency):
    indices, uses, limit = situation
    chosen = choose_buffer(indices, uses, urgency, limit=limit)
    assert chosen is None or chosen in set(indices) - uses.busy


@given(situations(), situations(), URGENCIES, st.randoms(use_true_random=False))
def test_a_snapshot_waits_on_all_ranks_or_on_none_whatever_else_they_have(situation, other, urgency, random):
    """Another rank has the same states in buffers of other numbers, more of them, and its own restored."""
    indices, uses, limit = situation
    others = list(range(100, 100 + len(indices) + random.randint(0, 3)))
    names = dict(zip(indices, random.sample(others, len(indices)), strict=True)) | {None: None}
    theirs = Uses(
        busy=frozenset(names[index] for index in uses.busy),
        newest=names[uses.newest],
        safe=names[uses.safe],
        copying=names[uses.copying],
        restored=random.choice([None, *others]),
    )
    here = choose_buffer(indices, uses, urgency, limit=limit)
    there = choose_buffer(others, theirs, urgency, limit=limit)
    assert (here is None) == (there is None)


@given(situations())
def test_the_last_snapshot_of_a_world_waits_for_nothing_but_what_is_being_filled_or_written(situation):
    indices, uses, limit = situation
    chosen = choose_buffer(indices, uses, "leaving", limit=limit)
    assert (chosen is None) == (len(uses.busy) >= limit)
    if chosen is not None and chosen == uses.safe:
        assert set(indices) - uses.busy == {uses.safe}, "there was no other place"


@given(situations())
def test_a_routine_snapshot_never_costs_the_newest_state_nor_a_safe_one_nor_a_copy_under_way(situation):
    indices, uses, limit = situation
    assume(limit > 1)
    chosen = choose_buffer(indices, uses, "routine", limit=limit)
    assert chosen is None or chosen not in (uses.safe, uses.copying, uses.newest)


def test_with_three_buffers_and_copies_that_never_end_snapshots_are_still_made():
    """The first is copied for ever; of the others the older is filled."""
    newest, chosen = 0, []
    for _ in range(4):
        uses = Uses(busy=frozenset(), newest=newest, safe=None, copying=0, restored=None)
        index = choose_buffer([0, 1, 2], uses, "routine", limit=3)
        chosen.append(index)
        newest = index
    assert chosen == [1, 2, 1, 2]


def test_one_buffer_alone_is_filled_between_its_copies():
    copying = Uses(busy=frozenset(), newest=7, safe=None, copying=7, restored=None)
    copied = Uses(busy=frozenset(), newest=7, safe=7, copying=None, restored=None)
    assert choose_buffer([7], copying, "routine", limit=1) is None
    assert choose_buffer([7], copied, "routine", limit=1) == 7
    assert choose_buffer([7], copying, "leaving", limit=1) == 7


def test_what_was_restored_is_filled_last_until_something_is_safe():
    restored = Uses(busy=frozenset(), newest=None, safe=None, copying=None, restored=0)
    assert choose_buffer([0, 1, 2], restored, "routine", limit=3) == 1
    both = Uses(busy=frozenset(), newest=1, safe=None, copying=2, restored=0)
    assert choose_buffer([0, 1, 2], both, "routine", limit=3) == 0
