"""A run that began with another model's weights never begins anew with random ones. No torch here."""

from elastic.checkpoint.format.manifest import list_committed
from elastic.errors import StorageError
from elastic.records.rundir import ORIGIN
from elastic.storage import Storage


def check_first_weights(storage: Storage) -> None:
    """Refuse a run that was imported and has no checkpoint left: it would train from random weights, and not say so.

    Raises:
        StorageError: it is one.
        OSError: the storage does not work.
    """
    if storage.get_size(f"{ORIGIN}/config.json") is not None and not list_committed(storage):
        raise StorageError(
            f"{storage.url} was imported from a Hugging Face folder, but has no finished checkpoint any more, not even "
            "of step 0, so it would begin from random weights. Import it again (solvent checkpoint import), or train "
            "under another run name to begin from scratch."
        )
