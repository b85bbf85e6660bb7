"""One state on its way to where a loss does not reach it."""

import time
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Literal

from elastic.checkpoint.durable.writer import DurableWriter
from elastic.checkpoint.format.manifest import BuildManifest
from elastic.checkpoint.staging.stager import Staged
from elastic.checkpoint.staging.write_plan import SavePlan
from elastic.ports import Progress

Tier = Literal["memory", "storage"]


@dataclass(kw_only=True)
class Flight:
    """A staged state; `bring` is called on a thread of its own, and never raises."""

    tier: Tier
    """How far it goes; what goes to the storage is kept in memory as well."""
    progress: Progress
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

    def bring(self, writer: DurableWriter, keep: "Callable[[Flight], str] | None") -> None:
        """Bring the state to memory and, if it goes so far, to the storage.

        Args:
            keep: hands it to the keeper, and returns what is wrong with that; None if there is none.
        """
        try:
            self.staged.wait_on_host()
            self.kept_s = time.monotonic() - self.start_s
            self.kept.set_result(keep(self) if keep is not None else "no keeper")
            if self.tier == "storage":
                arena, step = self.staged.arena, self.progress.step
                took_s = writer.write(step, arena, self.plan, self.build_manifest, start_s=self.start_s)
                self.committed_s.set_result(took_s)
        except BaseException as error:  # whatever it is, the training thread raises it
            if not self.kept.done():
                self.kept.set_result(f"{type(error).__name__}: {error}")
            self.committed_s.set_exception(error)
