"""Rows on their way from a trainer to the coordinator, over a real link, and on to a store."""

import queue
import socket
import threading

import pytest

from cluster.runtime.coordinator.records.relayed import RelayedRun, RelayedSink, RowReceiver
from cluster.runtime.messages import FROM_TRAINER, TO_TRAINER
from cluster.types import Slot
from elastic.errors import StorageError
from elastic.records.rundir import RunDir, read_rows
from elastic.records.spool import fetch_rows, open_run
from elastic.storage import open_storage
from elastic.transport import Link, Peer
from tests.ray._traces import wait_until

SLOT = Slot("node", "cpu0")
ATTEMPT = 3


def connect():
    ours, theirs = socket.socketpair()
    return (
        Link(Peer(ours, None), FROM_TRAINER, sends="at once"),
        Link(Peer(theirs, None), TO_TRAINER, sends="waiting"),
    )


class Coordinator:
    """The serving thread of one, as far as rows go. `is_deaf`: what it hears is lost, as with one that has died."""

    def __init__(self, run, link):
        self.is_deaf = False
        self.failures: list[BaseException] = []
        self._link = link
        self._replica_server = RowReceiver(
            run, check_lead=lambda: None, answer=self._answer, on_failure=self.failures.append
        )
        threading.Thread(target=self._serve, daemon=True).start()

    def _answer(self, node, message):
        assert (node, message.slot, message.attempt) == (SLOT.node, SLOT, ATTEMPT)
        self._link.send(message)

    def _serve(self):
        while (messages := self._link.receive(60)) is not None:
            for message in messages:
                if not self.is_deaf:
                    self._replica_server.take(SLOT, ATTEMPT, message)


class Trainer:
    """One rank; what it hears is put where `trainer.WorldOrders` puts it."""

    def __init__(self, storage, folder, link, *, answer_s=60, attempt=ATTEMPT, streams=None):
        self.answers, self.attempt = queue.SimpleQueue(), attempt
        self.streams = {} if streams is None else streams
        self.run = RelayedRun(
            storage,
            folder,
            attempt=attempt,
            streams=self.streams,
            send=link.send,
            answers=self.answers,
            answer_s=answer_s,
        )
        self.sink = RelayedSink(self.run)
        threading.Thread(target=self._listen, args=(link,), daemon=True).start()

    def _listen(self, link):
        while (messages := link.receive()) is not None:
            for message in messages:
                self.answers.put(message)

    def step(self, number):
        self.sink.write({"step": number, "attempt": self.attempt})
        self.run.append(self.run.dir.samples(attempt=self.attempt, rank=0), {"step": number, "ids": [number]})


@pytest.fixture
def links():
    links = connect()
    yield links
    for link in links:
        link.close()


def read_store(url, tmp_path):
    """Return the steps in the store: of metrics, and of samples."""
    storage, run_dir = open_storage(url), RunDir(tmp_path / "fetched")
    run_dir.root.mkdir(exist_ok=True)
    fetch_rows(storage, run_dir)
    samples = run_dir.samples(attempt=ATTEMPT, rank=0)
    samples.write_bytes(storage.read(samples.name))
    return [[row["step"] for row in read_rows(path)] for path in (run_dir.metrics, samples)]


def test_all_rows_so_far_are_in_the_store_when_a_trainer_has_asked(s3_url, tmp_path, links):
    with open_run(s3_url, "a") as run:
        Coordinator(run, links[0])
        trainer = Trainer(run.storage, tmp_path / "files", links[1])
        for number in (1, 2, 3):
            trainer.step(number)
        trainer.run.push()
        assert read_store(f"{s3_url}/a", tmp_path) == [[1, 2, 3], [1, 2, 3]]
        trainer.step(4)
        trainer.run.push()
        assert read_store(f"{s3_url}/a", tmp_path) == [[1, 2, 3, 4], [1, 2, 3, 4]]


def test_rows_that_a_coordinator_did_not_hear_are_sent_again_and_none_twice(s3_url, tmp_path, links):
    with open_run(s3_url, "a") as run:
        first = Coordinator(run, links[0])
        trainer = Trainer(run.storage, tmp_path / "files", links[1])
        trainer.step(1)
        trainer.run.push()
        trainer.step(2)
        samples = run.dir.samples(attempt=ATTEMPT, rank=0)
        wait_until(lambda: len(list(read_rows(samples))) == 2, timeout_s=30, what="the row that nobody asked for")
        first.is_deaf = True
        trainer.step(3)
        second_links = connect()
        trainer.run._send = second_links[1].send
        threading.Thread(target=trainer._listen, args=(second_links[1],), daemon=True).start()
        Coordinator(run, second_links[0])
        trainer.step(4)
        trainer.run.push()
        assert read_store(f"{s3_url}/a", tmp_path) == [[1, 2, 3, 4], [1, 2, 3, 4]]
        for link in second_links:
            link.close()


def test_rows_of_a_world_that_no_coordinator_heard_reach_the_one_that_leads_the_next_world(s3_url, tmp_path, links):
    with open_run(s3_url, "a") as run:
        Coordinator(run, links[0]).is_deaf = True
        first = Trainer(run.storage, tmp_path / "first", links[1])
        first.step(1)
        first.step(2)
        first.run.close()
        second_links = connect()
        Coordinator(run, second_links[0])
        streams, attempt = first.streams, ATTEMPT + 1
        second = Trainer(run.storage, tmp_path / "second", second_links[1], attempt=attempt, streams=streams)
        second.step(3)
        second.run.push()
        rows, samples = read_store(f"{s3_url}/a", tmp_path)
        assert (rows, samples) == ([1, 2, 3], [1, 2])
        assert not any(stream.unkept for stream in streams.values())
        for link in second_links:
            link.close()


def test_a_commit_is_refused_if_nobody_says_that_the_rows_are_safe(s3_url, tmp_path, links):
    trainer = Trainer(open_storage(f"{s3_url}/a"), tmp_path / "files", links[1], answer_s=0.2)
    trainer.step(1)
    with pytest.raises(StorageError, match=r"did not say within 0 s .* nothing new is committed"):
        trainer.run.push()


def test_a_commit_is_refused_with_the_reason_if_the_store_does_not_take_the_rows(
    s3_environment, tmp_path, links, monkeypatch
):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))  # the rows wait in a spool there
    said = []
    with pytest.raises(StorageError, match="the rows wait in"), open_run("s3://no-such-bucket", "a") as run:
        Coordinator(run, links[0])
        trainer = Trainer(run.storage, tmp_path / "files", links[1])
        trainer.step(1)
        try:
            trainer.run.push()
        except StorageError as error:
            said.append(str(error))
    (reason,) = said
    assert "s3://no-such-bucket/a/metrics.jsonl cannot be written" in reason and "Create the bucket" in reason


def test_files_that_are_not_rows_go_to_the_store_from_the_trainer(s3_url, tmp_path, links):
    trainer = Trainer(open_storage(f"{s3_url}/a"), tmp_path / "files", links[1])
    trainer.run.dir.profile(attempt=ATTEMPT, rank=0).write_bytes(b"trace")
    trainer.run.close()
    assert open_storage(f"{s3_url}/a").read("profile-3-0.json.gz") == b"trace"
    assert not (tmp_path / "files").exists()


@pytest.mark.parametrize("timeout_s", [None, 0, 60])
def test_a_link_that_another_thread_has_closed_is_over_for_who_receives(timeout_s):
    ours, theirs = connect()
    ours.close()
    theirs.close()
    assert ours.receive(timeout_s) is None
    assert theirs.receive(timeout_s) is None
