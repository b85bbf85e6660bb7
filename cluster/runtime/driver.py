"""The driver, what `solvent train` runs: it finds or starts the coordinator, has Ray Train hold agents, and watches.

It decides nothing about membership. If it is killed, its job's agents die with it; the coordinator keeps the
trainers going for half a lease, so that the same command, given again, finds them at work. If the coordinator dies, the
driver creates another one, and the hosts keep the trainers going for as long.
"""

import dataclasses
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Set
from dataclasses import asdict
from functools import partial
from typing import Any

from cluster.runtime.coordinator.actor import DRIVER_BUSY_S, Coordinator, Session
from cluster.runtime.coordinator.published import Update
from cluster.runtime.coordinator.records.closing import CLOSE_PATIENCE_S, Closing
from cluster.runtime.node.start_host import new_session
from cluster.runtime.ray import adapter
from cluster.runtime.ray.agent import run_agent
from cluster.runtime.ray.head_address import ADDRESS, PORT, Head, check_head, parse_address
from cluster.types import Scene
from elastic.config import RunConfig
from elastic.config_load import resolve_paths
from elastic.errors import ConfigError, SolventError, StorageError

POLL_S = 0.5
_CLOSE_POLL_S = 0.1
_AGENTS_END_S = 30.0
_RAY_TRAIN_RETRIES = 5
_MOST_RETURNS = 3
"""A coordinator that dies more often within `_RETURNS_WITHIN_S` has a reason that another one would only meet again."""
_RETURNS_WITHIN_S = 600.0
_CREATE_S = 120.0
"""A busy head needs half a minute for a new process that imports Ray."""
_GONE_S = 30.0
"""Ray may know a dead actor by its name for this long."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """How a driver's watch ended."""

    kind: str
    """finished | interrupted | failed"""
    reason: str
    exit_code: int
    summary: dict[str, Any]
    """The final `RunRecords.summary`."""


def train(
    config: RunConfig,
    *,
    address: str | None,
    on_update: Callable[[Update], None],
) -> Ending:
    """Train on the cluster at the address (none: a local one) until the run ends; resume it if it exists.

    Args:
        on_update: sees every poll of the coordinator, twice a second; it must not raise.

    Raises:
        StorageError: another driver leads a run of this name.
        SolventError: the coordinator does not answer, or died again and again.
    """
    config = resolve_paths(config)
    adapter.connect(address, config.cluster)
    try:
        return _lead(config, on_update)
    finally:
        adapter.disconnect()


def get_coordinator_name(config: RunConfig) -> str:
    """Return the actor's name: one per run directory, so that two drivers of one run meet."""
    digest = hashlib.sha256(f"{config.storage}/{config.run}".encode()).hexdigest()[:8]
    return f"solvent-{config.run}-{digest}"


def _lead(config: RunConfig, on_update: Callable[[Update], None]) -> Ending:
    hold = _CoordinatorHold(config)
    coordinator = hold.take()
    start_agents = partial(
        *(adapter.AgentRun, run_agent, {"coordinator_name": hold.name}, config),
        find_lost=partial(_find_lost_nodes, hold.name),
    )
    agents = start_agents()
    retries = 0
    is_stopping, told_to_stop = False, None
    while True:
        try:
            try:
                if is_stopping and told_to_stop is not coordinator:
                    told_to_stop = coordinator
                    adapter.call(coordinator.stop, "interrupted from the keyboard")
                update: Update | None = adapter.call(coordinator.poll, hold.driver)
            except adapter.ActorGoneError as error:
                coordinator = hold.take_again(error)
                continue
            if update is None:
                raise StorageError(
                    f"run={config.run!r} is led by another driver now, so this one stops. Look at the other one's "
                    "output, or train under another run name."
                )
            on_update(hold.add_news(update))
            if update.done:
                break
            if agents.is_over:  # Ray Train gave up; trainers go on, so only the agents are started again
                retries += 1
                if retries > _RAY_TRAIN_RETRIES:
                    raise SolventError(f"Ray Train ended {retries} times; the last time: {agents.error}")
                agents = start_agents()
            time.sleep(POLL_S)
        except KeyboardInterrupt:
            if is_stopping:
                raise
            is_stopping = True
    done = update.done
    kind, reason, exit_code, summary = done["kind"], done["reason"], done["exit_code"], update.summary

    def show() -> None:
        if (news := adapter.call(coordinator.poll, hold.driver)) is not None:
            on_update(news)

    try:
        closing = _close(coordinator, show)
        summary, missing = closing.summary, closing.missing
    except SolventError as error:
        missing = str(error)
    if missing:
        reason, exit_code = f"{reason}; {missing}", exit_code or StorageError.exit_code
    agents.wait(_AGENTS_END_S)
    adapter.kill(coordinator)
    return Ending(kind=kind, reason=reason, exit_code=exit_code, summary=summary)


def _close(coordinator: Any, show: Callable[[], None] = lambda: None) -> Closing:
    """Have a coordinator whose run is over bring its last rows to the storage; return how that ended.

    Args:
        show: called now and then meanwhile.

    Raises:
        SolventError: it does not answer, or has just died.
    """
    until_s = time.monotonic() + 2 * CLOSE_PATIENCE_S  # a call of a storage that hangs ends when it likes
    adapter.call(coordinator.close)
    while True:
        closing: Closing = adapter.call(coordinator.get_closing)
        if closing.is_over or time.monotonic() > until_s:
            return closing
        show()
        time.sleep(_CLOSE_POLL_S)


class _CoordinatorHold:
    """The driver's hold on its run's coordinator, whichever that is by now."""

    def __init__(self, config: RunConfig) -> None:
        self.name = get_coordinator_name(config)
        self.driver = secrets.token_hex(8)
        self._config = config
        run_digest = self.name.rpartition("-")[2]
        self._session = Session(id=new_session(run_digest), secret=secrets.token_hex(16))
        self._lost_s: float | None = None
        self._returns_s: list[float] = []
        self._news: list[str] = []

    def take(self) -> Any:
        """Return the run's coordinator, led by this driver from now on; create it if there is none.

        Raises:
            StorageError: a living driver leads this run, on this cluster or elsewhere.
            ActorGoneError: it died at once.
        """
        config = self._config
        fields = asdict(config)
        # A killed driver is known as such after a while, and so is a dead coordinator; a run under another
        # configuration saves, then makes room.
        patience_s = {"busy": DRIVER_BUSY_S + POLL_S, "changed": config.fault.lease_s, "gone": _GONE_S}
        start_s = time.monotonic()
        while True:
            coordinator = adapter.get_coordinator(self.name)
            is_new = coordinator is None
            if coordinator is None:
                parts = {"config": fields, "session": self._session, "lost_s": self._lost_s}
                coordinator = adapter.create_coordinator(self.name, Coordinator, **parts)
            try:
                answer = adapter.call(coordinator.attach, self.driver, fields, timeout_s=_CREATE_S)
                if answer == "ok":
                    self._session, self._lost_s = adapter.call(coordinator.get_session), None
                    return coordinator
                if answer == "changed" and adapter.call(coordinator.is_over):
                    _close(coordinator)
                    adapter.kill(coordinator)
            except StorageError:  # another cluster, or none, has the run: this coordinator has touched nothing
                adapter.kill(coordinator)
                raise
            except adapter.ActorGoneError:
                if is_new or time.monotonic() - start_s > patience_s["gone"]:
                    raise
                answer = "gone"
            if time.monotonic() - start_s > patience_s[answer]:
                raise StorageError(
                    f"run={config.run!r} is being trained by another driver (process or job) right now. Wait for it, "
                    "stop it, or train under another run name."
                )
            time.sleep(POLL_S)

    def take_again(self, error: adapter.ActorGoneError) -> Any:
        """Return the coordinator after the one that did not answer: the same if it does again, else another one.

        Raises:
            SolventError: too many have died.
            StorageError: as `take`.
        """
        lost_s = self._lost_s = time.time()
        while True:
            self._count_return(error)
            try:
                coordinator = self.take()
                break
            except adapter.ActorGoneError as another:  # the next one died before it led anything
                error = another
        took_s = time.time() - lost_s
        self._news.append(f"the coordinator was gone; its hold is taken again after {took_s:.1f} s")
        return coordinator

    def _count_return(self, error: adapter.ActorGoneError) -> None:
        """Allow for one more coordinator, or raise that too many have died."""
        now_s = time.time()
        self._returns_s = [time_s for time_s in self._returns_s if now_s - time_s < _RETURNS_WITHIN_S]
        if len(self._returns_s) >= _MOST_RETURNS:
            raise SolventError(
                f"{error}. It has died {_MOST_RETURNS + 1} times within {_RETURNS_WITHIN_S / 60:g} minutes, so another "
                "one would as well. Look for the reason in Ray's log of the actor and the head's memory, then start "
                "the same command again: it resumes."
            ) from error
        self._returns_s.append(now_s)

    def add_news(self, update: Update) -> Update:
        """Put what happened to the coordinator before what it says itself."""
        news, self._news = self._news, []
        return dataclasses.replace(update, lines=[*news, *update.lines])


def look(config: RunConfig) -> Scene | None:
    """Return a run as it is now, for who is connected to its cluster and leads nothing; None if nobody leads it."""
    return _ask(get_coordinator_name(config), "look")


def _find_lost_nodes(name: str) -> Set[str]:
    """Return the nodes that the named coordinator has lost and Ray may still count; runs in Ray Train's controller."""
    return _ask(name, "get_lost_nodes") or frozenset()


def _ask(name: str, method: str) -> Any | None:
    """Return what a method of the named coordinator returns; None if there is no such actor, or not any more."""
    coordinator = adapter.get_coordinator(name)
    try:
        return adapter.call(getattr(coordinator, method)) if coordinator else None
    except SolventError:  # it has just ended
        return None


def find_address() -> str | None:
    """Return the cluster that the environment names (`ray job submit` sets RAY_ADDRESS), if any; its head answers.

    Raises:
        ConfigError: no head answers there, or it is no address of one.
    """
    text = os.environ.get(ADDRESS, "")
    head = parse_address(text)
    if head == "auto":
        text = adapter.find_own_cluster() or ""
        if not text:
            raise ConfigError(
                f"{ADDRESS}=auto, but no Ray cluster runs on this machine. Start one (solvent nodes head), set "
                f"{ADDRESS}=HOST:{PORT}, or unset it to train on this machine alone."
            )
        head = parse_address(text)
    if not isinstance(head, Head):
        return None
    check_head(head, os.environ)
    return text
