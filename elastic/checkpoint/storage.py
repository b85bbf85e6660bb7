"""Files that survive a power cut, on storage that may be full, read-only or gone. No torch here."""

import errno
import os
import shutil
from pathlib import Path
from tempfile import TemporaryFile

from elastic.errors import StorageError
from elastic.rundir import RunDir

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
}


def explain(error: OSError, path: Path) -> StorageError:
    """Return what an operating system's error on `path` means for the user's `storage`."""
    hint = _HINTS.get(error.errno or 0, "Check that the file system is mounted and healthy, or set storage elsewhere.")
    return StorageError(
        f"storage: {error.filename or path} cannot be written ({error.strerror or error}), so nothing new becomes "
        f"durable; checkpoints committed before are unharmed. {hint}"
    )


def check_writable(run_dir: RunDir) -> None:
    """Create the run's directories and write a byte there, before anything slow or paid starts.

    Raises:
        StorageError: it cannot be done.
    """
    try:
        run_dir.checkpoints.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=run_dir.checkpoints, buffering=0) as probe:
            probe.write(b"\0")
    except OSError as error:
        raise explain(error, run_dir.checkpoints) from error


def estimate_checkpoint_bytes(num_parameters: int) -> int:
    """Return the size of one checkpoint: a weight and two Adam moments, 4 bytes each."""
    return num_parameters * (4 + 4 + 4)


def check_space(run_dir: RunDir, num_bytes: int) -> None:
    """Refuse to start a run whose next `num_bytes` of checkpoints do not fit; the directory must exist.

    Raises:
        StorageError: less is free.
    """
    free_bytes = shutil.disk_usage(run_dir.root).free
    if free_bytes < num_bytes:
        raise StorageError(
            f"storage: {run_dir.root} has {free_bytes / GIB:.2f} GiB free, but the checkpoints of this model need "
            f"{num_bytes / GIB:.2f} GiB: the run would fail at a save. {_HINTS[errno.ENOSPC]}"
        )


def sync_directory(path: Path) -> None:
    """Make the names in a directory durable."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, data: bytes) -> None:
    """Let `path` appear with all of `data`, durable, or not at all (temporary file, fsync, rename, fsync)."""
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
    sync_directory(path.parent)
