"""One leader per run: who may start attempts, wherever else somebody gives the same command.

The right to lead is the newest generation (`elastic.records.fencing`), which storage gives to one taker only.
`leader.json` beside it tells others whether its holder lives: the leader writes it anew every few seconds. Nobody
trusts another machine's clock: a lease has run out once an onlooker saw no change for its whole length. A leader that
has stopped, or died on the onlooker's own machine, is followed at once.
"""

import json
import logging
import os
import secrets
import socket
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Self

from elastic.errors import StaleGenerationError, StorageError
from elastic.processes import find_running
from elastic.records.fencing import (
    GenerationGuard,
    check_generation,
    describe_taker,
    get_boottime_s,
    get_life,
    get_newest_generation,
    take_generation,
)
from elastic.storage import Storage

logger = logging.getLogger(__name__)

KEY = "leader.json"
LEASE_S = 15.0
RENEW_S = 3.0
_LOOK_S = 0.5
_TAKE_PATIENCE_S = 60.0
"""A generation is taken while nobody trains: a storage that is full or slow for a while need not end the run."""


@dataclass(frozen=True, kw_only=True)
class Lease:
    """What `leader.json` says."""

    who: str
    epoch: int
    """The newest generation that its holder took; the file has called it so from the beginning."""
    beat: int
    """Counts up as the holder lives."""
    released: bool
    host: str
    pid: int
    started: int
    """The process's start time in clock ticks: with it, a number that was given out again is not mistaken."""
    machine: str
    """The boot and the process namespace in which `pid` means anything."""
    token: str


class Leadership:
    """The right to start attempts of one run, until `close`; a thread renews the lease. Made by `lead`."""

    def __init__(self, storage: Storage, lease: Lease, *, renew_s: float) -> None:
        self._storage = storage
        self._lease = lease
        self._renew_s = renew_s
        self._lock = threading.Lock()
        self._guard = GenerationGuard(self._confirm, every_s=1.5 * renew_s)  # the thread looks more often
        self._lost: StaleGenerationError | None = None
        self._wake = threading.Event()
        self._is_closing = False
        self._is_said = False
        self._write()
        self._thread = threading.Thread(target=self._renew, name="leader", daemon=True)
        self._thread.start()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def generation(self) -> int:
        """The newest generation that was taken."""
        return self._lease.epoch

    def get_life(self) -> str:
        """Return what tells this run from one of the same name, begun anew after its directory was removed.

        Raises:
            StorageError: the storage does not say.
        """
        try:
            return get_life(self._storage)
        except OSError as error:
            raise _explain(self._storage, error) from error

    def take(self, generation: int) -> None:
        """Take the generation of an attempt before it starts, unless this leader holds it already.

        Raises:
            StaleGenerationError: another one leads by now.
            StorageError: the storage did not take it for a minute.
        """
        self.check()
        with self._lock:
            if generation == self._lease.epoch:
                return
            assert generation > self._lease.epoch, "attempts are numbered upwards"
            try:
                take_generation(self._storage, generation, who=self._lease.who, patience_s=_TAKE_PATIENCE_S)
            except OSError as error:
                raise _explain(self._storage, error) from error
            self._lease = replace(self._lease, epoch=generation)
        self._wake.set()

    def check(self) -> None:
        """Make sure that this one still leads; cheap unless the process may have slept.

        Raises:
            StaleGenerationError: another one leads by now; nothing of the run may be touched any more.
        """
        if self._lost is None:
            try:
                self._guard.check_if_due()
            except StaleGenerationError as error:
                self._lost = error
            except OSError as error:  # whoever took over could not have written either
                self._say(error)
        if self._lost is not None:
            raise self._lost

    def check_known(self) -> None:
        """Do as `check`, from what our thread has found every few seconds; never waits for the storage.

        For what stays on this machine until `check` was asked.

        Raises:
            StaleGenerationError: another one leads by now.
        """
        if self._lost is not None:
            raise self._lost

    def close(self) -> None:
        """Let others lead at once, unless one does already."""
        self._is_closing = True
        self._wake.set()
        self._thread.join()
        try:
            self.check()
        except StaleGenerationError:
            return
        with self._lock:
            self._lease = replace(self._lease, released=True)
        self._write()

    def _confirm(self) -> None:
        with self._lock:
            check_generation(self._storage, self._lease.epoch)

    def _renew(self) -> None:
        while not self._is_closing:
            self._wake.wait(self._renew_s)
            self._wake.clear()
            try:
                self._guard.check()
            except StaleGenerationError as error:
                self._lost = error
                return
            except OSError as error:
                self._say(error)
                continue
            except Exception:  # without this thread the lease would run out, and another one take the lead
                logger.exception("%s/%s: the lead could not be looked at", self._storage.url, KEY)
                continue
            with self._lock:
                self._lease = replace(self._lease, beat=self._lease.beat + 1)
            self._write()

    def _write(self) -> None:
        try:
            self._storage.write(KEY, [json.dumps(asdict(self._lease)).encode()])
        except OSError as error:
            self._say(error)
        else:
            self._is_said = False

    def _say(self, error: OSError) -> None:
        """Say once that the lease is not renewed: until another one takes a generation, training may go on."""
        if not self._is_said:
            self._is_said = True
            logger.warning("%s/%s cannot be renewed: %s", self._storage.url, KEY, error)


def lead(storage: Storage, *, who: str, at_least: int = 1, lease_s: float = LEASE_S) -> Leadership:
    """Take the lead of the run whose files are in `storage`, touching nothing if another one has it.

    Waits up to `lease_s` if a leader on another machine has died without a word.

    Args:
        who: is named to those who come too late.
        at_least: number of the next attempt, as far as the run's files tell.

    Raises:
        StorageError: another one leads, or the storage does not work.
    """
    try:
        newest, lease = _look(storage)
        if newest and not _is_free(lease, newest):
            _wait_for_silence(storage, newest, lease, lease_s=lease_s)
        generation = max(newest + 1, at_least)
        take_generation(storage, generation, who=who, patience_s=_TAKE_PATIENCE_S if newest else 0.0)
    except StaleGenerationError:
        raise _refuse(storage, describe_taker(storage, get_newest_generation(storage))) from None
    except OSError as error:
        raise _explain(storage, error) from error
    lease = Lease(
        who=who,
        epoch=generation,
        beat=0,
        released=False,
        host=socket.gethostname(),
        pid=os.getpid(),
        started=_get_start_time(os.getpid()) or 0,
        machine=_get_machine(),
        token=secrets.token_hex(8),
    )
    return Leadership(storage, lease, renew_s=lease_s * RENEW_S / LEASE_S)


def was_led(storage: Storage) -> bool:
    """Tell whether anybody ever trained the run whose files are in `storage`.

    Raises:
        OSError: the storage does not say.
    """
    return get_newest_generation(storage) > 0


def _wait_for_silence(storage: Storage, newest: int, lease: Lease | None, *, lease_s: float) -> None:
    """Return once the lease has run out.

    Raises:
        StorageError: its holder gave a sign of life.
    """
    deadline_s = get_boottime_s() + lease_s
    while get_boottime_s() < deadline_s:
        time.sleep(min(_LOOK_S, lease_s / 10))
        now = _look(storage)
        if now == (newest, lease):
            continue
        if now[0] == newest and now[1] is not None and now[1].released:
            return
        holder = now[1]
        raise _refuse(storage, f"{holder.who} (process {holder.pid} on {holder.host})" if holder else "somebody else")


def _refuse(storage: Storage, by: str) -> StorageError:
    return StorageError(
        f"the run at {storage.url} is led by {by} right now, so this one ends and has touched nothing. Wait for the "
        "other one, stop it, or train under another name (run=...)."
    )


def _look(storage: Storage) -> tuple[int, Lease | None]:
    newest = get_newest_generation(storage)
    try:
        return newest, Lease(**json.loads(storage.read(KEY)))
    except (FileNotFoundError, ValueError, TypeError):  # none yet, or of another version
        return newest, None


def _is_free(lease: Lease | None, newest: int) -> bool:
    """Tell whether nobody leads for certain; a lease older than the newest generation says nothing about its taker."""
    if lease is None or lease.epoch != newest:
        return False
    return lease.released or (lease.machine == _get_machine() and _get_start_time(lease.pid) != lease.started)


def _get_machine() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{Path('/proc/self/ns/pid').stat().st_ino}"


def _get_start_time(pid: int) -> int | None:
    process = find_running(pid)
    return process.started if process else None


def _explain(storage: Storage, error: OSError) -> StorageError:
    return StorageError(
        f"storage: no attempt of the run at {storage.url} can start, because its generation cannot be written there "
        f"({error.strerror or error}). Free or unlock the storage, then start the same command again: it resumes."
    )
