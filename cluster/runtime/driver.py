"""The driver, what `solvent train` runs: it finds or starts the coordinator, has Ray Train hold agents, and watches.

It decides nothing about membership. If it is killed, its job's agents die with it; the coordinator keeps the
trainers going for half a lease, so that the same command, given again, finds them at work.
"""

import dataclasses
import hashlib
import os
import secrets
import time
from collections.abc import Callable, Set
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from cluster.runtime import adapter
from cluster.runtime.agent import run_agent
from cluster.runtime.coordinator import DRIVER_BUSY_S, Coordinator, Update
from cluster.types import Scene
from elastic.config import RunConfig
from elastic.errors import SolventError, StorageError

POLL_S = 0.5
_AGENTS_END_S = 30.0
_RAY_TRAIN_RETRIES = 5


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ending:
    """How a driver's watch ended."""

    kind: str
    """finished | interrupted | failed"""
    reason: str
    exit_code: int
    books: dict[str, Any]
    """The final `Books.summary`."""


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
        SolventError: the coordinator died.
    """
    config = with_absolute_paths(config)
    adapter.connect(address, config.cluster)
    try:
        return _lead(config, on_update)
    finally:
        adapter.disconnect()


def with_absolute_paths(config: RunConfig) -> RunConfig:
    """Return the configuration for processes with other working directories."""

    def absolute(path: str) -> str:
        return path if "://" in path or not path else str(Path(path).resolve())

    data = dataclasses.replace(config.data, path=absolute(config.data.path))
    cost = dataclasses.replace(config.cost, price_file=absolute(config.cost.price_file))
    return dataclasses.replace(config, storage=absolute(config.storage), data=data, cost=cost)


def get_coordinator_name(config: RunConfig) -> str:
    """Return the actor's name: one per run directory, so that two drivers of one run meet."""
    digest = hashlib.sha256(f"{config.storage}/{config.run}".encode()).hexdigest()[:8]
    return f"solvent-{config.run}-{digest}"


def _lead(config: RunConfig, on_update: Callable[[Update], None]) -> Ending:
    name = get_coordinator_name(config)
    driver = secrets.token_hex(8)
    coordinator = _attach(name, driver, config)
    start_agents = partial(
        *(adapter.AgentRun, run_agent, {"coordinator_name": name}, config), find_lost=partial(_find_lost_nodes, name)
    )
    agents = start_agents()
    retries = 0
    stopping = False
    while True:
        try:
            update: Update | None = adapter.call(coordinator.poll, driver)
            if update is None:
                raise StorageError(
                    f"run={config.run!r} is led by another driver now, so this one stops. Look at the other one's "
                    "output, or train under another run name."
                )
            on_update(update)
            if update.done:
                break
            if agents.is_over:  # Ray Train gave up; trainers go on, so only the agents are started again
                retries += 1
                if retries > _RAY_TRAIN_RETRIES:
                    raise SolventError(f"Ray Train ended {retries} times; the last time: {agents.error}")
                agents = start_agents()
            time.sleep(POLL_S)
        except KeyboardInterrupt:
            if stopping:
                raise
            stopping = True
            adapter.call(coordinator.stop, "interrupted from the keyboard")
    books, done = update.books, update.done
    reason = done["reason"]
    try:
        books = adapter.call(coordinator.close)
    except SolventError as error:
        if done["kind"] != "failed":  # one that failed on its storage cannot close its books there either
            reason = f"{reason}; {error}"
    agents.wait(_AGENTS_END_S)
    adapter.kill(coordinator)
    return Ending(kind=done["kind"], reason=reason, exit_code=done["exit_code"], books=books)


def _attach(name: str, driver: str, config: RunConfig) -> Any:
    """Return the run's coordinator, led by this driver from now on; create it if there is none.

    Raises:
        StorageError: a living driver leads this run, on this cluster or elsewhere.
    """
    fields = asdict(config)
    # A killed driver is known as such after a while; a run under another configuration saves, then makes room.
    patience_s = {"busy": DRIVER_BUSY_S + POLL_S, "changed": config.fault.lease_s}
    start_s = time.monotonic()
    while True:
        coordinator = adapter.get_coordinator(name)
        if coordinator is None:
            coordinator = adapter.create_coordinator(name, Coordinator, config=fields)
        try:
            answer = adapter.call(coordinator.attach, driver, fields)
        except StorageError:  # another cluster, or none, has the run: this coordinator has touched nothing
            adapter.kill(coordinator)
            raise
        if answer == "ok":
            return coordinator
        if time.monotonic() - start_s > patience_s[answer]:
            raise StorageError(
                f"run={config.run!r} is being trained by another driver (process or job) right now. Wait for it, stop "
                "it, or train under another run name."
            )
        if answer == "changed" and adapter.call(coordinator.is_over):
            adapter.call(coordinator.close)
            adapter.kill(coordinator)
        time.sleep(POLL_S)


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


def get_address() -> str | None:
    """Return the cluster that the environment names (`ray job submit` sets RAY_ADDRESS), if any."""
    return os.environ.get("RAY_ADDRESS") or None
