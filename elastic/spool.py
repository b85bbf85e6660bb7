"""A run's directory, wherever its storage is: rows are appended to local files, which an object store cannot do.

For a path they are the run's files themselves. For a URL they lie in a spool, a local directory of this process, and
whole files go to the storage: every few seconds, when the run is closed, and before each commit of a checkpoint, so
that no row up to a committed step is ever lost. What the run wrote before is fetched first.
"""

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from elastic.errors import StaleEpochError, StorageError
from elastic.rundir import RunDir
from elastic.storage import Storage, is_url, join_url, open_storage

logger = logging.getLogger(__name__)

PUSH_EVERY_S = 5.0
_NAME = "solvent-spool-"


class OpenRun:
    """A run's storage, and its directory for rows; made by `open_run`."""

    def __init__(self, storage: Storage, run_dir: RunDir) -> None:
        self.storage = storage
        self.dir = run_dir

    def fence(self, check: Callable[[], None]) -> None:
        """Let nothing leave this process once `check` raises a StaleEpochError."""

    def push(self) -> None:
        """Return when all rows so far are in the storage.

        Raises:
            StaleEpochError: the run goes on elsewhere.
            OSError: the storage does not work.
        """


class SpooledRun(OpenRun):
    """A run in an object store."""

    def __init__(self, storage: Storage, spool: Path) -> None:
        super().__init__(storage, RunDir(spool))
        self._pushed: dict[str, tuple[int, int]] = {}
        self._check: Callable[[], None] = lambda: None
        self._lock = threading.Lock()

    def fetch(self) -> None:
        """Bring the rows of earlier attempts here; samples stay where they are, nobody writes on.

        Raises:
            OSError: the storage does not work.
        """
        run = self.dir
        for path in (run.metrics, run.attempts, run.incidents, run.ledger, run.bad_steps, run.config):
            with suppress(FileNotFoundError):
                path.write_bytes(self.storage.read(path.name))
                self._pushed[path.name] = _get_signature(path)

    def fence(self, check: Callable[[], None]) -> None:
        """See `OpenRun`."""
        self._check = check

    def push(self) -> None:
        """Write each file that has changed."""
        with self._lock:
            changed: dict[str, Path] = {}
            for path in sorted(self.dir.root.rglob("*")):
                key = path.relative_to(self.dir.root).as_posix()
                if path.is_file() and not path.is_symlink() and self._pushed.get(key) != _get_signature(path):
                    changed[key] = path
            if changed:
                self._check()
            for key, path in changed.items():
                signature = _get_signature(path)
                self.storage.write(key, [path.read_bytes()])
                self._pushed[key] = signature

    def push_until(self, closing: threading.Event) -> None:
        """Push every few seconds; what does not work now may work the next time."""
        while not closing.wait(PUSH_EVERY_S):
            try:
                self.push()
            except OSError as error:
                logger.warning("rows wait in %s: %s", self.dir.root, error)
            except StaleEpochError:
                return


@contextmanager
def open_run(storage: str, run: str) -> Generator[OpenRun]:
    """Open a run by its configuration's `storage` and `run`.

    Raises:
        StorageError: the storage does not work, or did not when the last rows should have gone there.
    """
    url = join_url(storage, run)
    if not is_url(url):
        yield OpenRun(open_storage(url), RunDir(Path(url)))
        return
    _remove_dead_spools()
    spool = Path(tempfile.mkdtemp(prefix=f"{_NAME}{os.getpid()}-"))
    closing = threading.Event()
    opened = SpooledRun(open_storage(url), spool)
    try:
        opened.fetch()
    except OSError as error:
        raise StorageError(
            f"storage: {error.filename or url} cannot be read ({error.strerror or error}), so nobody knows how far the "
            "run is. Check the bucket, AWS_ENDPOINT_URL and the credentials, then start the same command again."
        ) from error
    thread = threading.Thread(target=opened.push_until, args=(closing,), name="spool", daemon=True)
    thread.start()
    try:
        yield opened
    finally:
        closing.set()
        thread.join()
        with suppress(StaleEpochError):  # the files are another one's now
            _push_last(opened, url)
        shutil.rmtree(spool, ignore_errors=True)


def _push_last(opened: SpooledRun, url: str) -> None:
    try:
        opened.push()
    except OSError as error:
        raise StorageError(
            f"storage: the last rows of {url} cannot be written ({error.strerror or error}); committed checkpoints are "
            "unharmed. Start the same command again once the storage works: it resumes."
        ) from error


def _get_signature(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns


def _remove_dead_spools() -> None:
    """Remove what processes that were killed have left on this machine."""
    for path in Path(tempfile.gettempdir()).glob(f"{_NAME}*"):
        pid = path.name.removeprefix(_NAME).partition("-")[0]
        if pid.isdecimal() and not Path("/proc", pid).exists():
            shutil.rmtree(path, ignore_errors=True)
