"""Whether a run's storage can be used, and what its errors mean for the user. No torch here."""

import errno
import logging
import secrets
from collections.abc import Callable
from time import monotonic, sleep

from elastic.errors import StorageError
from elastic.storage import Storage, is_url

log = logging.getLogger(__name__)

GIB = 2**30

PATIENCE_S = 30.0
"""How long a run that has trained waits for its storage; a person who cleans a full disk up needs about as long to
notice."""
_RETRY_S = 0.5
_PASSING = {errno.ENOSPC, errno.EDQUOT, errno.EAGAIN, errno.ETIMEDOUT, errno.EIO}
"""What may pass without anybody who mends the command, the mount or the permissions."""

_HINTS = {
    errno.ENOSPC: "Free some space, lower checkpoint.keep_last, or set storage to a larger file system.",
    errno.EDQUOT: "Free some of the quota, lower checkpoint.keep_last, or set storage to another file system.",
    errno.EFBIG: "Raise the limit on file size (ulimit -f), or set storage to another file system.",
    errno.EACCES: "Give this user write permission, or set storage to a directory of its own.",
    errno.EPERM: "Give this user write permission, or set storage to a directory of its own.",
    errno.EEXIST: "A file is in the way: move it, or set storage to another directory.",
    errno.ENOTDIR: "A file is in the way: move it, or set storage to another directory.",
    errno.EROFS: "Mount it writable, or set storage to another directory.",
    errno.ENOENT: "Create the bucket or the mount point, or set storage elsewhere.",
    errno.EAGAIN: "It throttled or failed for a minute: start the same command again once it is well.",
    errno.ETIMEDOUT: "It did not answer for a minute: start the same command again once it can be reached.",
}

_URL_HINTS = {
    errno.EACCES: "Check this machine's credentials (AWS_*, GOOGLE_*, AZURE_*), and what they may do in the bucket.",
    errno.EIO: "Check the bucket's name, the credentials, AWS_ENDPOINT_URL and the network.",
    errno.EINVAL: "Check the bucket's name and region (AWS_REGION) and the credentials.",
}
"""What is different where no file system is mounted."""


def explain(error: OSError, where: str) -> StorageError:
    """Return what an operating system's or object store's error means for the user's `storage`."""
    hint = _get_hint(error, where)
    return StorageError(
        f"storage: {error.filename or where} cannot be written ({error.strerror or error}), so nothing new becomes "
        f"durable; checkpoints committed before are unharmed. {hint}"
    )


def explain_unreadable(error: OSError, where: str) -> StorageError:
    """Return what an error means for a command that only looks."""
    hint = "Check that it is mounted or reachable, and that this user may read it."
    if is_url(where):
        hint = _URL_HINTS.get(error.errno or 0, "Check the URL, and that it can be reached from here.")
    return StorageError(f"storage: {error.filename or where} cannot be read ({error.strerror or error}). {hint}")


def _get_hint(error: OSError, where: str) -> str:
    hints = _HINTS | (_URL_HINTS if is_url(where) else {})
    return hints.get(error.errno or 0, "Check that the storage is mounted and healthy, or set it elsewhere.")


def keep_trying(look: Callable[[], None], *, patience_s: float) -> None:
    """Look at the storage again until it can be used: what is full or does not answer now may be well in a moment.

    Raises:
        StorageError: it could not be used for `patience_s` seconds.
    """
    deadline_s = monotonic() + patience_s
    is_told = False
    while True:
        try:
            return look()
        except StorageError as error:
            cause = error.__cause__
            if monotonic() >= deadline_s or (isinstance(cause, OSError) and cause.errno not in _PASSING):
                raise
            if not is_told:
                log.warning("%s Trying for %.0f s.", error, patience_s)
                is_told = True
        sleep(_RETRY_S)


def check_writable(storage: Storage) -> None:
    """Write a small file and remove it, before anything slow or paid starts.

    Raises:
        StorageError: it cannot be done.
    """
    key = f".probe-{secrets.token_hex(4)}"
    try:
        storage.put_new(key, b"\0")
        storage.delete([key])
    except OSError as error:
        raise explain(error, storage.url) from error


def estimate_checkpoint_bytes(num_parameters: int) -> int:
    """Return the size of one checkpoint: a weight and two Adam moments, 4 bytes each."""
    return num_parameters * (4 + 4 + 4)


def check_space(storage: Storage, num_bytes: int) -> None:
    """Refuse to start a run whose next `num_bytes` of checkpoints do not fit, where the storage can say.

    Raises:
        StorageError: less is free.
    """
    free_bytes = storage.get_free_bytes()
    if free_bytes is not None and free_bytes < num_bytes:
        raise StorageError(
            f"storage: {storage.url} has {free_bytes / GIB:.2f} GiB free, but the checkpoints of this model need "
            f"{num_bytes / GIB:.2f} GiB: the run would fail at a save. {_HINTS[errno.ENOSPC]}"
        )
