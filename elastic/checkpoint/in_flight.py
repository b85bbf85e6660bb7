"""States on their way to where a loss does not reach them."""

import threading
import time
from collections.abc import Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from functools import partial

from elastic.checkpoint.consensus import Job
from elastic.checkpoint.durable.writer import DurableWriter
from elastic.checkpoint.format.manifest import BuildManifest
from elastic.checkpoint.replicas.inventory import Snapshot
from elastic.checkpoint.schedule import Tier
from elastic.checkpoint.staging.stager import Staged
from elastic.checkpoint.staging.write_plan import SavePlan
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.ports import Progress


@dataclass(kw_only=True)
class InFlightSave:
    """A staged state; `start` brings it to memory and, if it goes so far, to the storage."""

    tier: Tier
    progress: Progress
    snapshot: Snapshot
    """This rank's part of it."""
    start_s: float
    stall_s: float = 0.0
    """What the training thread lost: the call that started it, and what the update had to wait for."""
    is_first_touch: bool
    """Memory for it is found as it is filled."""
    staged: Staged
    plan: SavePlan
    follows: bool
    """Copies on other nodes follow."""
    build_manifest: BuildManifest
    kept: Future[str] = field(default_factory=Future[str])
    """Once it is in this node's memory: what went wrong with that, or nothing."""
    kept_s: float = 0.0
    """Seconds from the start until then."""
    is_counted: bool = False
    """All ranks know that it is kept, or not."""
    committed_s: Future[float] = field(default_factory=Future[float])
    """Seconds from start to commit, as rank 0 measured them; or why there was no commit."""

    def start(self, *, memory: Memory | None, writer: DurableWriter) -> None:
        """Bring it on its way, on a thread of its own, which never raises."""
        # a daemon: a thread that waits for a frozen peer must not keep the process from leaving
        bring = partial(self._bring, memory, writer)
        threading.Thread(target=bring, name=f"save-{self.tier}", daemon=True).start()

    def _bring(self, memory: Memory | None, writer: DurableWriter) -> None:
        try:
            self.staged.wait_on_host()
            self.kept_s = time.monotonic() - self.start_s
            self.kept.set_result(self._keep(memory) if memory else "no replica server")
            if self.tier == "storage":
                step, buffer = self.progress.step, self.staged.buffer
                took_s = writer.write(step, buffer, self.plan, self.build_manifest, start_s=self.start_s)
                self.committed_s.set_result(took_s)
        except BaseException as error:  # whatever it is, the training thread raises it
            if not self.kept.done():
                self.kept.set_result(f"{type(error).__name__}: {error}")
            self.committed_s.set_exception(error)

    def _keep(self, memory: Memory) -> str:
        """Hand it to the replica server; return what is wrong with that."""
        manifest = self.build_manifest(self.plan.get_shapes(), {})
        return memory.fill(self.staged.index, self.snapshot, self.plan, manifest)


class InFlightSaves:
    """The saves of one rank that are under way, at most one of each tier: the same on all ranks."""

    def __init__(self) -> None:
        self._by_tier: dict[Tier, InFlightSave] = {}
        self._voted_on: frozenset[Tier] = frozenset()
        self.on_device: Tier | None = None
        """The save that may still be on the device of some rank: there is no room for another one beside it."""

    def __contains__(self, tier: Tier) -> bool:
        return tier in self._by_tier

    def __iter__(self) -> Iterator[InFlightSave]:
        return iter(list(self._by_tier.values()))

    def __bool__(self) -> bool:
        return bool(self._by_tier)

    def __getitem__(self, tier: Tier) -> InFlightSave:
        return self._by_tier[tier]

    def get(self, tier: Tier) -> InFlightSave | None:
        """Return the save of a tier, if there is one."""
        return self._by_tier.get(tier)

    def add(self, save: InFlightSave, *, has_device: bool) -> None:
        """Take a save that was begun.

        Args:
            has_device: it is on a device from which it must leave.
        """
        self._by_tier[save.tier] = save
        self.on_device = save.tier if has_device else None

    def remove(self, tier: Tier) -> None:
        """Take out a save that is over on all ranks."""
        del self._by_tier[tier]
        if self.on_device == tier:
            self.on_device = None

    def clear(self) -> None:
        """Return when nothing is written to any buffer any more, and forget all saves."""
        for save in self:
            save.staged.give_up()
        self._by_tier.clear()

    # ---- what is voted on

    def begin_vote(self) -> None:
        """Remember which saves the vote that is opened now is about."""
        self._voted_on = frozenset(self._by_tier)

    def get_voted(self, tier: Tier) -> InFlightSave | None:
        """Return the save of a tier if the last vote was about it."""
        return self._by_tier.get(tier) if tier in self._voted_on else None

    def take_left_device(self) -> None:
        """Take that all saves that were voted on have left all devices."""
        if self.on_device in self._voted_on:
            self.on_device = None

    def get_job(self, tier: Tier) -> Job:
        """Return how this rank's part of a save gets to memory."""
        if (save := self._by_tier.get(tier)) is None:
            return Job()
        return Job(is_over=save.kept.done(), is_done=save.kept.done() and not save.kept.result())

    @property
    def is_written(self) -> bool:
        """What goes to the storage is there, or failed."""
        save = self._by_tier.get("storage")
        return save is None or save.committed_s.done()

    @property
    def has_left_device(self) -> bool:
        """No save is on this rank's device any more."""
        return all(save.staged.has_left for save in self)
