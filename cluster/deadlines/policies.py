"""What to hold now: spot machines, on-demand ones, or none. Pure; every policy keeps the deadline.

All of them end on the same rule: as soon as another moment without progress would leave less time than all of the work
takes on on-demand machines, with one restart, the run goes there and stays. Before that they differ in what they risk.

Source: Z. Wu et al., "Can't Be Late: Optimizing Spot Instance Savings under Deadlines", NSDI 2024: the rule (its safety
net), greedy and Uniform Progress. They want all machines or none; `elastic` takes what part there is.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is to be done, and what that costs."""

    nodes: int
    """Machines that are wanted; work goes in proportion to them."""
    work_node_s: float
    """Node-seconds of work."""
    deadline_s: float
    """Seconds from the start."""
    spot_usd_per_hour: float
    on_demand_usd_per_hour: float
    restart_s: float
    """Without progress after each change of what is held."""
    redo_s: float = 0.0
    """Work that a loss without notice takes along, in seconds of all machines that were held."""
    decide_every_s: float = 300.0
    min_nodes: int = 1
    """Fewer make no progress."""

    @property
    def slack(self) -> float:
        """The deadline over the time on on-demand machines alone."""
        return self.deadline_s / (self.work_node_s / self.nodes)


@dataclass(frozen=True, kw_only=True)
class Held:
    """What is paid for."""

    spot: int = 0
    on_demand: int = 0

    @property
    def total(self) -> int:
        """Machines in all."""
        return self.spot + self.on_demand


@dataclass(frozen=True, kw_only=True)
class View:
    """What is known at a moment."""

    now_s: float
    left_node_s: float
    """Work that is left."""
    spot: int
    """Spot machines that can be had, those held among them."""
    held: Held
    since_s: float = 0.0
    """When what is held was taken."""


Policy = Callable[[Job, View], Held]


def must_be_sure(job: Job, view: View) -> bool:
    """Tell whether another moment without progress would be one too many.

    On on-demand machines already the restart is over or under way, and is not paid again.
    """
    all_in_s = view.left_node_s / job.nodes + job.restart_s
    risk_s = job.decide_every_s + job.redo_s
    return job.deadline_s - view.now_s < all_in_s + risk_s


def _be_sure(job: Job) -> Held:
    return Held(on_demand=job.nodes)


def on_demand(job: Job, _view: View) -> Held:
    """Never risk anything."""
    return _be_sure(job)


def greedy(job: Job, view: View) -> Held:
    """Take all spot machines or wait, as long as that is safe."""
    if must_be_sure(job, view) or view.held.on_demand:
        return _be_sure(job)
    return Held(spot=job.nodes) if view.spot >= job.nodes else Held()


def uniform(job: Job, view: View) -> Held:
    """Keep up with a steady pace: on-demand machines when behind it and without spot, until ahead by two restarts."""
    if must_be_sure(job, view):
        return _be_sure(job)
    if view.spot >= job.nodes:
        # from on-demand machines to spot only if these will have paid for the change
        if view.held.on_demand and _ahead_s(job, view) < job.restart_s:
            return _be_sure(job)
        return Held(spot=job.nodes)
    needed = 2 * job.restart_s if view.held.on_demand else 0.0
    return _be_sure(job) if _ahead_s(job, view) < needed else Held()


def _ahead_s(job: Job, view: View) -> float:
    """Return by how many seconds of all machines the work is ahead of a steady pace."""
    done_s = (job.work_node_s - view.left_node_s) / job.nodes
    return done_s - view.now_s * (job.work_node_s / job.nodes) / job.deadline_s


def elastic(job: Job, view: View) -> Held:
    """Take what part of the spot machines there is, as long as that is safe; grow once a change has paid for itself."""
    if must_be_sure(job, view) or view.held.on_demand:
        return _be_sure(job)
    possible = min(view.spot, job.nodes)
    if possible < job.min_nodes:
        return Held()
    if view.held.spot <= view.spot and 0 < view.held.spot < possible:
        gain = (possible / view.held.spot - 1) * job.decide_every_s * 4
        if view.now_s - view.since_s < 5 * job.restart_s or gain < job.restart_s:
            return view.held
    return Held(spot=possible)


def elastic_steady(job: Job, view: View) -> Held:
    """As `elastic`, with on-demand machines beside it while the work is behind a steady pace."""
    if must_be_sure(job, view):
        return _be_sure(job)
    part = elastic(job, replace(view, held=Held(spot=view.held.spot)))
    if _ahead_s(job, view) >= (2 * job.restart_s if view.held.on_demand else -job.restart_s):
        return part
    pace = math.ceil(job.work_node_s / job.deadline_s)
    return Held(spot=part.spot, on_demand=max(0, min(job.nodes, pace + 1) - part.spot))


POLICIES: Mapping[str, Policy] = {
    "on-demand": on_demand,
    "greedy": greedy,
    "uniform": uniform,
    "elastic": elastic,
    "elastic-steady": elastic_steady,
}
