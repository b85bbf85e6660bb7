"""One state on its way to where a loss does not reach it."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from elastic.checkpoint.durable import BuildManifest, DurableWriter
from elastic.checkpoint.plan import SavePlan
from elastic.checkpoint.stage import Staged
from elastic.ports import Address, Progress

Tier = Literal["memory", "storage"]


@dataclass(kw_only=True)
class Flight:
    """A staged state; `bring` is called on a thread of its own, and never raises."""

    tier: Tier
    """How far it goes; what goes to the storage is kept in memory as well."""
    progress: Progress
    start_s: float
    stall_s: float = 0.0
    """What the call that started it cost the training thread."""
    staged: Staged
    peer: Address | None
    """The keeper that gets a copy of it."""
    plan: SavePlan
    build_manifest: BuildManifest
    kept: Future[str] = field(default_factory=Future[str])
    """Once it is in memory, and copied: what went wrong with that, or nothing."""
    kept_s: float = 0.0
    """Seconds from the start until then."""
    committed_s: Future[float] = field(default_factory=Future[float])
    """Seconds from start to commit, as rank 0 measured them; or why there was no commit."""

    def bring(self, writer: DurableWriter, keep: "Callable[[Flight], Future[str]] | None") -> None:
        """Bring the state to memory and, if it goes so far, to the storage.

        Args:
            keep: hands it to the keeper; None if there is none.
        """
        try:
            self.staged.wait_on_host()
            if keep is not None:
                keep(self).add_done_callback(self._take_kept)
            if self.tier == "storage":
                arena, step = self.staged.arena, self.progress.step
                took_s = writer.write(step, arena, self.plan, self.build_manifest, start_s=self.start_s)
                self.committed_s.set_result(took_s)
        except BaseException as error:  # whatever it is, the training thread raises it
            if self.tier == "memory":
                self.kept.set_result(f"{type(error).__name__}: {error}")
            self.committed_s.set_exception(error)

    def _take_kept(self, answer: Future[str]) -> None:
        self.kept_s = time.monotonic() - self.start_s
        problem = answer.exception()
        self.kept.set_result(str(problem) if problem else answer.result())
