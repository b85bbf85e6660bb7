"""hsdp fits its groups into any world."""

from hypothesis import given
from hypothesis import strategies as st

from elastic.strategies.hsdp import get_shard_size


@given(st.integers(1, 64), st.integers(1, 512))
def test_groups_tile_the_world_and_are_as_large_as_wished_allows(wanted, world_size):
    size = get_shard_size(wanted, world_size)
    assert world_size % size == 0
    assert size <= wanted
    assert not any(world_size % larger == 0 for larger in range(size + 1, min(wanted, world_size) + 1))
