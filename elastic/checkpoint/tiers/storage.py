"""What the storage holds of one world's states, and how many saves in a row it has refused."""

import logging
from collections.abc import Callable
from concurrent.futures import Future

from elastic.errors import SavesFailedError, StaleGenerationError, StorageError
from elastic.ports import Progress

logger = logging.getLogger(__name__)


class StorageTier:
    """The same on all ranks.

    Args:
        rank: of this process; rank 0 speaks for all.
        max_failed: saves in a row that may fail.
        on_committed: called by rank 0 for each state that became visible.
    """

    def __init__(self, *, rank: int, max_failed: int, on_committed: Callable[[Progress], None]) -> None:
        self._rank, self._max_failed, self._on_committed = rank, max_failed, on_committed
        self.committed: Progress | None = None
        """The newest state."""
        self.commit_s: list[float] = []
        """What it took from its begin until each was committed."""
        self.num_failed = 0
        """Saves in a row."""

    def settle(self, progress: Progress, committed_s: "Future[float]") -> bool:
        """Take how a save has ended, which is the same for all ranks; return whether it is committed.

        Raises:
            SavesFailedError: too many saves in a row have failed.
            StaleGenerationError, CheckpointError: this one failed, and the next one would.
        """
        try:
            self.commit_s.append(committed_s.result())
        except StaleGenerationError:
            raise
        except StorageError as error:
            self._go_on_without(progress, error)
            return False
        self.num_failed = 0
        self.committed = progress
        if self._rank == 0:
            self._on_committed(progress)
        return True

    def _go_on_without(self, progress: Progress, error: StorageError) -> None:
        """Say that a save failed; a disk may be full for a while, but training for nothing must end."""
        self.num_failed += 1
        most = self._max_failed
        if self.num_failed >= most:
            raise SavesFailedError(
                f"the last {most} saves failed (checkpoint.max_failed_saves={most}), so training on would only be "
                f"lost; the run ends at step {progress.step}, resumable from its newest checkpoint. {error}"
            ) from error
        if self._rank == 0:
            logger.warning(
                "the save of step %d failed, training goes on (%d in a row; the run ends after %d): %s",
                *(progress.step, self.num_failed, most, error),
            )
