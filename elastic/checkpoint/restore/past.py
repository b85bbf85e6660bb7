"""What a run's storage says of it before it is started again, asked for once and for all who want to know. No torch."""

from collections.abc import Sequence
from dataclasses import dataclass

from elastic.checkpoint.durable.storage_errors import explain_unreadable
from elastic.checkpoint.format.compat import check_config
from elastic.checkpoint.format.manifest import CommittedCheckpoint, list_committed, read_manifest
from elastic.config import RunConfig
from elastic.storage import Storage, join_url, open_storage


@dataclass(frozen=True, kw_only=True)
class Past:
    """The checkpoints that a run has, or why nobody can say."""

    storage: Storage
    committed: Sequence[CommittedCheckpoint]
    """Oldest first."""
    error: OSError | None = None
    """The storage was asked, and did not answer."""

    @property
    def step(self) -> int:
        """Return the newest checkpoint's step; 0 if there is none."""
        return self.committed[-1].step if self.committed else 0


def look_back(config: RunConfig) -> Past:
    """List what a run has.

    Raises:
        StorageError: no such storage can be opened.
    """
    storage = open_storage(join_url(config.storage, config.run))
    try:
        return Past(storage=storage, committed=list_committed(storage))
    except OSError as error:
        return Past(storage=storage, committed=(), error=error)


def describe_finished(config: RunConfig, past: Past) -> str:
    """Return that all steps are done and what to do; empty if there is something left to train.

    Raises:
        ConfigError: it is another run that the configuration describes, so that it says nothing about this one's steps.
        CheckpointError: another version of Solvent wrote its checkpoints.
        StorageError: the storage does not work.
    """
    if past.step < config.train.steps:
        return ""
    try:
        check_config(config, read_manifest(past.storage, past.committed[-1]))
    except OSError as error:
        raise explain_unreadable(error, past.storage.url) from error
    return (
        f"all steps done: {past.storage.url} is at step {past.step}, and train.steps={config.train.steps}, so nothing "
        "is started. Set train.steps to more to go on, or run=<new name> to begin anew"
    )
