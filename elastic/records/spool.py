"""A run's directory, wherever its storage is: rows are appended to local files, which an object store cannot do.

For a path they are the run's files themselves. For a URL they lie in a spool, a local directory of this process, and
whole files go to the storage: every few seconds, when the run is closed, and before each commit of a checkpoint, so
that no row up to a committed step is ever lost. What the run wrote before is fetched first; what a leader that was
killed on this machine could not push any more is taken over by the next one.
"""

import logging
import tempfile
import threading
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

from elastic.errors import StaleGenerationError, StorageError
from elastic.ports import MetricSink
from elastic.records.fencing import FencedSink, GenerationGuard
from elastic.records.orphaned_spools import SpoolFolder, create_spool, take_over
from elastic.records.rundir import RunDir, append_row
from elastic.storage import Storage, is_url, join_url, open_storage

logger = logging.getLogger(__name__)

PUSH_EVERY_S = 5.0
_PAUSE_PER_PUSH = 10
"""Whole files are written, and those of a long run are long: a tenth of the time at most goes into that."""


class OpenRun:
    """A run's storage, and its directory for rows; made by `open_run`."""

    def __init__(self, storage: Storage, run_dir: RunDir) -> None:
        self.storage = storage
        self.dir = run_dir

    def append(self, path: Path, row: Mapping[str, object]) -> None:
        """Append a row to one of the files of `dir`.

        Raises:
            StorageError: the storage is full, read-only or gone.
        """
        append_row(path, row)

    def fence(self, sink: MetricSink, guard: GenerationGuard) -> MetricSink:
        """Return a sink of this process that takes no row of a generation that is over."""
        return FencedSink(sink, guard)

    def lead(self, check: Callable[[], None], *, generation: int) -> None:
        """Be the one who writes this run's rows, as taker of `generation`: what others have written is here after this.

        Args:
            check: nothing leaves this process once it raises a StaleGenerationError.

        Raises:
            StorageError: the storage does not work.
        """

    def push(self) -> None:
        """Return when all rows so far are in the storage.

        Raises:
            StaleGenerationError: the run goes on elsewhere.
            OSError: the storage does not work.
        """

    def count_unpushed(self) -> dict[str, int]:
        """Return how many rows of each file are here and not in the storage."""
        return {}


class SpooledRun(OpenRun):
    """A run in an object store, and a local folder for what is to go there."""

    def __init__(self, storage: Storage, folder: Path) -> None:
        super().__init__(storage, RunDir(folder))
        self._pushed: dict[str, tuple[int, int]] = {}
        self._check: Callable[[], None] = lambda: None
        self._lock = threading.Lock()

    def push(self) -> None:
        """Write each file that has changed."""
        with self._lock:
            changed: dict[str, Path] = {}
            for path in sorted(self.dir.root.rglob("*")):
                key = path.relative_to(self.dir.root).as_posix()
                is_ours = path.is_file() and not path.is_symlink() and not key.startswith(".")
                if is_ours and self._pushed.get(key) != _get_signature(path):
                    changed[key] = path
            if changed:
                self._check()
            for key, path in changed.items():
                signature = _get_signature(path)
                self.storage.write(key, [path.read_bytes()])
                self._pushed[key] = signature

    def count_unpushed(self) -> dict[str, int]:
        """Return how many rows of each file are here and not in the storage."""
        unpushed: dict[str, int] = {}
        for path in sorted(self.dir.root.glob("*.jsonl")):
            pushed_bytes, _ = self._pushed.get(path.name, (0, 0))
            with path.open("rb") as file:
                file.seek(pushed_bytes)
                if num_rows := file.read().count(b"\n"):
                    unpushed[path.name] = num_rows
        return unpushed


class KeptRun(SpooledRun):
    """A run whose row files are kept here: all rows so far are in its spool."""

    def __init__(self, storage: Storage, spool: SpoolFolder) -> None:
        super().__init__(storage, spool.path)
        self._spool = spool

    def fetch(self) -> None:
        """Bring the rows of earlier attempts here; samples stay where they are, nobody writes on.

        Raises:
            StorageError: the storage does not work.
        """
        with self._lock, _explain_unreadable(self.storage.url):
            for path in fetch_rows(self.storage, self.dir):
                self._pushed[path.relative_to(self.dir.root).as_posix()] = _get_signature(path)

    def lead(self, check: Callable[[], None], *, generation: int) -> None:
        """See `OpenRun`: the last leader may have pushed since we looked, or have left rows on this machine."""
        self._check = check
        self.fetch()
        with self._lock, _explain_unreadable(self.storage.url):
            take_over(self.storage, self.dir.root)
            self._spool.note_generation(self.storage, generation)

    def push_until(self, closing: threading.Event) -> None:
        """Push every few seconds, less often if that takes long; what does not work now may work the next time."""
        pause_s = PUSH_EVERY_S
        while not closing.wait(pause_s):
            start_s = time.monotonic()
            try:
                self.push()
            except OSError as error:
                logger.warning("rows wait in %s: %s", self.dir.root, error)
            except StaleGenerationError:
                return
            except Exception:  # a thread that ended here would leave all rows for the end, and nobody would know
                logger.exception("rows wait in %s", self.dir.root)
            pause_s = max(PUSH_EVERY_S, _PAUSE_PER_PUSH * (time.monotonic() - start_s))


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
    spool, closing, is_needed = create_spool(url), threading.Event(), False
    try:
        opened = KeptRun(open_storage(url), spool)
        opened.fetch()
        is_needed = True
        thread = threading.Thread(target=opened.push_until, args=(closing,), name="spool", daemon=True)
        thread.start()
        try:
            yield opened
        finally:
            closing.set()
            thread.join()
            with suppress(StaleGenerationError):  # the files are another one's now
                _push_last(opened, url)
            is_needed = False
    finally:
        spool.release(remove=not is_needed)


@contextmanager
def open_folder(storage: str, run: str) -> Generator[RunDir]:
    """Open a run for files of names that nobody else uses; under a URL they go there when this is closed."""
    url = join_url(storage, run)
    if not is_url(url):
        yield RunDir(Path(url))
        return
    with tempfile.TemporaryDirectory(prefix="solvent-files-") as folder:
        opened = SpooledRun(open_storage(url), Path(folder))
        try:
            yield opened.dir
        finally:
            try:
                opened.push()
            except OSError as error:
                logger.warning("files of this process could not be brought to %s: %s", url, error)


def fetch_rows(storage: Storage, run_dir: RunDir) -> list[Path]:
    """Bring a run's row files and its configuration to a local directory; return those that there are.

    Raises:
        OSError: the storage does not work.
    """
    run, found = run_dir, list[Path]()
    for path in (run.metrics, run.attempts, run.incidents, run.ledger, run.bad_steps, run.config, run.origin):
        with suppress(FileNotFoundError):
            data = storage.read(path.relative_to(run.root).as_posix())
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(data)
            found.append(path)
    return found


@contextmanager
def _explain_unreadable(url: str) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise StorageError(
            f"storage: {error.filename or url} cannot be read ({error.strerror or error}), so nobody knows how far the "
            "run is. Check the bucket, AWS_ENDPOINT_URL and the credentials of this machine, then start the same "
            "command again."
        ) from error


def _push_last(opened: SpooledRun, url: str) -> None:
    try:
        opened.push()
    except OSError as error:
        raise StorageError(
            f"storage: the last rows of {url} cannot be written ({error.strerror or error}); committed checkpoints are "
            f"unharmed, and the rows wait in {opened.dir.root}. Start the same command again on this machine once the "
            "storage works: it resumes, and takes them from there."
        ) from error


def _get_signature(path: Path) -> tuple[int, int]:
    status = path.stat()
    return status.st_size, status.st_mtime_ns
