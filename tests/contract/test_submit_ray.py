"""`solvent submit --to ray` against a stand-in for Ray's job API: what is sent, what goes wrong, and how it ends."""

import json
import threading
import time
from pathlib import Path

import pytest
import yaml

from cluster.cli import main
from cluster.runtime.jobs import supervise as supervising
from cluster.runtime.jobs.job_api import JobServer
from cluster.runtime.jobs.submission import Submission
from cluster.runtime.jobs.submitter import Limits, follow
from tests.contract._job_api import JobApi
from tests.tcp_proxy import TcpProxy

TOKEN = "0123456789abcdef-token"
SECRET = "pl4nted-s3cret"


@pytest.fixture
def api():
    with JobApi(token=TOKEN) as api:
        yield api


@pytest.fixture
def work(tmp_path, monkeypatch):
    """A working directory with a configuration, and a shell in it that knows the token."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "run.yaml").write_text(
        yaml.safe_dump({"run": "mine", "storage": "/mnt/runs", "data": {"path": "/mnt/kjv"}})
    )
    monkeypatch.chdir(folder)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "RAY_AUTH_MODE", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("HOME", str(tmp_path))
    return folder


def submit(api, *words):
    return main(["submit", "run.yaml", "--to", "ray", "--address", api.address, *words])


def finish(job):
    job.update(status="SUCCEEDED", driver_exit_code=0)


def fail(exit_code, message):
    return lambda job: job.update(status="FAILED", driver_exit_code=exit_code, message=message)


def test_what_is_sent_is_the_directory_the_whole_configuration_and_the_command(api, work, capsys):
    api.play = finish
    (work / "models.py").write_text("x = 1\n")
    (work / "data").mkdir()
    (work / "data" / "shard.bin").write_bytes(b"0" * 100)
    (work / "prices.yaml").write_text("aws-spot: 0.4\n")
    assert submit(api, "train.steps=7", "cost.price_file=prices.yaml") == 0
    ((job_id, job),) = api.jobs.items()
    files = api.unpack(job_id)
    assert set(files) == {"run.yaml", "models.py", "prices.yaml", ".solvent/config.yaml", ".solvent/prices.yaml"}
    config = yaml.safe_load(files[".solvent/config.yaml"])
    assert (config["run"], config["train"]["steps"]) == ("mine", 7)
    assert config["cost"]["price_file"] == ".solvent/prices.yaml"
    assert job["entrypoint"] == "exec solvent train .solvent/config.yaml"
    assert job["metadata"]["solvent_run"] == "/mnt/runs/mine"
    assert job["runtime_env"]["env_vars"]["RAY_JOB_STOP_SIGNAL"] == "SIGINT"
    assert job_id.startswith("solvent-mine-") and job_id.endswith("-1")
    assert TOKEN not in json.dumps(api.jobs) + capsys.readouterr().err


def test_the_same_package_is_sent_once_and_each_attempt_has_an_id_of_its_own(api, work):
    api.play = finish
    assert submit(api) == submit(api) == 0
    assert [job_id[-2:] for job_id in api.jobs] == ["-1", "-2"]
    assert len([request for request in api.requests if request.startswith("PUT")]) == 1


@pytest.mark.parametrize(
    ("status", "driver", "message", "expected", "said"),
    [
        ("SUCCEEDED", 0, "", 0, ""),
        ("FAILED", 2, "failed with exit code 2\nsolvent: data.path='x' does not exist", 2, "data.path='x'"),
        ("FAILED", 3, "failed\nsolvent: storage: full", 3, "storage: full"),
        ("FAILED", 4, "failed\nsolvent: no offer", 4, "no offer"),
        ("FAILED", 1, "failed\nsolvent: lower optim.lr", 1, "lower optim.lr"),
        ("FAILED", -9, "failed with exit code -9", 1, "the driver was killed (exit code -9)"),
        ("FAILED", 127, "sh: solvent: not found", 1, "no `solvent` on its PATH"),
        ("FAILED", None, "runtime_env setup failed: disk full", 1, "disk full"),
        ("STOPPED", None, "", 3, "it was stopped; the same command resumes it"),
    ],
)
def test_the_exit_code_is_that_of_the_run(api, work, capsys, *, status, driver, message, expected, said):
    api.play = lambda job: job.update(status=status, driver_exit_code=driver, message=message)
    assert submit(api, "--json") == expected
    out, _ = capsys.readouterr()
    result = json.loads(out)
    assert result["exit_code"] == expected and said in result["reason"]


def test_an_answer_that_is_lost_starts_no_second_job(api, work):
    api.play = finish
    api.lost_answers = {"POST /api/jobs/": 1}
    assert submit(api) == 0
    assert len(api.jobs) == 1


def test_the_same_command_follows_the_job_that_runs(api, work, capsys):
    assert submit(api, "--detach") == 0
    (job_id,) = api.jobs
    api.logs[job_id] = "step 1/9  loss 5.0\n"
    api.end(job_id, "SUCCEEDED", exit_code=0)
    api.jobs[job_id]["status"] = "RUNNING"
    ending = threading.Thread(target=lambda: (wait_until_followed(api), api.end(job_id, "SUCCEEDED", exit_code=0)))
    ending.start()
    assert submit(api) == 0
    assert list(api.jobs) == [job_id]
    assert capsys.readouterr().out == "step 1/9  loss 5.0\n"


def test_a_log_is_shown_once_however_often_the_connection_breaks(api):
    proxy = TcpProxy(api.port)
    server = JobServer(f"http://127.0.0.1:{proxy.port}", token=TOKEN)
    api.jobs["j"] = {"submission_id": "j", "status": "RUNNING", "metadata": {}}
    api.logs["j"] = ""
    shown, said, endings = [], [], []
    limits = Limits(patience_s=30, pending_s=30)
    thread = threading.Thread(
        target=lambda: endings.append(follow(server, "j", say=said.append, show=shown.append, limits=limits))
    )
    thread.start()
    lines = [f"step {number}/30  loss \N{GREEK SMALL LETTER ALPHA}{'x' * number}" for number in range(1, 31)]
    for number, line in enumerate(lines):
        api.logs["j"] += line[:5]
        time.sleep(0.02)
        api.logs["j"] += line[5:] + "\n"
        if number in (8, 19):
            proxy.cut()
            time.sleep(0.3)
            proxy.mend()
    api.end("j", "SUCCEEDED", exit_code=0)
    thread.join(30)
    proxy.close()
    assert shown == lines
    assert (endings[0].kind, endings[0].step) == ("finished", 30)


def wait_until_followed(api):
    while not any(request.startswith("GET /api/jobs/solvent-") for request in api.requests):
        time.sleep(0.02)


def test_a_cluster_that_stays_silent_is_given_up_with_the_reason(api, work, capsys):
    api.close()
    assert submit(api, "--patience-s", "0.1") == 1
    assert "does not answer" in capsys.readouterr().err
    assert submit(api, "--detach") == 1
    assert "open the tunnel (ssh -L" in capsys.readouterr().err
    with JobApi(token=TOKEN) as other:  # it answers, and then no more
        other.play = lambda job: job.update(status="RUNNING")
        proxy = TcpProxy(other.port)
        threading.Thread(target=lambda: (wait_until_followed(other), proxy.cut())).start()
        words = ["submit", "run.yaml", "--to", "ray", f"--address=http://127.0.0.1:{proxy.port}", "--patience-s=1"]
        assert main(words) == 1
    assert "the run may go on there" in capsys.readouterr().err


def test_a_driver_that_is_never_started_is_withdrawn_with_a_reason_in_bounded_time(api, work, capsys):
    api.play = lambda job: None
    assert submit(api, "--pending-s", "1") == 1
    assert "was not started within 1 s; it was withdrawn" in capsys.readouterr().err
    api.stop_hangs_s = 60.0  # as Ray's own does
    api.jobs["j"] = {"submission_id": "j", "status": "PENDING"}
    start_s = time.monotonic()
    server = JobServer(api.address, token=TOKEN, ask_s=1.0)
    ending = follow(server, "j", say=print, show=print, limits=Limits(patience_s=30, pending_s=1))
    assert (ending.kind, ending.exit_code) == ("unplaced", 1)
    assert "it could not be withdrawn" in ending.reason
    assert time.monotonic() - start_s < 6


def test_a_run_is_submitted_again_until_it_has_finished(api):
    endings = iter(["forget", fail(-9, "killed"), fail(1, "x"), fail(3, "save failed"), fail(None, "died"), finish])

    def play(job):
        api.logs[job["submission_id"]] = f"step {100 * len(api.jobs)}/900  loss 1\n"
        act = next(endings)
        if act == "forget":
            api.jobs.clear()  # a head that was started anew
        else:
            act(job)

    api.play = play
    said, pauses = [], []
    ending = supervise(api, said, pauses)
    assert (ending.kind, ending.exit_code, ending.attempts) == ("finished", 0, 6)
    assert [job_id[-1] for job_id in api.jobs] == ["2", "3", "4", "5", "6"], "an id is never used twice"
    assert pauses == [4, 2, 2, 2, 2], "the first got nowhere"


def test_attempts_that_get_nowhere_end_in_bounded_number_with_the_last_reason(api):
    def play(job):
        api.logs[job["submission_id"]] = "step 7/900  loss 1\n"
        fail(1, "failed\nsolvent: the loss is not finite")(job)

    api.play = play
    pauses = []
    ending = supervise(api, [], pauses)
    assert ending.exit_code == 1 and len(api.jobs) == 1 + supervising.FRUITLESS_ATTEMPTS
    assert "did not get beyond step 7" in ending.reason and "the loss is not finite" in ending.reason
    assert pauses == [2, 4, 8, 16, 32]


@pytest.mark.parametrize("act", [fail(2, "wrong"), fail(4, "no plan"), lambda job: job.update(status="STOPPED")])
def test_what_another_attempt_cannot_change_is_not_tried_again(api, act):
    api.play = act
    assert supervise(api, [], []).exit_code in (2, 3, 4)
    assert len(api.jobs) == 1


def supervise(api, said, pauses):
    submission = Submission(run="/mnt/runs/mine", prefix="mine-", package=b"PK", entrypoint="x", env={})
    return supervising.supervise(
        JobServer(api.address, token=TOKEN),
        submission,
        say=said.append,
        show=lambda line: None,
        limits=Limits(patience_s=5, pending_s=5),
        sleep=pauses.append,
    )


def test_delete_stops_what_runs_and_says_so_where_it_does_not(api, work, capsys, monkeypatch):
    assert submit(api, "--delete") == 0
    assert "no job of /mnt/runs/mine runs there" in capsys.readouterr().err
    assert submit(api, "--detach") == 0
    assert submit(api, "--delete") == 0
    assert "stopped" in capsys.readouterr().err
    assert submit(api, "--detach") == 0
    api.jobs[list(api.jobs)[-1]]["status"] = "RUNNING"
    api.stop_hangs_s = 0.01
    monkeypatch.setattr("cluster.cli._submit_ray.DELETE_S", 0.1)
    assert submit(api, "--delete") == 1
    assert "is still running though it was asked to stop" in capsys.readouterr().err


def age(api, work, monkeypatch):
    api.ray_version = "2.9.0"
    return []


def forget_the_token(api, work, monkeypatch):
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    return []


def point_at_the_gcs(api, work, monkeypatch):
    return ["--address", "127.0.0.1:6379"]


def point_in_the_open(api, work, monkeypatch):
    return ["--address", "http://8.8.8.8:8265"]


def point_nowhere(api, work, monkeypatch):
    return ["--address", "ftp://127.0.0.1"]


def put_a_login_into_the_address(api, work, monkeypatch):
    return ["--address", f"http://me:{SECRET}@127.0.0.1:8265"]


def keep_the_run_here(api, work, monkeypatch):
    return ["storage=runs"]


def keep_the_data_here(api, work, monkeypatch):
    return ["data.path=data/kjv"]


def keep_a_source_here(api, work, monkeypatch):
    return ["data.path=", "data.sources.web.path=data/web"]


def keep_the_run_in_no_known_store(api, work, monkeypatch):
    return ["storage=ftp://host/runs"]


def type_a_secret(api, work, monkeypatch):
    return ["--secret", f"WANDB_API_KEY={SECRET}"]


def type_a_value(api, work, monkeypatch):
    return ["--env", f"NAME={SECRET}"]


def send_a_secret(api, work, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", SECRET)
    return ["--env", "WANDB_API_KEY"]


def send_what_is_not_there(api, work, monkeypatch):
    return ["--env", "NO_SUCH_NAME"]


def send_too_much(api, work, monkeypatch):
    with (work / "weights.bin").open("wb") as file:
        file.truncate(33 << 20)
    return []


def send_too_many(api, work, monkeypatch):
    for number in range(5001):
        (work / f"{number}.txt").touch()
    return []


def send_from_nowhere(api, work, monkeypatch):
    return ["--working-dir", "none"]


def mix_targets(api, work, monkeypatch):
    return ["--profile", "gke-spot"]


@pytest.mark.parametrize(
    ("mistake", "code", "said"),
    [
        (age, 1, "runs ray 2.9.0"),
        (forget_the_token, 1, "Set RAY_AUTH_TOKEN to the head's token"),
        (point_at_the_gcs, 2, "jobs are submitted to the dashboard. Give http://127.0.0.1:8265"),
        (point_in_the_open, 2, "the token would travel there in the clear"),
        (point_nowhere, 2, "is no http://HOST:PORT"),
        (put_a_login_into_the_address, 2, "has a login in it"),
        (keep_the_run_here, 2, "storage=runs would lie in the package"),
        (keep_the_data_here, 2, "data.path=data/kjv would lie in the package"),
        (keep_a_source_here, 2, "data.sources.web.path=data/web would lie in the package"),
        (keep_the_run_in_no_known_store, 2, "storage='ftp://host/runs' is no place that can be opened"),
        (type_a_secret, 2, "take the name of a variable, not 'WANDB_API_KEY' and a value"),
        (type_a_value, 2, "take the name of a variable, not 'NAME' and a value"),
        (send_a_secret, 2, "say --secret WANDB_API_KEY here"),
        (send_what_is_not_there, 2, "there is no such variable here"),
        (send_too_much, 2, "weights.bin (33.0 MiB)"),
        (send_too_many, 2, "more than 32 MiB or 5000 files"),
        (send_from_nowhere, 2, "--working-dir=none is not a folder"),
        (mix_targets, 2, "--profile is for --to kuberay, and this is --to ray"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_mistake_is_one_line_and_submits_nothing(api, work, capsys, monkeypatch, *, mistake, code, said):
    assert submit(api, *mistake(api, work, monkeypatch)) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line and SECRET not in line and TOKEN not in line
    assert api.jobs == {}


def test_the_token_is_found_where_ray_keeps_it(api, work, monkeypatch, tmp_path):
    api.play = finish
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    (tmp_path / ".ray").mkdir()
    (tmp_path / ".ray" / "auth_token").write_text(f"{TOKEN}\n")
    assert submit(api) == 0
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(tmp_path / "none"))
    assert submit(api) == 2
    (tmp_path / ".ray" / "auth_token").rename(tmp_path / "none")
    assert submit(api) == 0


def test_a_run_in_a_bucket_is_known_by_its_url(api, work, monkeypatch):
    api.play = finish
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://store:9000")
    bucket = ["storage=s3://bucket/runs/", "--env", "AWS_ENDPOINT_URL", "--secret", "AWS_SECRET_ACCESS_KEY"]
    assert submit(api, *bucket) == 0
    (job,) = api.jobs.values()
    assert job["metadata"]["solvent_run"] == "s3://bucket/runs/mine"
    assert job["runtime_env"]["env_vars"]["AWS_ENDPOINT_URL"] == "http://store:9000"


def test_a_variable_travels_by_its_name(api, work, monkeypatch):
    api.play = finish
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert submit(api, "--env", "NCCL_DEBUG", "--secret", "WANDB_API_KEY") == 0
    (job,) = api.jobs.values()
    assert job["runtime_env"]["env_vars"]["NCCL_DEBUG"] == "INFO"
    assert job["entrypoint"].startswith('[ -n "$WANDB_API_KEY" ] || { echo ')
    assert Path.cwd() == work
