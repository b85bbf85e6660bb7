"""The end of retries: a driver whose run cannot get better by being started again ends its Ray job for good.

KubeRay builds a new cluster for each attempt that fails, up to its backoffLimit, whatever the exit code was. Three ends
it does not try again: SUCCEEDED, a deadline, and a Ray job that is STOPPED (ray-project/kuberay@feeaf72,
ray-operator/controllers/ray/rayjob_controller.go: checkBackoffLimitAndUpdateStatusIfNeeded). So the driver stops its
own job, with the reason as the job's message, which KubeRay copies into the RayJob's status. Nobody has to watch.

Final are: wrong input (exit code 2), a run that its coordinator gave up (no step got through, so many times in a row),
and drivers that follow each other without one more checkpoint between them.
"""

import errno
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

from elastic.checkpoint.restore.past import Past
from elastic.config import RunConfig
from elastic.errors import SolventError, StorageError, UserError
from elastic.records.leader import was_led
from elastic.records.rundir import format_utc
from elastic.storage import Storage

FRUITLESS_DRIVERS = 5
"""So many in a row between which the run got no further checkpoint are a crash loop, as for `submit --supervise`."""
KEY = "driver.json"
logger = logging.getLogger(__name__)

_WRONG = (errno.ENOENT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EINVAL)
"""Storage that is named wrongly, or forbidden; what else fails may pass, and the run may have been trained."""
_LOG_S = 2.0
"""Ray shows no more of a job's log once the job has ended, and looks for new lines every second."""
_MAY_RESUME = 3
"""The exit code of a run that the same command resumes."""


class FruitlessError(SolventError):
    """Drivers came and went, and the run did not get any further."""


@dataclass(frozen=True, kw_only=True)
class Record:
    """What drivers leave to the next one, in `driver.json`."""

    step: int
    """Of the newest checkpoint when the last driver started."""
    num_fruitless: int
    """Drivers in a row that started from this step, and have ended without a newer checkpoint."""


class RetriedDriver:
    """One driver of a job that is tried again; in a `with` block, around all that may fail.

    Args:
        stop_job: ends this process's Ray job so that it is not tried again; takes the reason.
    """

    def __init__(self, stop_job: Callable[[str], None]) -> None:
        self._stop_job = stop_job
        self._has_trained = False
        self._storage: Storage | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        if isinstance(error, SolventError) and self._is_final(error):
            self._stop(str(error), error.exit_code)

    def begin(self, config: RunConfig, past: Past) -> None:
        """Count this driver, if there is something left to train: one that has only that to say is not fruitless.

        Args:
            past: what the run has by now.

        Raises:
            FruitlessError: too many before this one got nowhere.
        """
        self._storage, step = past.storage, past.step
        if step >= config.train.steps:
            self._has_trained = True
            return
        try:
            if past.error:
                raise past.error
            self._has_trained = was_led(self._storage)
            before = _read(self._storage)
            num_fruitless = before.num_fruitless if before is not None and before.step >= step else 0
            if num_fruitless < FRUITLESS_DRIVERS:
                self._write(Record(step=step, num_fruitless=num_fruitless + 1))
        except OSError as error:  # whoever checks the storage says it better
            self._has_trained = error.errno not in _WRONG
            logger.warning("%s: how often this run was started is not known: %s", config.storage, error)
            return
        if num_fruitless >= FRUITLESS_DRIVERS:
            where = f"step {step}, its newest checkpoint" if step else "its start, without any checkpoint"
            raise FruitlessError(
                f"{num_fruitless} drivers in a row did not get run={config.run!r} beyond {where}, so another would "
                "not either. Find the cause in their logs (the head's memory is a usual one), then start the same "
                "command again: it resumes."
            )

    def take(self, *, kind: str, reason: str, exit_code: int) -> None:
        """Take in how the driver's watch ended."""
        if kind == "failed" and exit_code != _MAY_RESUME:
            self._stop(reason, exit_code)
        elif kind == "finished" and self._storage is not None:
            self._forget()

    def _is_final(self, error: SolventError) -> bool:
        """Tell whether the same command would end the same way.

        Storage that has worked before may work again, and who leads the run elsewhere ends.
        """
        if isinstance(error, StorageError):
            return error.exit_code != _MAY_RESUME and not self._has_trained
        return isinstance(error, UserError | FruitlessError)

    def _stop(self, reason: str, exit_code: int) -> None:
        self._forget()
        self._stop_job(f"solvent ended this job for good: failed with exit code {exit_code}: {reason}")

    def _forget(self) -> None:
        """Let the next driver, which somebody starts on purpose, be the first of a new row."""
        if self._storage is None:
            return
        try:
            self._storage.delete([KEY])
        except OSError as error:
            logger.warning("%s/%s cannot be removed: %s", self._storage.url, KEY, error)

    def _write(self, record: Record) -> None:
        assert self._storage is not None
        fields = {"step": record.step, "num_fruitless": record.num_fruitless, "time_utc": format_utc(time.time())}
        self._storage.write(KEY, [json.dumps(fields).encode()])


def stop_retries(train: Callable[[RetriedDriver], int]) -> int:
    """Train, and have this process's Ray job end for good if that fails in a way that would only repeat itself.

    Raises:
        SolventError: it failed in a way that may pass.
    """
    reasons: list[str] = []
    try:
        with RetriedDriver(reasons.append) as driver:
            code = train(driver)
    except SolventError as error:
        if not reasons:
            raise
        sys.stderr.write(f"solvent: {error}\n")
        code = error.exit_code
    if reasons:
        _stop_own_job(reasons[-1])
    return code


def _stop_own_job(reason: str) -> None:
    from cluster.runtime.ray import adapter  # noqa: PLC0415 (a driver that never came to Ray need not have waited for it)

    sys.stdout.flush()
    sys.stderr.flush()
    time.sleep(_LOG_S)
    try:
        adapter.stop_own_job(reason)
    except SolventError as error:
        logger.warning("%s", error)


def _read(storage: Storage) -> Record | None:
    """Return what the driver before left; None if there was none, or its record is torn.

    Raises:
        OSError: the storage does not work.
    """
    try:
        fields: Any = json.loads(storage.read(KEY))
        return Record(step=int(fields["step"]), num_fruitless=int(fields["num_fruitless"]))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
