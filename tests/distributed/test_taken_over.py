"""A world whose run was taken over while it trained: a host's trainers leave it and join the next; others end."""

from elastic.breaker import Breaker
from elastic.errors import StaleGenerationError
from elastic.ports import Finished, Lost, Progress
from elastic.records.fencing import take_generation
from elastic.storage import open_storage
from elastic.training.run import train
from tests.distributed._loops import NoNotices, Watcher, make_config, write_data
from tests.distributed._ranks import run_ranks, spec

STEPS, EVERY_STEPS = 40, 4


class Usurper(Watcher):
    """Takes the next generation once the first checkpoint is committed; the next one finds that out."""

    def __init__(self, storage):
        super().__init__()
        self.storage = storage
        self.start = Progress()

    def restored(self, progress, source):
        self.start = progress

    def committed(self, progress):
        if progress.step == EVERY_STEPS:
            take_generation(self.storage, 2, who="the next coordinator")


def work(rank, port, folder, is_led):
    """Train in a world that is taken over and, if there is somebody to lead on, in the one after it."""
    config = make_config(folder, f"led-{is_led}", steps=STEPS, every_steps=EVERY_STEPS)
    storage = open_storage(f"{config.storage}/{config.run}")
    if rank == 0:
        take_generation(storage, 1, who="this one")
    lives = []
    for attempt in (1, 2) if is_led else (1,):
        watcher = Usurper(storage)
        place = spec(rank, port, world_size=2, attempt=attempt)
        breaker = Breaker() if is_led else None
        try:
            outcome = train(config, place, notices=NoNotices(), observer=watcher, open_sinks=list, breaker=breaker)
        except StaleGenerationError as error:
            return str(error)
        lives.append((outcome, watcher.start, [row["step"] for row in watcher.rows]))
    return lives


def test_trainers_of_a_host_leave_a_world_that_was_taken_over_and_go_on_in_the_next(tmp_path):
    write_data(tmp_path)
    for (lost, _, before), (finished, start, after) in run_ranks(work, 2, tmp_path, True):
        assert isinstance(lost, Lost)
        assert isinstance(finished, Finished)
        assert start.step == EVERY_STEPS, "the last checkpoint that was committed in time"
        assert before == list(range(1, len(before) + 1))
        assert EVERY_STEPS < len(before) < STEPS
        assert after == list(range(EVERY_STEPS + 1, STEPS + 1))


def test_ranks_without_a_host_end_with_the_reason(tmp_path):
    write_data(tmp_path)
    assert "the next coordinator" in run_ranks(work, 2, tmp_path, False)[0]
