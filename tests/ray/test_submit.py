"""`solvent submit --to ray` from outside of a cluster of rented nodes; the job API and all else are real."""

import contextlib
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from itertools import pairwise
from pathlib import Path

import pytest
import yaml

from cluster.cli import main
from elastic.records.rundir import RunDir, read_rows
from tests.ray._exact import read_losses, read_samples
from tests.ray._nodes import get_env
from tests.ray._rented import SOLVENT_COMMAND, Rented, find_tree, get_own_ip, open_head
from tests.ray._runs import TINY
from tests.ray._traces import find_processes, wait_until
from tests.tcp_proxy import TcpProxy

pytestmark = pytest.mark.long

STEPS = 600
LONG = 100_000
SECRETS = {
    "WANDB_API_KEY": "pl4nted" + "0123456789abcdef" * 2 + "w",
    "AWS_SECRET_ACCESS_KEY": "pl4nted-aws-0123456789",
    "HF_TOKEN": "hf_pl4nted0123456789",
    "MY_PASSWORD": "pl4nted-password",
}
"""In the environment of the head, of the nodes and of who submits."""


DOTENV = "pl4nted-in-a-dotenv-file"


@pytest.fixture(scope="module")
def cluster():
    """A head and two nodes, each held by a command of its own, and a proxy to the dashboard that can be cut."""
    with open_head(env=SECRETS, timeout_s=30) as rented:
        rented.join()
        rented.join()
        rented.proxy = TcpProxy(rented.dashboard_port)
        yield rented
        rented.proxy.close()


class Laptop:
    """The machine that submits: a small working directory, and one submission at a time."""

    def __init__(self, cluster: Rented, data: Path, folder: Path, **overrides: object) -> None:
        self.cluster = cluster
        self.folder = folder
        self.overrides = {"run": "r", "storage": folder / "runs", "data.path": data, **overrides}
        self.dir = RunDir(folder / "runs" / "r")
        self.work = folder / "work"
        self.work.mkdir()
        (self.work / "tiny.yaml").write_text(yaml.safe_dump({**TINY, "cluster": {"min_workers": 1, "max_workers": 2}}))
        (self.work / ".env").write_text(f"DOTENV_SECRET={DOTENV}\n")
        self.num_starts = 0
        self.process: subprocess.Popen[bytes] | None = None

    def submit(self, *words: str, **overrides: object) -> subprocess.Popen[bytes]:
        changes = [f"{key.replace('__', '.')}={value}" for key, value in {**self.overrides, **overrides}.items()]
        address = f"--address=http://127.0.0.1:{self.cluster.proxy.port}"
        self.num_starts += 1
        with self._get_log(self.num_starts).open("wb") as log:
            self.process = subprocess.Popen(
                [*SOLVENT_COMMAND, "submit", "tiny.yaml", "--to", "ray", address, *words, *changes],
                env={**get_env(self.cluster.folder), **SECRETS, "HOME": str(self.cluster.folder)},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self.work,
            )
        return self.process

    def wait(self, *, timeout_s: float = 180) -> int:
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the submission goes on:\n{self.get_output()}") from None

    def wait_for(self, condition, *, timeout_s: float = 180, what: str = ""):
        def check():
            value = condition()
            assert value or self.process.poll() is None, f"the submission ended:\n{self.get_output()}"
            return value

        return wait_until(check, timeout_s=timeout_s, what=lambda: f"{what}\n{self.get_output()}")

    def wait_for_step(self, step: int, *, timeout_s: float = 180) -> int:
        self.wait_for(lambda: self.get_step() >= step, timeout_s=timeout_s, what=f"step {step}")
        return self.get_step()

    def get_step(self) -> int:
        return max((row["step"] for row in read_rows(self.dir.metrics)), default=0)

    def get_last_row(self) -> dict:
        return list(read_rows(self.dir.metrics))[-1]

    def get_shown_steps(self) -> list[int]:
        return [int(step) for step in re.findall(r"\bstep (\d+)/", self.get_output())]

    def get_output(self) -> str:
        return self._get_log(self.num_starts).read_text()

    def _get_log(self, number: int) -> Path:
        return self.folder / f"submit-{number}.log"


def find_drivers(cluster: Rented) -> list[int]:
    processes = find_processes(cluster.folder)
    return [pid for pid, command in processes.items() if command.endswith("solvent train .solvent/config.yaml")]


@pytest.fixture(scope="module")
def journey(cluster, data, tmp_path_factory):
    """A supervised run that lost its connection, its driver, a node with notice, and its head."""
    overrides = {"train.steps": STEPS, "fault.lease_s": 14, "wandb.mode": "offline"}
    laptop = Laptop(cluster, data, tmp_path_factory.mktemp("journey"), **overrides)
    laptop.submit("--supervise", "--secret", "WANDB_API_KEY")
    laptop.wait_for_step(30)

    assert cluster.proxy.cut() > 0, "nothing was connected"
    laptop.wait_for(lambda: "does not answer" in laptop.get_output(), what="the loss is told")
    step = laptop.wait_for_step(laptop.get_step() + 20)
    cluster.proxy.mend()
    laptop.wait_for(lambda: max(laptop.get_shown_steps(), default=0) >= step, what="the log goes on")

    (driver,) = find_drivers(cluster)
    os.kill(driver, signal.SIGKILL)
    laptop.wait_for(lambda: "-2: running" in laptop.get_output(), what="a second submission")
    laptop.wait_for(lambda: laptop.get_last_row()["attempt"] > 1 or is_new_step(laptop), what="training goes on")
    laptop.wait_for_step(laptop.get_step() + 20)

    leaver = cluster.joined[-1]
    leaver.send_signal(signal.SIGTERM)
    told_s = time.monotonic()
    left = leaver.wait(30), time.monotonic() - told_s
    laptop.wait_for(lambda: laptop.get_last_row()["world_size"] == 1, what="a world without the node")
    laptop.wait_for_step(laptop.get_step() + 20)

    cluster.kill_head()
    cluster.start_head()
    code = laptop.wait(timeout_s=270)
    print(laptop.get_output(), cluster.get_output())  # shown if a test fails
    return laptop, code, left


def is_new_step(laptop) -> bool:
    """Whether a driver that found the trainers at work has shown a step."""
    return "-2: running" in laptop.get_output() and laptop.get_output().rpartition("-2: running")[2].count("step ") > 0


def test_a_run_finishes_exact_though_connection_driver_node_and_head_were_lost(journey, tmp_path):
    laptop, code, _ = journey
    assert code == 0, laptop.get_output()
    command = [sys.executable, "-m", "elastic", str(laptop.dir.config), f"storage={tmp_path}", "wandb.mode=disabled"]
    subprocess.run(
        [*command, "cluster.max_workers=1"], env=get_env(tmp_path), cwd=tmp_path, check=True, stdout=subprocess.DEVNULL
    )
    unbroken = RunDir(tmp_path / "r")
    losses = read_losses(laptop.dir)
    assert len(losses) == STEPS
    assert losses == pytest.approx(read_losses(unbroken), rel=1e-4)
    assert read_samples(laptop.dir) == read_samples(unbroken)


def test_each_loss_is_a_submission_of_its_own_id_and_the_same_run(journey):
    laptop, *_ = journey
    output = laptop.get_output()
    assert [f"-{number} submitted" in output for number in (1, 2, 3, 4)] == [True, True, True, False]
    assert re.search(r"-1 crashed at step \d+: the driver was killed \(exit code -9\); submitting again", output)
    assert re.search(r"-2 forgotten at step \d+: .* its head was started anew; submitting again", output)
    assert {path.name for path in laptop.dir.root.parent.iterdir() if not path.name.startswith(".")} == {"r"}


def test_attempts_tell_what_was_lost(journey):
    attempts = list(read_rows(journey[0].dir.attempts))
    for before, after in pairwise(attempts):
        assert after["first_step"] + after["lost_steps"] == before["last_step"] + 1
    assert attempts[-1]["end"] == "finished" and attempts[-1]["last_step"] == STEPS
    (left,) = (number for number, row in enumerate(attempts) if "SIGTERM" in row["reason"])
    assert (attempts[left]["end"], attempts[left + 1]["lost_steps"]) == ("interrupted", 0)
    assert max(row["lost_steps"] for row in attempts) <= 40, "two checkpoints, 20 steps apart"


def test_every_line_of_the_log_is_shown_once(journey):
    laptop, *_ = journey
    lines = [line for line in laptop.get_output().splitlines() if re.match(r"\[ *[\d.]+ s\] ", line)]
    assert len(lines) == len(set(lines)) > 20
    assert "finished: all steps done" in lines[-1]


def test_a_node_leaves_cleanly_within_the_time_that_its_machine_grants(journey, cluster):
    code, took_s = journey[2]
    assert code == 0, cluster.get_output()
    assert took_s < 25, "it was let go before the end of the machine's grace"
    assert "leaving: this node drains" in cluster.get_output()


def test_nothing_that_was_written_anywhere_holds_a_secret(journey, cluster, capsys):
    """The run (with W&B's offline files and the report), all logs of Ray and of hosts, and what was printed."""
    laptop, *_ = journey
    assert main(["report", str(laptop.dir.root)]) == 0
    secrets = [value.encode() for value in (*SECRETS.values(), cluster.token, DOTENV)]
    places = [
        laptop.dir.root,
        cluster.folder / "ray",
        *cluster.folder.glob("n[0-9]"),
        *laptop.folder.glob("*.log"),
        *cluster.folder.glob("*.log"),
    ]
    files = [file for place in places for file in ([place] if place.is_file() else place.rglob("*")) if file.is_file()]
    names = {file.name for file in files}
    assert {"config.yaml", "report.html", "attempts.jsonl", "gcs_server.out", "submit-1.log"} <= names
    assert any(name.endswith(".wandb") for name in names)
    assert [found for file in files for secret in secrets for found in find_around(file, secret)] == []
    # the scan would find them
    (laptop.folder / "planted.txt").write_bytes(b"x" + secrets[0])
    assert list(find_around(laptop.folder / "planted.txt", secrets[0]))


def find_around(file: Path, secret: bytes):
    """Yield a file and what stands before each place where it holds a secret."""
    parts = file.read_bytes().split(secret)
    yield from ((file.name, part[-400:].decode(errors="replace")) for part in parts[:-1])


def test_the_dashboard_listens_on_the_loop_back_interface_only_and_wants_a_token(journey, cluster):
    with contextlib.closing(socket.socket()) as outside:
        assert outside.connect_ex((get_own_ip(), cluster.dashboard_port)) != 0
    with pytest.raises(urllib.error.HTTPError, match="401"):
        urllib.request.urlopen(f"http://127.0.0.1:{cluster.dashboard_port}/api/jobs/", timeout=10)


def test_ctrl_c_leaves_the_run_going_and_delete_ends_it_saved(journey, cluster, data, tmp_path):
    laptop = Laptop(cluster, data, tmp_path, **{"train.steps": LONG, "fault.lease_s": 14, "cluster.max_workers": 1})
    laptop.submit()
    laptop.wait_for_step(10)
    laptop.process.send_signal(signal.SIGINT)
    assert laptop.wait(timeout_s=20) == 130
    assert "the run goes on without being watched" in laptop.get_output()
    step = laptop.get_step()
    wait_until(lambda: laptop.get_step() > step + 5, timeout_s=180, what="it goes on")

    follower = laptop.submit()
    laptop.wait_for(lambda: "-1 is running" in laptop.get_output() and laptop.get_shown_steps(), what="it is found")
    log = laptop.get_output
    laptop.submit("--delete")
    assert laptop.wait() == 0, laptop.get_output()
    assert follower.wait(30) == 3, log()
    last = laptop.get_step()
    assert [row["end"] for row in read_rows(laptop.dir.attempts)] == ["interrupted"]
    assert (laptop.dir.checkpoints / f"step-{last:08}" / "COMMITTED").exists()


def test_wrong_input_a_missing_secret_and_a_frozen_head_end_with_their_codes_and_reasons(
    journey, cluster, data, tmp_path
):
    laptop = Laptop(cluster, data, tmp_path)
    laptop.submit("--secret", "NOT_ON_THE_HEAD")
    assert laptop.wait() == 2
    assert "--secret NOT_ON_THE_HEAD: it is not set on the head" in laptop.get_output()
    laptop.submit("--supervise", **{"data.path": "/mnt/none"})
    assert laptop.wait() == 2
    assert "data.path='/mnt/none' does not exist" in laptop.get_output()

    raylet = find_raylet(cluster.head.pid)
    os.kill(raylet, signal.SIGSTOP)
    try:
        start_s = time.monotonic()
        laptop.submit("--pending-s", "3")
        assert laptop.wait(timeout_s=180) == 1
    finally:
        os.kill(raylet, signal.SIGCONT)
    assert "its driver was not started within 3 s" in laptop.get_output(), laptop.get_output()
    assert time.monotonic() - start_s < 50
    assert not laptop.dir.root.exists()


def find_raylet(pid: int) -> int:
    (raylet,) = (found for found in find_tree(pid) if Path(f"/proc/{found}/comm").read_text() == "raylet\n")
    return raylet
