"""Whether a run's storage can be used, and what its errors mean for the user. No torch here."""

import errno
import secrets

from elastic.errors import StorageError
from elastic.storage import Storage

GIB = 2**30

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


def explain(error: OSError, where: str) -> StorageError:
    """Return what an operating system's or object store's error means for the user's `storage`."""
    hint = _HINTS.get(error.errno or 0, "Check that the storage is mounted and healthy, or set it elsewhere.")
    return StorageError(
        f"storage: {error.filename or where} cannot be written ({error.strerror or error}), so nothing new becomes "
        f"durable; checkpoints committed before are unharmed. {hint}"
    )


def explain_unreadable(error: OSError, where: str) -> StorageError:
    """Return what an error means for who only looks."""
    return StorageError(
        f"storage: {error.filename or where} cannot be read ({error.strerror or error}). Check that it is mounted or "
        "reachable, and that this user may read it."
    )


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
