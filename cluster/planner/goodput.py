"""What losses, recoveries and saves leave of the time. Pure.

A loss is recovered from the newest snapshot in the memory of a node that lives; from the newest durable checkpoint only
if all copies went with it. After it the world grows again, which is another outage. With notice nothing is redone.

Source: Young 1974 and Daly 2006, as `cluster/hazard.py` and `elastic/checkpoint/interval.py`, once per tier.
"""

from dataclasses import dataclass

from cluster.catalog.offers import Offer
from cluster.hazard import predict_goodput
from elastic.checkpoint.interval import get_best_interval_s
from elastic.config import RunConfig

_OUTAGE_S = 3.0
"""From the last step of one world to the first of the next. Measured on two H200, 1.5 B: 2.2 to 3.8 s."""
_PEER_BYTES_PER_S = 2.0 * 2**30
"""At which a rank gets its shard from another machine's memory. Measured: 4.1 s for half of 16.75 GiB."""
_STORAGE_BYTES_PER_S = 0.5 * 2**30
"""At which a rank reads a checkpoint; an estimate, of the order of what one disk wrote (0.56 GiB/s)."""
_DURABLE_STALL_S = 0.5
"""For how long a durable save holds training up; an estimate: the worst step around one took 1.09 times as long. Never
for more than a step."""
_DURABLE_S = 1.0
"""How long the smallest takes; the next one does not begin before it has ended."""
_SNAPSHOT_EVERY_S = 3.0
"""As `elastic/checkpoint/schedule.py` plans them where they cost next to nothing."""
_BOTH_LOST = 0.14
"""Of losses, those that take both copies with them. Source: counted in the trace of AWS p3 in uclasystem/bamboo."""
_ENOUGH_NOTICE_S = 10.0
"""To leave with nothing lost."""
_REPLACED_AFTER_S = 300.0
"""Until a lost machine has another one in its place; an estimate."""


@dataclass(frozen=True, kw_only=True)
class Goodput:
    """What is left, and why."""

    share: float
    """Of the time of the machines that are there."""
    availability: float
    """Of the machines that are wanted, those that are there on average."""
    losses_per_hour: float
    """Of all machines together."""
    interval_s: float
    """Between durable checkpoints."""
    outage_s: float


def estimate_goodput(
    config: RunConfig,
    offer: Offer,
    *,
    nodes: int,
    step_s: float,
    shard_bytes: float,
    losses_per_hour: float | None = None,
    measured_outage_s: float | None = None,
) -> Goodput:
    """Return what an offer's losses leave of the time of so many machines.

    Args:
        shard_bytes: of the state, on one rank.
        losses_per_hour: of one machine, where it was observed.
        measured_outage_s: from step to step, where that was.
    """
    per_node = offer.losses_per_hour if losses_per_hour is None else losses_per_hour
    per_second = max(per_node * nodes / 3600, 1e-12)
    between_s = 1 / per_second
    from_peer_s = shard_bytes / _PEER_BYTES_PER_S
    outage_s = _OUTAGE_S + from_peer_s if measured_outage_s is None else measured_outage_s
    reload_s = max(0.0, outage_s - from_peer_s) + shard_bytes / _STORAGE_BYTES_PER_S
    match config.checkpoint.memory:
        case "peer" if nodes > 1:
            to_storage = _BOTH_LOST
        case _:
            to_storage = 1.0  # a machine that goes takes its memory along
    stall_s = min(_DURABLE_STALL_S, step_s)
    interval_s = config.checkpoint.every_steps * step_s
    if not interval_s:
        best_s = get_best_interval_s(cost_s=stall_s, mean_s_between_losses=between_s / to_storage)
        interval_s = max(step_s, min(best_s, config.checkpoint.longest_s))
    interval_s = max(interval_s, _DURABLE_S + shard_bytes / _STORAGE_BYTES_PER_S)
    durable = predict_goodput(
        save_s=stall_s,
        interval_s=interval_s,
        between_losses_s=between_s / to_storage,
        between_outages_s=between_s / to_storage,
        outage_s=reload_s,
    )
    is_told = offer.kind in ("spot", "bid") and (offer.notice_s or 0.0) >= _ENOUGH_NOTICE_S
    if is_told:
        durable = predict_goodput(
            save_s=stall_s,
            interval_s=interval_s,
            between_losses_s=float("inf"),
            between_outages_s=between_s / to_storage,
            outage_s=outage_s,
        )
    snapshot_s = max(step_s, config.checkpoint.memory_every_steps * step_s, _SNAPSHOT_EVERY_S)
    in_memory = predict_goodput(
        save_s=0.0,
        interval_s=snapshot_s,
        between_losses_s=float("inf") if is_told else between_s / max(1 - to_storage, 1e-9),
        between_outages_s=between_s / (2 - to_storage),  # the world shrinks, and grows again
        outage_s=outage_s,
    )
    availability = 1 / (1 + per_node * _REPLACED_AFTER_S / 3600)
    return Goodput(
        share=max(0.0, durable + in_memory - 1),
        availability=availability,
        losses_per_hour=per_node * nodes,
        interval_s=interval_s,
        outage_s=outage_s,
    )
