"""What the coordinator's other threads tell the one that serves: facts to take in, and ends of jobs it gave away."""

from dataclasses import dataclass
from typing import Any

from cluster.node_watch import News
from cluster.runtime.coordinator.nodes.node_records import RayView, Start
from cluster.runtime.coordinator.records.run_records import Inherited
from cluster.runtime.messages import CoordinatorMessage
from cluster.types import Event


@dataclass(frozen=True, kw_only=True)
class WatchTold:
    """The watch of a node has learned something from its provider."""

    node: str
    news: News


@dataclass(frozen=True, kw_only=True)
class StartSubmitted:
    """Ray has the start of a host in hand."""

    node: str
    start: Start


@dataclass(frozen=True, kw_only=True)
class WatchCreated:
    """A node has a watch from now on."""

    node: str
    actor: Any


@dataclass(frozen=True, kw_only=True)
class DrainAsked:
    """Ray was asked to drain a node that was given up."""

    node: str
    reason: str
    problem: str
    """Why it does not; empty if it does."""


@dataclass(frozen=True, kw_only=True)
class GenerationGiven:
    """The storage has given us a generation: the trainers of the world before are out of it."""

    attempt: int
    inherited: Inherited | None
    """What the coordinator before this one left, if that was not recorded yet."""


@dataclass(frozen=True, kw_only=True)
class Tell:
    """A host is to be told something."""

    node: str
    message: CoordinatorMessage


NodeEvent = RayView | WatchTold | StartSubmitted | WatchCreated | DrainAsked
InboxEvent = Event | NodeEvent | GenerationGiven | Tell
