"""Where every paid second went: each node's time is cut into tiles, and each tile has exactly one state.

Pure: no I/O and no clock; times come in as Unix seconds. A boundary is rounded to the millisecond once, when it
comes in, and both neighbours share it; so tiles meet exactly and their dollars add up to rate times time.
"""

import math
from bisect import bisect_left, bisect_right
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from operator import itemgetter
from typing import Any, get_args

from elastic.ports import Phase
from elastic.records.rundir import format_utc, parse_utc

STATES: tuple[Phase, ...] = get_args(Phase)
CAUSES: Mapping[Phase, str] = {
    "redo": "redo",
    "load": "recovery",
    "reconfigure": "recovery",
    "save": "saving",
    "wait": "waiting",
    "idle": "waiting",
    "start": "starting",
    "data": "data",
    "eval": "evaluation",
}
"""What a second that was no progress went into, as people are told; `train` is in none of them."""
_MS_PER_HOUR = 3_600_000


def _to_ms(time_s: float) -> int:
    return round(time_s * 1000)


@dataclass(frozen=True, kw_only=True)
class LedgerRow:
    """One tile: a stretch of one node's paid time."""

    node: str
    start_ms: int
    end_ms: int
    """Unix milliseconds; the end is not part of the tile."""
    state: Phase
    gpus: int
    """What is paid for: the GPUs of the node (on CPU runs: its workers)."""
    usd: float

    @property
    def gpu_ms(self) -> int:
        """Paid GPU-milliseconds."""
        return (self.end_ms - self.start_ms) * self.gpus

    def to_row(self) -> dict[str, object]:
        """Return the line of `ledger.jsonl`."""
        return {
            "node": self.node,
            "start_utc": format_utc(self.start_ms / 1000),
            "end_utc": format_utc(self.end_ms / 1000),
            "state": self.state,
            "gpus": self.gpus,
            "usd": self.usd,
        }


@dataclass(kw_only=True)
class Totals:
    """Sums over tiles."""

    gpu_ms: dict[Phase, int] = field(default_factory=lambda: defaultdict(int))
    usd_by_state: dict[Phase, float] = field(default_factory=lambda: defaultdict(float))

    def add(self, row: LedgerRow) -> None:
        """Count one more tile."""
        self.gpu_ms[row.state] += row.gpu_ms
        self.usd_by_state[row.state] += row.usd

    def get_gpu_seconds(self, state: Phase) -> float:
        """Return the paid GPU-seconds of one state."""
        return self.gpu_ms.get(state, 0) / 1000

    @property
    def paid_gpu_s(self) -> float:
        """Paid GPU-seconds of all states."""
        return sum(self.gpu_ms.values()) / 1000

    @property
    def usd(self) -> float:
        """Dollars of all states."""
        return math.fsum(self.usd_by_state.values())

    @property
    def usd_by_cause(self) -> dict[str, float]:
        """Dollars that were no progress, by what they went into."""
        causes = dict.fromkeys(CAUSES.values(), 0.0)
        for state, cause in CAUSES.items():
            causes[cause] += self.usd_by_state.get(state, 0.0)
        return causes

    @property
    def available_goodput(self) -> float:
        """As `goodput`, of the GPU-seconds that could train: without machines that start, or are not needed any
        more."""
        able_ms = sum(self.gpu_ms.values()) - self.gpu_ms.get("start", 0) - self.gpu_ms.get("idle", 0)
        return self.gpu_ms.get("train", 0) / able_ms if able_ms else 0.0

    @property
    def goodput(self) -> float:
        """Share of the paid GPU-seconds that applied a new optimizer step; 0 if nothing was paid."""
        paid_ms = sum(self.gpu_ms.values())
        return self.gpu_ms.get("train", 0) / paid_ms if paid_ms else 0.0


@dataclass(kw_only=True)
class _Account:
    """One node. `marks` says from when on which state holds; the first mark is where the next row starts."""

    gpus: int
    usd_per_gpu_hour: float
    marks: list[tuple[int, Phase]]
    left_ms: int | None = None

    def paint(self, state: Phase, start_ms: int, end_ms: int | None) -> None:
        """Give [start, end) to a state; no end: from now on. What is already booked or after the leave stays."""
        start_ms = max(start_ms, self.marks[0][0])
        if end_ms is None:
            while self.marks and self.marks[-1][0] >= start_ms:
                self.marks.pop()
            self.marks.append((start_ms, state))
            return
        if end_ms <= start_ms:
            return
        first = bisect_left(self.marks, start_ms, key=itemgetter(0))
        beyond = bisect_right(self.marks, end_ms, key=itemgetter(0))
        after = self.marks[beyond - 1][1]
        self.marks[first:beyond] = [(start_ms, state), (end_ms, after)]

    def cut(self, up_to_ms: int) -> list[tuple[int, int, Phase]]:
        """Take out what lies before a time, as tiles in which neighbours differ."""
        end_ms = up_to_ms if self.left_ms is None else min(up_to_ms, self.left_ms)
        if end_ms <= self.marks[0][0]:
            return []
        inside = [m for m in self.marks if m[0] < end_ms]
        rest = self.marks[len(inside) :]
        if not rest or rest[0][0] > end_ms:
            rest.insert(0, (end_ms, inside[-1][1]))
        self.marks = rest
        changes = [m for i, m in enumerate(inside) if i == 0 or m[1] != inside[i - 1][1]]
        ends = [start for start, _ in changes[1:]] + [end_ms]
        return [(start, end, state) for (start, state), end in zip(changes, ends, strict=True)]


class Ledger:
    """The books of one run.

    Args:
        booked: rows that an earlier process wrote; they count in the totals. A node of theirs that joins again was
            paid all along (a new rental has a new id): the time nobody watched is booked as `idle`.
    """

    def __init__(self, booked: Iterable[LedgerRow] = ()) -> None:
        self._totals = Totals()
        self._ends_ms: dict[str, int] = {}
        self._accounts: dict[str, _Account] = {}
        self._unsettled: dict[str, _Account] = {}
        """Those that are open, or of which something is not flushed yet; a run may lose thousands of nodes."""
        for row in booked:
            self._totals.add(row)
            self._ends_ms[row.node] = max(row.end_ms, self._ends_ms.get(row.node, row.end_ms))

    def join(self, node: str, at_s: float, *, gpus: int, usd_per_gpu_hour: float) -> None:
        """Start to pay for a node, in state `start`. Nothing happens if it is already here."""
        account = self._accounts.get(node)
        if account is None:
            opened_ms = self._ends_ms.get(node, _to_ms(at_s))
            account = _Account(gpus=gpus, usd_per_gpu_hour=usd_per_gpu_hour, marks=[(opened_ms, "idle")])
            self._accounts[node] = account
        elif account.left_ms is None:
            return
        else:  # the same rental after all: its price and its time go on
            account.paint("idle", account.left_ms, None)
            account.left_ms = None
        self._unsettled[node] = account
        account.paint("start", _to_ms(at_s), None)

    def is_open(self, node: str) -> bool:
        """Tell whether a node is paid for."""
        account = self._accounts.get(node)
        return account is not None and account.left_ms is None

    def get_open(self) -> list[str]:
        """Return the nodes that are paid for."""
        return [node for node, account in self._unsettled.items() if account.left_ms is None]

    def switch(self, node: str, state: Phase, at_s: float) -> None:
        """Let a state hold from a time on, until the next switch."""
        self._accounts[node].paint(state, _to_ms(at_s), None)

    def report(self, node: str, phase: Phase, start_s: float, end_s: float) -> None:
        """Take a finished stretch that a trainer of the node tells afterwards; it replaces what was assumed.

        The trainer's clock may be skewed: what lies before the join, after the leave or in rows already flushed is
        cut off. Of two stretches that overlap, the one told last counts.
        """
        self._accounts[node].paint(phase, _to_ms(start_s), _to_ms(end_s))

    def leave(self, node: str, at_s: float) -> None:
        """Stop to pay for a node. What was flushed stays paid; a second leave changes nothing."""
        account = self._accounts[node]
        if account.left_ms is None:
            account.left_ms = _to_ms(at_s)

    def flush(self, up_to_s: float) -> list[LedgerRow]:
        """Book everything before a time and return it, for `ledger.jsonl`; open stretches go on in the next rows.

        Call it some seconds behind the clock, so that the trainers' reports are in.
        """
        rows: list[LedgerRow] = []
        for node, account in list(self._unsettled.items()):
            for start_ms, end_ms, state in account.cut(_to_ms(up_to_s)):
                usd = account.usd_per_gpu_hour * account.gpus * (end_ms - start_ms) / _MS_PER_HOUR
                row = LedgerRow(node=node, start_ms=start_ms, end_ms=end_ms, state=state, gpus=account.gpus, usd=usd)
                self._totals.add(row)
                rows.append(row)
            if account.left_ms is not None and account.marks[0][0] >= account.left_ms:
                del self._unsettled[node]
        return rows

    def get_usd_per_s(self) -> float:
        """Return what a second costs now, for all nodes that are paid for."""
        open_accounts = [account for account in self._unsettled.values() if account.left_ms is None]
        return sum(account.usd_per_gpu_hour * account.gpus for account in open_accounts) / 3600

    def get_dearest_usd_per_gpu_hour(self) -> float:
        """Return the highest price that is paid for a GPU now."""
        return max((a.usd_per_gpu_hour for a in self._unsettled.values() if a.left_ms is None), default=0.0)

    def estimate_usd(self, now_s: float) -> float:
        """Return the dollars up to now, those that are not flushed yet among them."""
        usd = self._totals.usd
        for account in self._unsettled.values():
            end_ms = _to_ms(now_s) if account.left_ms is None else account.left_ms
            ms = max(0, end_ms - account.marks[0][0])
            usd += account.usd_per_gpu_hour * account.gpus * ms / _MS_PER_HOUR
        return usd

    def totals(self) -> Totals:
        """Return the sums over all that was flushed, now and by earlier processes."""
        return Totals(gpu_ms=self._totals.gpu_ms.copy(), usd_by_state=self._totals.usd_by_state.copy())


def read_ledger(rows: Iterable[Mapping[str, Any]]) -> list[LedgerRow]:
    """Return the lines of `ledger.jsonl` as tiles."""
    return [
        LedgerRow(
            node=row["node"],
            start_ms=_to_ms(parse_utc(row["start_utc"])),
            end_ms=_to_ms(parse_utc(row["end_utc"])),
            state=row["state"],
            gpus=row["gpus"],
            usd=row["usd"],
        )
        for row in rows
    ]


def totals_of(rows: Iterable[LedgerRow]) -> Totals:
    """Return the sums over tiles."""
    totals = Totals()
    for row in rows:
        totals.add(row)
    return totals


def check_dollars(rows: Iterable[LedgerRow]) -> list[str]:
    """Return where dollars are not rate times time: of each node all tiles have one price, to the cent in all."""
    by_node: defaultdict[str, list[LedgerRow]] = defaultdict(list)
    for row in rows:
        by_node[row.node].append(row)
    problems: list[str] = []
    for node, tiles in by_node.items():
        hours = sum(tile.gpu_ms for tile in tiles) / _MS_PER_HOUR
        longest = max(tiles, key=lambda tile: tile.gpu_ms)
        rate = longest.usd / (longest.gpu_ms / _MS_PER_HOUR) if longest.gpu_ms else 0.0
        usd = math.fsum(tile.usd for tile in tiles)
        if abs(usd - rate * hours) >= 0.01:
            problems.append(f"{node}: {usd:.4f} USD were booked for {hours:.4f} GPU-hours at {rate:.4f}")
    return problems


def check_tiling(rows: Iterable[LedgerRow]) -> list[str]:
    """Return what is wrong with the books, one sentence each: gaps, overlaps, empty tiles, unknown states."""
    by_node: defaultdict[str, list[LedgerRow]] = defaultdict(list)
    for row in rows:
        by_node[row.node].append(row)
    problems: list[str] = []
    for node, tiles in by_node.items():
        tiles.sort(key=lambda row: row.start_ms)
        for row in tiles:
            if row.end_ms <= row.start_ms:
                problems.append(f"{node}: the tile at {format_utc(row.start_ms / 1000)} has no length")
            if row.state not in STATES:
                problems.append(f"{node}: the state {row.state!r} is not known")
        for row, later in pairwise(tiles):
            if row.end_ms != later.start_ms:
                word = "gap" if row.end_ms < later.start_ms else "overlap"
                length_ms = abs(later.start_ms - row.end_ms)
                problems.append(f"{node}: {word} of {length_ms} ms at {format_utc(row.end_ms / 1000)}")
    return problems
