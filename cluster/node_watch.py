"""Watch what providers say about one node, and have it drained with the true deadline. No Ray here.

Each feed is read in a thread of its own, all by the same loop: some wait for a change for a minute, and one that hangs
must not keep the others. Whatever a feed answers, the watch goes on, and says once what is wrong.
"""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from cluster.notices import Change, Departure, Outlook, Report, Source, get_departure, is_other, update
from cluster.providers import Feed, NodeNotice
from elastic.errors import NoticeError, SolventError

REPEAT_S = 600.0
"""What is still wrong after this long is said again."""


@dataclass(frozen=True, kw_only=True)
class News:
    """What a watch tells the coordinator."""

    lines: tuple[str, ...] = ()
    """For people."""
    departure: Departure | None = None
    """The node will be gone; None: nothing new about that."""
    stays: bool = False
    """The departure that was told is off, and Ray was not asked for a drain yet."""
    reports: tuple[Report, ...] = ()
    """All notices of several machines that hold now."""


class NodeWatch:
    """Reads the feeds of one node until it is closed."""

    def __init__(
        self,
        feeds: Mapping[str, Sequence[Feed]],
        *,
        drain: Callable[[Departure], None],
        tell: Callable[[News], None],
        now_s: Callable[[], float],
        leave_before_s: float,
        error_pause_s: float = 1.0,
    ) -> None:
        """Take the feeds by provider.

        Args:
            drain: has Ray drain the node; it may raise SolventError and OSError, and is then called again.
            tell: takes news; called from several threads, one at a time.
            leave_before_s: a node is drained when this is left; maintenance may be announced days ahead.
            error_pause_s: a feed that answers nonsense at once is not asked faster than this.
        """
        self._feeds = [
            (Source(provider, feed.name), feed) for provider, of_provider in feeds.items() for feed in of_provider
        ]
        self._drain = drain
        self._tell = tell
        self._now_s = now_s
        self._leave_before_s = leave_before_s
        self._error_pause_s = error_pause_s
        self._outlook = Outlook()
        self._drained: Departure | None = None
        self._told: Departure | None = None
        self._told_reports: tuple[Report, ...] = ()
        self._said_s: dict[str, float] = {}
        self._to_acknowledge: set[str] = set()
        self._lock = threading.Lock()
        self._is_closed = threading.Event()

    def start(self) -> None:
        """Start to read."""
        for source, feed in self._feeds:
            threading.Thread(target=self._poll, args=(source, feed), name=feed.name, daemon=True).start()

    def get_sources(self) -> list[str]:
        """Return what is read, as provider and feed."""
        return [str(source) for source, _ in self._feeds]

    def acknowledge(self, notice_id: str) -> None:
        """Tell the provider, at the next reading, that it may go ahead with a notice; repeat it until that worked."""
        with self._lock:
            self._to_acknowledge.add(notice_id)

    def close(self) -> None:
        """Stop; a reading that is under way ends by itself."""
        self._is_closed.set()
        for _, feed in self._feeds:
            feed.close()

    def _poll(self, source: Source, feed: Feed) -> None:
        while not self._is_closed.is_set():
            error: Exception | None = None
            notices: Sequence[NodeNotice] = ()
            try:
                notices = feed.read()
            except (
                Exception
            ) as caught:  # a mistake in a provider's file must not leave the node without its other feeds
                error = caught
            if self._is_closed.is_set():
                return
            with self._lock:
                if error is None:
                    self._take(source, feed, notices)
                else:
                    self._say_trouble(str(source), _describe(error))
            self._is_closed.wait(feed.every_s if error is None else max(feed.every_s, self._error_pause_s))

    def _take(self, source: Source, feed: Feed, notices: Sequence[NodeNotice]) -> None:
        """Act on a reading: tell first, so that the coordinator knows why Ray drains the node."""
        now_s = self._now_s()
        changes = update(self._outlook, source, notices, now_s=now_s)
        departure = get_departure(self._outlook)
        is_due = departure and (departure.deadline_s is None or departure.deadline_s - now_s <= self._leave_before_s)
        due = departure if is_due else None
        lines = [_describe_change(change, now_s) for change in changes]
        is_off = departure is None and any(_is_withdrawal(change) for change in changes)
        if is_off and self._drained:
            lines.append("Ray cannot take a drain back: the node gets no new work until Ray is started anew there")
        news = News(
            lines=tuple(lines),
            departure=due if is_other(self._told, due) else None,
            stays=bool(is_off and self._told and not self._drained),
            reports=self._get_reports(),
        )
        if news.lines or news.departure or news.reports != self._told_reports:
            self._tell(news)
            self._told = None if news.stays else due or self._told
            self._told_reports = news.reports
        if due and is_other(self._drained, due):
            try:
                self._drain(due)
                self._drained = due
            except (SolventError, OSError) as error:
                self._say_trouble("drain", f"Ray does not drain the node: {_describe(error)}")
        if feed.acknowledge:
            self._acknowledge_all(feed, notices)

    def _acknowledge_all(self, feed: Feed, notices: Sequence[NodeNotice]) -> None:
        for notice in notices:
            if notice.id in self._to_acknowledge and feed.acknowledge:
                try:
                    feed.acknowledge(notice)
                except (NoticeError, OSError) as error:
                    self._say_trouble("acknowledge", _describe(error))
                else:
                    self._to_acknowledge.discard(notice.id)
                    self._tell(News(lines=(f"{notice.reason} acknowledged",), reports=self._told_reports))

    def _get_reports(self) -> tuple[Report, ...]:
        notices = [held.notice for held in self._outlook.held.values() if held.notice.machines]
        return tuple(Report(id=n.id, machine=n.machine, machines=n.machines) for n in notices)

    def _say_trouble(self, what: str, text: str) -> None:
        now_s = self._now_s()
        if now_s - self._said_s.get(what, float("-inf")) >= REPEAT_S:
            self._said_s[what] = now_s
            self._tell(News(lines=(f"{what}: {text}",), reports=self._told_reports))


def _is_withdrawal(change: Change) -> bool:
    return change.kind == "withdrawn" and change.notice.kind == "leave"


def _describe(error: Exception) -> str:
    if isinstance(error, SolventError):
        return str(error)
    if isinstance(error, OSError):
        return f"no answer ({error or type(error).__name__})"
    return f"{type(error).__name__}: {error}"


def _describe_change(change: Change, now_s: float) -> str:
    reason = f"{change.source}: {change.notice.reason}"
    left = "" if change.deadline_s is None else f" in {change.deadline_s - now_s:.0f} s"
    match change.kind:
        case "withdrawn":
            return f"{reason} was withdrawn"
        case "moved":
            return f"{reason} was moved: gone{left}"
        case "given" if change.notice.kind == "advice":
            return f"{reason} (advice: the node stays)"
        case "given":
            return f"{reason}: gone{left}"
