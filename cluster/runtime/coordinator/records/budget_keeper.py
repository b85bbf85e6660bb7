"""Watches what a run costs, and says when it must warn or leave (`cluster/budget.py` decides)."""

from cluster.budget import Spent, Verdict, judge
from cluster.runtime.coordinator.records.run_records import RunRecords
from elastic.config import RunConfig

_FIRST_LEAVE_S, _FIRST_LEAVE_GPUS_S = 20.0, 60.0
"""To save and end, until a world was seen to do so."""
_CLOSE_S = 3.0
"""From the end of the last trainer until the nodes are not counted any more."""


class BudgetKeeper:
    """Looks at the ledger now and then; warns once per limit."""

    def __init__(self, config: RunConfig, records: RunRecords) -> None:
        self._budget, self._records = config.budget, records
        self._first_leave_s = _FIRST_LEAVE_GPUS_S if config.cluster.gpus_per_worker else _FIRST_LEAVE_S
        self._max_workers = config.cluster.max_workers
        self._has_warned = False

    def get_leave_s(self, slowest_park_s: float | None) -> float:
        """Return what it takes at most to save and to end; who takes longer is killed (`Policy.park_s`)."""
        park_s = self._first_leave_s if slowest_park_s is None else max(2 * slowest_park_s, self._first_leave_s / 2)
        return park_s + _CLOSE_S

    def look(self, now_s: float, *, slowest_park_s: float | None) -> Verdict:
        """Return what is to be done now; a warning only the first time."""
        if not (self._budget.max_usd or self._budget.max_hours):
            return Verdict()
        ledger, began_s = self._records.ledger, self._records.began_s
        spent = Spent(
            usd=ledger.estimate_usd(now_s),
            usd_per_s=ledger.get_usd_per_s(),
            usd_per_s_at_most=self._max_workers * ledger.get_dearest_usd_per_gpu_hour() / 3600,
            hours=0.0 if began_s is None else (now_s - began_s) / 3600,
        )
        verdict = judge(self._budget, spent, leave_s=self.get_leave_s(slowest_park_s))
        if verdict.warning and self._has_warned:
            return Verdict()
        self._has_warned = self._has_warned or bool(verdict.warning)
        return verdict
