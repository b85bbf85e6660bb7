"""All policies over many windows of recorded fleets: what each costs on average, and whether a deadline is missed.
Pure."""

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

from cluster.deadlines.chooser import choose_policy
from cluster.deadlines.policies import POLICIES, Job
from cluster.deadlines.windows import Levels, cut, play
from elastic.errors import DataError

CHOOSER = "chooser"
_PAST = 5.0
"""Deadlines that the chooser looks back."""


@dataclass(frozen=True, kw_only=True)
class Terms:
    """What a machine-hour costs, and what a change of machines does."""

    work_h: float = 8.0
    """On all machines; shorter where a trace is."""
    share: float = 0.5
    """Of a fleet's most machines, those that are wanted."""
    spot_usd_per_hour: float = 1.0
    on_demand_usd_per_hour: float = 3.0
    restart_s: float = 30.0
    redo_s: float = 30.0


@dataclass(frozen=True, kw_only=True)
class Result:
    """One slack."""

    slack: float
    windows: int
    usd_per_node_hour: Mapping[str, float]
    """Dollars per node-hour of work, by policy, on average over all windows."""
    missed: Mapping[str, int]
    picked: Mapping[str, int]
    """What the chooser took."""

    @property
    def chooser_over_best(self) -> float:
        """What the chooser costs, as a multiple of the best single policy."""
        others = {name: usd for name, usd in self.usd_per_node_hour.items() if name != CHOOSER}
        return self.usd_per_node_hour[CHOOSER] / min(others.values())

    def to_row(self) -> dict[str, object]:
        """Return it for `--json`."""
        return {
            "slack": self.slack,
            "windows": self.windows,
            "usd_per_node_hour": {name: round(usd, 4) for name, usd in self.usd_per_node_hour.items()},
            "missed": dict(self.missed),
            "picked": dict(self.picked),
            "chooser_over_best": round(self.chooser_over_best, 4),
        }


def study(traces: Sequence[Levels], *, slack: float, windows: int, terms: Terms, seed: int) -> Result:
    """Play windows drawn by lot, from each trace in turn.

    Raises:
        DataError: no trace is long enough for any window.
    """
    usable = [levels for levels in traces if levels[-1][0] - levels[0][0] > 3600 * slack and max(n for _, n in levels)]
    if not usable:
        raise DataError("--slack needs traces of hours in which there is a node. Give longer ones, or --generate them.")
    lots = Random(seed)
    usd: defaultdict[str, float] = defaultdict(float)
    missed: Counter[str] = Counter()
    picked: Counter[str] = Counter()
    for number in range(windows):
        levels = usable[number % len(usable)]
        begin_s, span_s = levels[0][0], levels[-1][0] - levels[0][0]
        nodes = max(1, round(terms.share * max(n for _, n in levels)))
        work_s = min(3600 * terms.work_h, span_s / (3 * slack))
        job = Job(
            nodes=nodes,
            work_node_s=nodes * work_s,
            deadline_s=slack * work_s,
            spot_usd_per_hour=terms.spot_usd_per_hour,
            on_demand_usd_per_hour=terms.on_demand_usd_per_hour,
            restart_s=terms.restart_s,
            redo_s=terms.redo_s,
        )
        start_s = begin_s + lots.uniform(0, span_s - job.deadline_s)
        window = cut(levels, start_s, start_s + job.deadline_s)
        played = {name: play(policy, job, window) for name, policy in POLICIES.items()}
        past_s = min(start_s - begin_s, _PAST * job.deadline_s)
        pick = choose_policy(job, cut(levels, start_s - past_s, start_s), past_s=past_s)
        picked[pick] += 1
        for name, outcome in {**played, CHOOSER: played[pick]}.items():
            usd[name] += outcome.usd / (job.work_node_s / 3600) / windows
            missed[name] += not outcome.keeps(job)
    return Result(slack=slack, windows=windows, usd_per_node_hour=dict(usd), missed=dict(missed), picked=dict(picked))
