"""Make sure that a run's storage works, has room, and is the same place for all ranks of a new world."""

import threading
from contextlib import suppress

import torch

from elastic.checkpoint.durable.retention import remove_orphans
from elastic.checkpoint.durable.storage_errors import (
    PATIENCE_S,
    check_space,
    estimate_checkpoint_bytes,
    explain,
    keep_trying,
)
from elastic.config import RunConfig
from elastic.errors import StorageError
from elastic.storage import Storage
from elastic.world import World


class StorageCheck:
    """Rank 0 looks and leaves a mark, on a thread of its own while the model is built; then all look for the mark.

    Every change of the world waits for what this takes, a tenth of a second or more.
    """

    def __init__(self, storage: Storage, config: RunConfig, world: World) -> None:
        self._storage, self._config, self._world = storage, config, world
        self._mark = f".world-{world.attempt}"
        self._problem: StorageError | None = None
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None
        if world.rank == 0:
            self._thread = threading.Thread(target=self._prepare, name="storage", daemon=True)
            self._thread.start()

    def __enter__(self) -> "StorageCheck":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        """Leave no mark behind where the world ends before all have looked."""
        if kind is not None and self._thread:
            self._thread.join()
            with suppress(OSError):
                self._storage.delete([self._mark])

    def agree(self) -> None:
        """Return once all ranks have found the storage good; all call it.

        Raises:
            StorageError: it cannot be used, has no room for a checkpoint, or is not shared; on all ranks.
        """
        world, device = self._world, self._world.device
        if self._thread:
            self._thread.join()
            if self._failure:
                raise self._failure
        world.sum_(torch.zeros((), device=device))  # rank 0 is done
        problem = self._problem if world.rank == 0 else self._find_mark()
        num_problems = world.sum_(torch.tensor(float(problem is not None), device=device))
        if num_problems.item():
            where = f"storage={self._config.storage!r}"
            raise problem or StorageError(f"{where} cannot be used; another rank says why.")
        if world.rank == 0:
            self._storage.delete([self._mark])  # all have looked

    def _prepare(self) -> None:
        """Take note of what is wrong, at once for a new run; one that has trained waits for a while."""
        config, attempt = self._config, self._world.attempt

        def look() -> None:
            needed_bytes = estimate_checkpoint_bytes(config.num_trained_params)
            try:
                try:
                    check_space(self._storage, needed_bytes)
                except StorageError:  # a save that was cut short may take it up; to remove it can take a second
                    remove_orphans(self._storage, generation=attempt)
                    check_space(self._storage, needed_bytes)
                self._storage.write(self._mark, [b""])
            except OSError as error:
                raise explain(error, self._storage.url) from error

        patience_s = min(PATIENCE_S, config.fault.collective_timeout_s / 2) if attempt > 1 else 0.0
        try:
            keep_trying(look, patience_s=patience_s)
        except StorageError as error:
            self._problem = error
        except BaseException as error:  # whatever it is, the training thread raises it
            self._failure = error

    def _find_mark(self) -> StorageError | None:
        world = self._world
        try:
            if self._storage.get_size(self._mark) is not None:
                return None
        except OSError as error:
            return explain(error, self._storage.url)
        return StorageError(
            f"storage={self._config.storage!r} is not the same place on all nodes: rank {world.rank} on node "
            f"{world.node} does not see what rank 0 wrote. Set storage to a shared file system."
        )
