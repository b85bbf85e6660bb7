"""How much of a state is copied within the device before it leaves; the copying itself needs a GPU (`tests/gpu`)."""

from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.staging.device_to_host import has_room_for_two, plan_clones

SIZES = st.lists(st.integers(0, 5000), max_size=20).map(lambda sizes: {f"t{i}": size for i, size in enumerate(sizes)})


@given(SIZES, st.integers(-1000, 60_000))
def test_copies_lie_side_by_side_in_the_room_there_is(sizes, budget_bytes):
    places, num_bytes = plan_clones(sizes, budget_bytes=budget_bytes)
    assert num_bytes <= max(budget_bytes, 0)
    stops = [0]
    for name, place in places.items():
        assert place % 512 == 0
        assert place >= stops[-1]
        stops.append(place + sizes[name])
    assert stops[-1] <= num_bytes


@given(SIZES)
def test_all_of_it_is_copied_where_there_is_room(sizes):
    assert plan_clones(sizes, budget_bytes=512 * 20 + sum(sizes.values()))[0].keys() == sizes.keys()


@given(st.integers(1, 10**12), st.integers(0, 10**13))
def test_a_second_copy_leaves_others_as_much_as_it_takes(num_bytes, free_bytes):
    if has_room_for_two(num_bytes, free_bytes=free_bytes):
        assert free_bytes - num_bytes >= num_bytes
    assert has_room_for_two(num_bytes, free_bytes=free_bytes + 2 * num_bytes)
