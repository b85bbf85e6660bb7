"""A run that began with another model's weights never begins anew with random ones. No torch here."""

from collections.abc import Sequence

from elastic.checkpoint.format.manifest import CommittedCheckpoint, list_committed
from elastic.errors import StorageError
from elastic.records.rundir import ORIGIN
from elastic.storage import Storage


def check_first_weights(storage: Storage, committed: Sequence[CommittedCheckpoint] | None = None) -> None:
    """Refuse a run that was imported and has no checkpoint left: it would train from random weights, and not say so.

    Args:
        committed: the checkpoints that it has, if they were listed.

    Raises:
        StorageError: it is one.
        OSError: the storage does not work.
    """
    if committed or storage.get_size(f"{ORIGIN}/config.json") is None:
        return
    if committed is not None or not list_committed(storage):
        raise StorageError(
            f"{storage.url} was imported from a Hugging Face folder, but has no finished checkpoint any more, not even "
            "of step 0, so it would begin from random weights. Import it again (solvent checkpoint import), or train "
            "under another run name to begin from scratch."
        )
