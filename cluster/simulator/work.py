"""What worlds work, keep and lose, in node-seconds, and the ledger's tiles of it."""

from collections.abc import Collection

from cluster.ledger import Ledger
from cluster.simulator.saving import Rhythm
from cluster.simulator.setup import Setup, Tally
from elastic.ports import Phase


class Work:
    """The progress of one run; one world at a time trains between `begin` and `stop`."""

    def __init__(self, setup: Setup, ledger: Ledger, tally: Tally) -> None:
        self._setup, self._ledger, self._tally = setup, ledger, tally
        self.rhythm = Rhythm(saving=setup.saving)
        self.done = self._best = self._durable = 0.0
        """Where the current world is, the furthest that any was, what the storage has at least."""
        self.since_s: float | None = None
        """When the current world began to train; None: it does not yet."""

    def begin(self, now_s: float) -> None:
        """Train from now on."""
        self.since_s = now_s

    def stop(self, now_s: float, members: Collection[str], *, lost: Collection[str] | None) -> None:
        """Count what the current world has done until now; a loss takes what was not saved.

        Args:
            lost: nodes that have just gone without notice; None: the world ends as it was meant to.
        """
        since_s, self.since_s = self.since_s, None
        if since_s is None or now_s <= since_s:
            return
        seconds, rate, before = now_s - since_s, self._setup.get_rate(len(members)), self.done
        stretch = self.rhythm.divide(seconds)
        worked = stretch.worked_s * rate
        redone = min(worked, max(0.0, self._best - before))
        self._paint(members, since_s, redone / rate, stretch.worked_s, stretch.saved_s)
        self.done = before + worked
        self._best = max(self._best, self.done)
        self._durable = max(self._durable, self.done - self._setup.saving.durable_s * rate)
        if lost is not None:
            self.done = self._keep_after_loss(before, stretch.kept_s * rate, members, lost)
        self._tally.training_s += seconds
        self._tally.redone_node_s += redone
        self._tally.work.append((now_s, self.done))

    def estimate_end_s(self, now_s: float, size: int) -> float:
        """Return when a world of this size would have done all, if nothing happens; infinite if there is no end."""
        left = self._setup.work_node_s - self.done
        if left == float("inf"):
            return left
        interval_s = self.rhythm.interval_s
        share = 1.0 if interval_s == float("inf") else interval_s / (interval_s + self._setup.saving.save_s)
        return now_s + left / self._setup.get_rate(size) / share

    def _keep_after_loss(self, before: float, kept: float, members: Collection[str], lost: Collection[str]) -> float:
        """Return where work is taken up again.

        Args:
            before: at the start of the world that was lost.
            kept: of what it has done, what its last save has.
        """
        match self._setup.saving.kind:
            case "jit":  # of the step that was under way, half; without a survivor nobody saves
                kept = max(0.0, kept - self._setup.step_node_s / 2)
                is_gone = set(members) <= set(lost)
            case "memory":
                is_gone = _are_copies_lost(members, lost)
            case _:
                is_gone = False
        return min(before + kept, self._durable) if is_gone else before + kept

    def _paint(self, nodes: Collection[str], since_s: float, redone_s: float, worked_s: float, saved_s: float) -> None:
        """Give the time of a stretch to its states; saves are put together, at its end."""
        spans: list[tuple[Phase, float, float]] = []
        at_s = since_s
        lengths_s: tuple[tuple[Phase, float], ...] = (
            ("redo", redone_s),
            ("train", worked_s - redone_s),
            ("save", saved_s),
        )
        for phase, length_s in lengths_s:
            if length_s > 0:
                spans.append((phase, at_s, at_s + length_s))
                at_s += length_s
        for node in filter(self._ledger.is_open, nodes):
            for phase, start_s, end_s in spans:
                self._ledger.report(node, phase, start_s, end_s)


def _are_copies_lost(members: Collection[str], lost: Collection[str]) -> bool:
    """Tell whether a node goes together with the one that holds its copy, its neighbour, or all go."""
    order, gone = sorted(members), set(lost)
    return any(node in gone and peer in gone for node, peer in zip(order, [*order[1:], *order[:1]], strict=True))
