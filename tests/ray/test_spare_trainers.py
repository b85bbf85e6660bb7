"""Where code is compiled a second trainer is ready for when the first one dies: a real host, the test coordinates."""

import json
import os
import signal

import pytest

from cluster.runtime.messages import ClaimGranted, Stepped, TrainerSaid
from cluster.types import Claimed, TrainerEnded
from elastic.config import CheckpointConfig, ClusterConfig, DataConfig, TrainConfig
from elastic.data.preparation.prepare import prepare
from elastic.models.llama import Config as ModelConfig
from tests.ray._hosts import run_host
from tests.ray._traces import find_trainers, is_alive, wait_until

READY = "the spare trainer of cpu0 is ready"


@pytest.fixture(scope="module")
def host(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "a.jsonl").write_text("\n".join(json.dumps({"text": f"In the beginning {n}. " * 8}) for n in range(300)))
    prepare([folder / "a.jsonl"], folder / "data", vocab_size=300, val_fraction=0.05)
    with run_host(
        lease_s=120.0,
        compile=True,
        model=ModelConfig(dim=32, num_layers=2, num_heads=2, num_kv_heads=2, ffn_dim=64, vocab_size=300),
        data=DataConfig(path=str(folder / "data"), seq_len=32),
        train=TrainConfig(steps=1_000_000, global_batch=2, micro_batch=2, eval_samples=2),
        checkpoint=CheckpointConfig(every_steps=1_000_000),
        cluster=ClusterConfig(max_workers=1),
    ) as host:
        host.attempt = 0
        host.claim(1).expect(ClaimGranted)
        host.coordinator.expect(Claimed, slot="cpu0", timeout_s=100)
        yield host


def train(host):
    """Have a world of one train; return its trainer's process id once it has made a step."""
    host.attempt += 1
    pid = host.join(host.attempt)
    host.num_ready = host.log.read_text().count(READY)  # no spare of the world before is left now
    host.go(host.attempt, "cpu0")
    expect_step(host)
    return pid


def expect_step(host):
    while not isinstance(host.coordinator.expect(TrainerSaid, attempt=host.attempt).message, Stepped):
        pass


def wait_for_spare(host):
    """Return the process id of the spare of a trainer, once it is ready."""
    wait_until(lambda: read(host).count(READY) > host.num_ready, timeout_s=180, what="the spare is ready")
    trainers = find_trainers(host.folder)
    assert len(trainers) == 2
    return max(trainers)


def read(host):
    host.coordinator.read(0.05)
    host.coordinator.messages.clear()
    return host.log.read_text()


def kill(host, pid):
    os.kill(pid, signal.SIGKILL)
    host.coordinator.expect(TrainerEnded, slot="cpu0", attempt=host.attempt)


def test_the_spare_of_a_trainer_that_dies_takes_its_place_and_gets_a_spare_of_its_own(host):
    first = train(host)
    second = wait_for_spare(host)
    kill(host, first)
    assert train(host) == second != first
    third = wait_for_spare(host)
    kill(host, second)
    assert train(host) == third


def test_a_slot_whose_spare_dies_does_without(host):
    pid = train(host)
    spare = wait_for_spare(host)
    os.kill(spare, signal.SIGKILL)
    wait_until(lambda: "gets no other" in read(host), timeout_s=10, what="the end of the spare is noticed")
    assert is_alive(pid)
    kill(host, pid)
    assert train(host) not in (pid, spare)
    for _ in range(60):
        expect_step(host)
    assert len(find_trainers(host.folder)) == 1
