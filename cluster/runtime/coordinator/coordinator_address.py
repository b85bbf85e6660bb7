"""Where a run's coordinator is found. Hosts know no Ray, so they cannot look it up by its name and are told."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class CoordinatorAddress:
    """The address of one coordinator."""

    generation: int
    """The first that this coordinator took: one that follows it has a higher."""
    host: str
    port: int
