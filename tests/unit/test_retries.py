"""Which ends of a driver end its job for good, and which are tried again."""

import pytest

from cluster.runtime.jobs.retries import FRUITLESS_DRIVERS, KEY, FruitlessError, RetriedDriver
from elastic.checkpoint.format.manifest import COMMITTED, MANIFEST, checksum, get_directory
from elastic.checkpoint.restore.past import look_back
from elastic.config import RunConfig
from elastic.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    SavesFailedError,
    SolventError,
    StaleGenerationError,
    StorageError,
)
from elastic.records.leader import lead
from elastic.storage import open_storage


class Job:
    """One run that is tried again and again, each time by a new driver."""

    def __init__(self, folder):
        self.config = RunConfig(run="r", storage=str(folder))
        self.storage = open_storage(f"{folder}/r")
        self.stopped = []

    def drive(self, end=None, **ending):
        """Let a driver start, and end with an error or so."""
        try:
            with RetriedDriver(self.stopped.append) as driver:
                driver.begin(self.config, look_back(self.config))
                if end is not None:
                    raise end
                if ending:
                    driver.take(**{"reason": "so it is", **ending})
        except SolventError as error:
            return error
        return None

    def save(self, step):
        manifest = b"{}"
        self.storage.write(f"{get_directory(step)}/{MANIFEST}", [manifest])
        self.storage.write(f"{get_directory(step)}/{COMMITTED}", [checksum(manifest)])

    def train(self):
        lead(self.storage, who="a test").close()


@pytest.fixture
def job(tmp_path):
    return Job(tmp_path)


@pytest.mark.parametrize(
    "error",
    [ConfigError("data.path=/nowhere"), DataError("no shards"), StorageError("cannot be written")],
    ids=lambda error: type(error).__name__,
)
def test_wrong_input_ends_the_job_and_says_why(job, error):
    job.drive(error)
    (reason,) = job.stopped
    assert reason == f"solvent ended this job for good: failed with exit code 2: {error}"


def test_a_configuration_that_cannot_be_read_ends_the_job_too(job):
    with pytest.raises(ConfigError), RetriedDriver(job.stopped.append):
        raise ConfigError("no such key")
    assert "no such key" in job.stopped[0]


@pytest.mark.parametrize(
    "error",
    [StorageError("full"), StaleGenerationError("led elsewhere"), SavesFailedError("no save"), CheckpointError("torn")],
    ids=lambda error: type(error).__name__,
)
def test_what_may_pass_for_a_run_that_has_trained_is_tried_again(job, error):
    job.train()
    job.drive(error)
    assert job.stopped == []


@pytest.mark.parametrize(
    ("kind", "exit_code", "is_final"),
    [("failed", 1, True), ("failed", 2, True), ("failed", 3, False), ("interrupted", 3, False), ("finished", 0, False)],
)
def test_a_run_that_its_coordinator_gave_up_ends_the_job(job, kind, exit_code, is_final):
    job.train()
    job.drive(kind=kind, exit_code=exit_code)
    assert bool(job.stopped) == is_final


def test_drivers_that_get_the_run_no_further_end_the_job_in_the_end(job):
    job.save(40)
    for _ in range(FRUITLESS_DRIVERS):
        assert job.drive() is None
    error = job.drive()
    assert isinstance(error, FruitlessError) and f"{FRUITLESS_DRIVERS} drivers in a row" in str(error)
    assert "beyond step 40, its newest checkpoint" in job.stopped[0] and "exit code 1" in job.stopped[0]
    assert job.drive() is None, "somebody has started it again, on purpose"


def test_a_checkpoint_starts_the_count_anew(job):
    for step in range(1, 3 * FRUITLESS_DRIVERS):
        assert job.drive() is None
        job.save(step)
    assert job.stopped == []


def test_a_record_that_is_torn_counts_nothing(job):
    job.storage.write(KEY, [b'{"step": 1'])
    assert job.drive() is None
