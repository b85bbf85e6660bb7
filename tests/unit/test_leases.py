"""Whom Ray Train has no use for any more, whatever group it forms and whoever of it is known yet."""

from hypothesis import given
from hypothesis import strategies as st

from cluster.controller import Holder, find_surplus
from cluster.types import Slot

SLOTS = tuple(Slot(node, name) for node in "abcd" for name in ("gpu0", "gpu1"))
A, B, C, D, *_ = SLOTS
HOLDERS = st.none() | st.builds(Holder, group=st.integers(1, 3), group_size=st.integers(1, len(SLOTS)))
ANY = st.dictionaries(st.sampled_from(SLOTS), HOLDERS)


@st.composite
def formed(draw):
    """A newest group of any size, its members, and who holds the other slots: nobody, or agents of older groups."""
    members = draw(st.lists(st.sampled_from(SLOTS), unique=True, min_size=1))
    newest = Holder(group=4, group_size=len(members))
    return frozenset(members), draw(ANY) | dict.fromkeys(members, newest)


@given(ANY)
def test_a_slot_that_is_held_is_never_surplus(holders):
    assert all(holders[slot] is None for slot in find_surplus(holders))


@given(formed())
def test_beside_a_whole_newest_group_every_slot_without_an_agent_is_surplus(group):
    _, holders = group
    assert find_surplus(holders) == {slot for slot, holder in holders.items() if holder is None}


@given(formed(), st.data())
def test_nobody_is_surplus_while_an_agent_of_the_newest_group_is_missing_or_not_known(group, data):
    members, holders = group
    missing = data.draw(st.sets(st.sampled_from(sorted(members)), min_size=1))
    if missing < members:  # else an older group is the newest, and may be whole
        assert not find_surplus(holders | dict.fromkeys(missing))
        assert not find_surplus({slot: holder for slot, holder in holders.items() if slot not in missing})


@given(st.dictionaries(st.sampled_from(SLOTS), st.none()))
def test_nobody_is_surplus_before_any_agent_has_come(holders):
    assert not find_surplus(holders)


@given(formed(), st.data())
def test_less_knowledge_never_makes_a_slot_surplus_that_more_would_not(group, data):
    members, holders = group
    known = data.draw(st.sets(st.sampled_from(sorted(holders))))
    if known & members:  # else an older group is the newest that is known, and may be whole
        assert find_surplus({slot: holders[slot] for slot in known}) <= find_surplus(holders)


def test_survivors_of_a_lost_node_wait_until_the_smaller_group_is_whole_and_a_late_agent_changes_nothing():
    first = dict.fromkeys((A, B, C), Holder(group=1, group_size=3))
    assert not find_surplus({**first, D: None} | dict.fromkeys((A, B, C)))  # all agents ended

    second = Holder(group=2, group_size=2)
    half = {A: second, B: None, C: None}
    assert not find_surplus(half)
    assert not find_surplus({**half, C: first[C]})  # one of the older group comes late
    assert find_surplus({**half, B: second}) == {C}
    assert not find_surplus({**half, B: second, C: first[C]})  # until Ray ends it
