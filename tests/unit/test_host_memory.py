from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.staging.host_memory import (
    WAYS,
    MemoryBudget,
    fits_budgets,
    get_available_bytes,
    has_room_at_once,
)

GIB = 2**30
UNLIMITED_V1 = 9223372036854771712


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)


def look(tmp_path: Path, *, cgroup: str, machine_gib: int = 100, **groups: str) -> int | None:
    """Return what is available by files of /proc and /sys/fs/cgroup that say so."""
    meminfo = f"MemTotal:       999999999 kB\nMemAvailable:   {machine_gib * 2**20} kB\nHugePages_Total:       0\n"
    write(tmp_path / "proc", {"meminfo": meminfo, "self/cgroup": cgroup})
    write(tmp_path / "cgroup", groups)
    return get_available_bytes(tmp_path / "proc", tmp_path / "cgroup")


def v2(group: str, *, limit: str, used: int, files: int = 0, high: str = "max") -> dict[str, str]:
    return {
        f"{group}memory.max": f"{limit}\n",
        f"{group}memory.high": f"{high}\n",
        f"{group}memory.current": f"{used}\n",
        f"{group}memory.stat": f"anon 5\nshmem 7\ninactive_file {files // 4}\nactive_file {files - files // 4}\n",
    }


def v1(group: str, *, limit: int, used: int, files: int = 0) -> dict[str, str]:
    return {
        f"memory/{group}memory.limit_in_bytes": f"{limit}\n",
        f"memory/{group}memory.usage_in_bytes": f"{used}\n",
        f"memory/{group}memory.stat": f"inactive_file 0\ntotal_inactive_file {files}\ntotal_active_file 0\n",
    }


def test_a_machine_has_what_it_says(tmp_path):
    assert look(tmp_path, cgroup="0::/\n") == 100 * GIB


def test_a_container_has_what_its_limit_leaves_and_pages_of_files_are_free(tmp_path):
    groups = v2("", limit=str(16 * GIB), used=10 * GIB, files=4 * GIB)
    assert look(tmp_path, cgroup="0::/\n", **groups) == 10 * GIB


def test_a_machine_may_have_less_left_than_its_container_allows(tmp_path):
    assert look(tmp_path, cgroup="0::/\n", machine_gib=3, **v2("", limit=str(16 * GIB), used=0)) == 3 * GIB


def test_the_tightest_limit_on_the_way_up_counts(tmp_path):
    groups = {
        **v2("pods/", limit=str(32 * GIB), used=30 * GIB),
        **v2("pods/p1/", limit=str(16 * GIB), used=8 * GIB),
        **v2("pods/p1/c1/", limit="max", used=8 * GIB),
    }
    assert look(tmp_path, cgroup="0::/pods/p1/c1\n", **groups) == 2 * GIB


def test_a_group_that_is_mounted_at_the_root_is_found_under_its_name_on_the_machine(tmp_path):
    groups = v2("", limit=str(16 * GIB), used=12 * GIB)
    assert look(tmp_path, cgroup="0::/kubepods/pod7/c1\n", **groups) == 4 * GIB
    assert look(tmp_path, cgroup="0::/../../elsewhere\n", **groups) == 4 * GIB


def test_a_group_that_is_slowed_down_above_a_mark_counts_up_to_that_mark(tmp_path):
    groups = v2("", limit=str(16 * GIB), high=str(9 * GIB), used=8 * GIB)
    assert look(tmp_path, cgroup="0::/\n", **groups) == 1 * GIB


def test_one_that_uses_more_than_its_limit_has_nothing(tmp_path):
    assert look(tmp_path, cgroup="0::/\n", **v2("", limit=str(GIB), used=2 * GIB)) == 0


def test_the_first_version_of_groups(tmp_path):
    cgroup = "9:name=systemd:/\n4:cpu,memory:/a/b\n0::/\n"
    groups = {
        **v1("", limit=UNLIMITED_V1, used=50 * GIB),
        **v1("a/", limit=8 * GIB, used=7 * GIB, files=2 * GIB),
        **v1("a/b/", limit=UNLIMITED_V1, used=7 * GIB),
    }
    assert look(tmp_path, cgroup=cgroup, **groups) == 3 * GIB


def test_where_the_kernel_says_nothing_nothing_is_known(tmp_path):
    assert get_available_bytes(tmp_path / "proc", tmp_path / "cgroup") is None


def test_this_machine_has_something():
    available = get_available_bytes()
    assert available is not None
    assert 2**20 < available < 2**50


def budget(available, *, node=1, first=2, more=4, left=0):
    return MemoryBudget(
        node=node, first_bytes=first, more_bytes=more, all_bytes=more, left_bytes=left, available_bytes=available
    )


@pytest.mark.parametrize(
    ("budgets", "is_enough"),
    [
        pytest.param([budget(15)], True, id="one rank"),
        pytest.param([budget(14)], False, id="nothing to spare"),
        pytest.param([budget(19)] * 2, True, id="two"),
        pytest.param([budget(19)] * 3, False, id="each alone, but not all"),
        pytest.param([budget(15, node=n) for n in range(8)], True, id="on nodes of their own"),
        pytest.param([budget(99), budget(3, node=2)], False, id="another node"),
        pytest.param([budget(1, first=0, more=0)], True, id="taken already"),
        pytest.param([budget(14, first=0, more=0), budget(14)], False, id="a new rank beside one that has its part"),
        pytest.param([budget(99), budget(18)], False, id="seen at two moments"),
        pytest.param([budget(13, left=2)], True, id="a dead one leaves as much"),
        pytest.param([budget(12, left=99)], False, id="but only after the first"),
        pytest.param([budget(15, left=2)] * 2, False, id="what was left on a node counts once"),
        pytest.param([budget(13, first=3, more=2)], False, id="smaller buffers go, but only after the first"),
        pytest.param([budget(14, first=3, more=2)], True, id="smaller buffers go"),
    ],
)
def test_all_ranks_of_a_node_share_its_memory(budgets, is_enough):
    assert fits_budgets(budgets, spare_bytes=10) is is_enough


@pytest.mark.parametrize(
    ("budgets", "is_enough"),
    [
        pytest.param([budget(15, left=99)], True, id="all of them, and something to spare"),
        pytest.param([budget(14, left=99)], False, id="nothing of the dead counts yet"),
        pytest.param([budget(19), budget(19)], True, id="two ranks"),
        pytest.param([budget(18), budget(18)], False, id="two ranks, and nothing to spare"),
        pytest.param([budget(99), budget(14, node=2)], False, id="another node"),
    ],
)
def test_a_node_has_room_at_once_if_it_need_not_give_anything_back_first(budgets, is_enough):
    assert has_room_at_once(budgets, spare_bytes=10) is is_enough


def test_fewer_snapshots_are_kept_before_none_and_two_of_ones_own_before_copies():
    assert [buffers for buffers, _ in WAYS] == sorted((buffers for buffers, _ in WAYS), reverse=True)
    assert WAYS[-1] == (1, 0)
    assert (2, 0) in WAYS


numbers = st.integers(0, 9)


@given(
    st.lists(
        st.builds(MemoryBudget, st.integers(0, 3), numbers, numbers, numbers, numbers, st.integers(0, 60)), max_size=8
    ),
    numbers,
)
def test_no_order_and_no_other_node_matters(budgets, spare_bytes):
    nodes = {budget.node for budget in budgets}
    each = [fits_budgets([r for r in budgets if r.node == node], spare_bytes=spare_bytes) for node in nodes]
    assert fits_budgets(reversed(budgets), spare_bytes=spare_bytes) is all(each)
