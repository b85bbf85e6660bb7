import json
import math
from collections import defaultdict
from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cluster.ledger import STATES, Ledger, LedgerRow, check_tiling, read_ledger, totals_of
from tests.ledgers import check_ledgers

states = st.sampled_from(STATES)
nodes = st.sampled_from(["a", "b"])
times_ms = st.integers(0, 300)
steps = st.one_of(
    st.tuples(st.just("join"), nodes, times_ms),
    st.tuples(st.just("leave"), nodes, times_ms),
    st.tuples(st.just("flush"), times_ms),
    st.tuples(st.just("switch"), nodes, times_ms, states),
    st.tuples(st.just("report"), nodes, st.integers(-50, 350), st.integers(-50, 350), states),
)
ORIGIN_MS = 1_800_000_000_000
END_MS = 400
GPUS, USD_PER_GPU_HOUR = 3, 1.7


class SlowBooks:
    """The same rules, one cell per millisecond."""

    def __init__(self):
        self.cells = {}
        self.first, self.booked, self.left = {}, {}, {}

    def join(self, node, at):
        if node not in self.cells:
            self.cells[node] = ["start"] * (END_MS + 1)
            self.first[node] = self.booked[node] = at
        elif node in self.left:
            self.paint(node, self.left.pop(node), END_MS + 1, "idle")
            self.paint(node, at, END_MS + 1, "start")

    def paint(self, node, start, end, state):
        for i in range(max(start, self.booked[node]), min(end, END_MS + 1)):
            self.cells[node][i] = state

    def leave(self, node, at):
        self.left.setdefault(node, max(at, self.booked[node]))

    def flush(self, up_to):
        for node in self.cells:
            self.booked[node] = max(self.booked[node], min(up_to, self.left.get(node, up_to)))

    def booked_cells(self):
        return {n: c[self.first[n] : self.booked[n]] for n, c in self.cells.items() if self.booked[n] > self.first[n]}


def play(events):
    ledger, slow, rows, joined = Ledger(), SlowBooks(), [], set()

    def at(ms):
        return (ORIGIN_MS + ms) / 1000

    for kind, *args in [*events, ("flush", END_MS)]:
        if kind == "flush":
            rows += ledger.flush(at(args[0]))
            slow.flush(args[0])
            continue
        node = args[0]
        if kind == "join":
            joined.add(node)
            ledger.join(node, at(args[1]), gpus=GPUS, usd_per_gpu_hour=USD_PER_GPU_HOUR)
            slow.join(node, args[1])
        elif node in joined and kind == "switch":
            ledger.switch(node, args[2], at(args[1]))
            slow.paint(node, args[1], END_MS + 1, args[2])
        elif node in joined and kind == "report":
            ledger.report(node, args[3], at(args[1]), at(args[2]))
            slow.paint(node, args[1], args[2], args[3])
        elif node in joined and kind == "leave":
            ledger.leave(node, at(args[1]))
            slow.leave(node, args[1])
    return ledger, slow, rows


@settings(max_examples=1500)
@given(st.lists(steps, max_size=30))
def test_any_order_of_events_and_skewed_reports_tiles_the_paid_time_and_its_price(events):
    ledger, slow, rows = play(events)
    rows = read_ledger(json.loads(json.dumps(row.to_row())) for row in rows)
    assert check_tiling(rows) == []

    cells = defaultdict(list)
    for row in sorted(rows, key=lambda row: row.start_ms):
        cells[row.node] += [row.state] * (row.end_ms - row.start_ms)
    assert cells == slow.booked_cells()

    paid_ms = sum(map(len, cells.values()))
    assert totals_of(rows).usd == pytest.approx(paid_ms / 3_600_000 * GPUS * USD_PER_GPU_HOUR, rel=1e-12)
    assert ledger.totals() == totals_of(rows)


@given(st.lists(st.floats(1.7e9, 1.9e9), min_size=3, max_size=20))
def test_boundaries_between_milliseconds_are_rounded_once(boundaries):
    boundaries = sorted(boundaries)
    ledger = Ledger()
    ledger.join("a", boundaries[0], gpus=1, usd_per_gpu_hour=3.6)
    rows = []
    for i, boundary in enumerate(boundaries[1:]):
        ledger.switch("a", STATES[i % 2], boundary)
        rows += ledger.flush(boundary)
    assert check_tiling(rows) == []
    paid_ms = round(boundaries[-1] * 1000) - round(boundaries[0] * 1000)
    assert sum(row.end_ms - row.start_ms for row in rows) == paid_ms
    assert math.fsum(row.usd for row in rows) == pytest.approx(paid_ms / 1e6, rel=1e-12)


def test_goodput_is_the_train_share_of_paid_gpu_seconds():
    ledger = Ledger()
    ledger.join("big", 0.0, gpus=3, usd_per_gpu_hour=1.0)
    ledger.join("small", 0.0, gpus=1, usd_per_gpu_hour=1.0)
    ledger.switch("big", "train", 0.0)
    ledger.flush(10.0)
    totals = ledger.totals()
    assert (totals.goodput, totals.paid_gpu_s, totals.get_gpu_seconds("start")) == (0.75, 40.0, 10.0)


def test_neighbours_of_one_state_become_one_row_within_a_flush():
    ledger = Ledger()
    ledger.join("a", 0.0, gpus=1, usd_per_gpu_hour=0.0)
    for second in range(1, 5):
        ledger.report("a", "train", second, second + 1)
    rows = ledger.flush(6.0)
    assert [(row.state, row.start_ms, row.end_ms) for row in rows] == [
        ("start", 0, 1000),
        ("train", 1000, 5000),
        ("start", 5000, 6000),
    ]


def test_a_node_found_again_after_a_crash_was_paid_while_nobody_watched():
    first = Ledger()
    first.join("a", 0.0, gpus=2, usd_per_gpu_hour=1.0)
    written = first.flush(10.0)

    second = Ledger(written)
    second.join("a", 15.0, gpus=2, usd_per_gpu_hour=1.0)
    later = second.flush(20.0)
    assert [(row.state, row.start_ms, row.end_ms) for row in later] == [("idle", 10000, 15000), ("start", 15000, 20000)]
    assert check_tiling([*written, *later]) == []
    assert second.totals().paid_gpu_s == 40.0


@pytest.mark.parametrize(("second_start_ms", "word"), [(1001, "gap of 1 ms"), (999, "overlap of 1 ms")])
def test_the_check_names_a_gap_or_overlap_of_one_millisecond(second_start_ms, word):
    def tile(start_ms, end_ms):
        return LedgerRow(node="a", start_ms=start_ms, end_ms=end_ms, state="train", gpus=1, usd=0.0)

    (problem,) = check_tiling([tile(0, 1000), tile(second_start_ms, 2000)])
    assert word in problem


def test_the_look_at_every_run_of_the_suite_finds_a_lost_millisecond_and_a_lost_cent(tmp_path):
    """`tests/ray/conftest.py` looks at each run that a test left, after the test and after all of them."""
    tiles = [
        LedgerRow(node="a", start_ms=0, end_ms=3_600_000, state="train", gpus=1, usd=2.0),
        LedgerRow(node="a", start_ms=3_600_000, end_ms=7_200_000, state="redo", gpus=1, usd=2.0),
    ]

    def leave(second):
        folder = tmp_path / "deep" / "run"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "ledger.jsonl").write_text("".join(json.dumps(row.to_row()) + "\n" for row in (tiles[0], second)))

    assert check_ledgers(tmp_path) == 0
    leave(tiles[1])
    assert check_ledgers(tmp_path) == 1
    for wrong in (replace(tiles[1], start_ms=3_600_001), replace(tiles[1], usd=1.98)):
        leave(wrong)
        with pytest.raises(AssertionError, match=r"ledger\.jsonl"):
            check_ledgers(tmp_path)
