"""The W&B sink against the real client: offline files read back, and a server that is a stand-in."""

import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from cluster.ledger import CAUSES as LEDGER_CAUSES

ROOT = Path(__file__).parents[2]
FAKE = ROOT.parent / "shared" / "peers" / "fake_wandb.py"
CAUSES = sorted({*LEDGER_CAUSES.values()})
MONEY = {
    **{"usd": 0.5, "usd_per_mtoken": 2.5, "goodput": 0.9, "available_goodput": 0.95, "usd_wasted": 0.07},
    **{f"usd_wasted_{cause}": 0.01 for cause in CAUSES},
}
TRAINER = (
    f"MONEY = {MONEY}"
    + """
import logging, os, signal, sys
from pathlib import Path
from elastic.config import RunConfig, WandbConfig
from elastic.records.rundir import RunDir
from elastic.sinks import wandb
logging.basicConfig(level=logging.WARNING)
storage, mode, first, last, end = sys.argv[1:]
config = RunConfig(storage=storage, run="r", wandb=WandbConfig(mode=mode))
run_dir = RunDir(Path(storage) / "r")
run_dir.root.mkdir(parents=True, exist_ok=True)
sink = wandb.build(config, run_dir)
for step in range(int(first), int(last) + 1):
    sink.write({"step": step, "tokens": 100 * step, "loss": 1 / step, "mfu": None, **MONEY})
if end == "hang":
    print("written", flush=True)
    signal.pause()
sink.close()
"""
)


def start(storage, mode, first, last, end="close", **env):
    clean = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    return subprocess.Popen(
        [sys.executable, "-c", TRAINER, str(storage), mode, str(first), str(last), end],
        env={**clean, "PYTHONPATH": str(ROOT), "HOME": str(storage), **env},
        cwd=storage,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return err


def kill_once(process, arrived):
    assert process.stdout.readline() == "written\n", process.stderr.read()
    deadline_s = time.monotonic() + 12  # wandb's own intervals are 15 s, those that the sink asks for 0.5 and 5 s
    while not arrived() and time.monotonic() < deadline_s:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.communicate()


def read_offline(storage):
    """Return (id, steps) of each directory that a process of the run left, in start order."""
    wandb = shutil.which("wandb", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    found = []
    for directory in sorted((storage / "r" / "wandb").glob("offline-run-*"), key=lambda d: d.stat().st_ctime):
        out = subprocess.run([wandb, "leet", "inspect", directory, "--json"], capture_output=True, check=True).stdout
        records = [json.loads(line) for line in out.splitlines()]
        (run,) = [record["run"]["run_id"] for record in records if record["type"] == "run"]
        text = [json.dumps(record["history"]) for record in records if record["type"] == "history"]
        found.append((run, text))
    return found


@pytest.fixture
def server():
    if not FAKE.exists():
        pytest.skip("the stand-in W&B server (../shared/peers/fake_wandb.py) is not on this machine")
    spec = importlib.util.spec_from_file_location("fake_wandb", FAKE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    fake = module.FakeWandb()
    yield fake
    fake.close()
    fake.srv.server_close()


def test_a_killed_offline_run_keeps_its_rows_and_the_next_process_goes_on_under_its_id(tmp_path):
    kill_once(start(tmp_path, "offline", 1, 4, "hang"), lambda: len(read_offline(tmp_path)[0][1]) == 4)
    finish(start(tmp_path, "offline", 3, 6))  # a rewind by two steps
    (first_id, first), (second_id, second) = read_offline(tmp_path)
    assert first_id == second_id
    assert (len(first), len(second)) == (4, 4)
    assert "train/loss" in first[0]
    assert "cost/usd" in first[0]
    assert not list(tmp_path.glob("wandb"))  # all of it lies below the run's directory


def test_online_rows_of_all_attempts_reach_one_run_although_steps_repeat(tmp_path, server):
    env = {"WANDB_BASE_URL": server.url, "WANDB_API_KEY": "a" * 40}
    kill_once(start(tmp_path, "online", 1, 4, "hang", **env), lambda: any(map(len, server.history.values())))
    assert "WARNING" not in finish(start(tmp_path, "online", 3, 6, **env))
    (rows,) = server.history.values()
    assert [row["train/step"] for row in rows] == [1, 2, 3, 4, 3, 4, 5, 6]
    assert [row["train/tokens"] for row in rows] == [100, 200, 300, 400, 300, 400, 500, 600]
    (summary,) = server.summary.values()
    assert summary["train/step"] == 6
    keys = {"usd": 0.5, "usd_per_mtoken": 2.5, "goodput": 0.9, "available_goodput": 0.95, "wasted_usd": 0.07}
    keys |= {f"wasted/{cause}": 0.01 for cause in CAUSES}
    assert {key.removeprefix("cost/"): value for key, value in rows[-1].items() if key.startswith("cost/")} == keys


def test_the_environment_names_project_group_name_and_place_where_the_configuration_does_not(tmp_path):
    (tmp_path / "w").mkdir()
    env = {"WANDB_PROJECT": "p", "WANDB_RUN_GROUP": "g", "WANDB_NAME": "n", "WANDB_DIR": str(tmp_path / "w")}
    assert "WARNING" not in finish(start(tmp_path, "auto", 1, 2, **env))
    wandb = shutil.which("wandb", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    (folder,) = (tmp_path / "w" / "wandb").glob("offline-run-*")
    out = subprocess.run([wandb, "leet", "inspect", folder, "--json"], capture_output=True, check=True).stdout
    (run,) = [record["run"] for record in map(json.loads, out.splitlines()) if record["type"] == "run"]
    assert (run["project"], run["run_group"], run["display_name"]) == ("p", "g", "n")


@pytest.mark.parametrize("env", [{"WANDB_MODE": "disabled"}, {"WANDB_DISABLED": "true"}])
def test_the_environment_can_turn_it_off(tmp_path, env):
    finish(start(tmp_path, "auto", 1, 2, **env))
    assert not (tmp_path / "r" / "wandb").exists()


def test_what_the_configuration_overrules_is_told_in_one_line(tmp_path):
    err = finish(start(tmp_path, "offline", 1, 1, WANDB_MODE="online", WANDB_RUN_ID="mine"))
    (line,) = [line for line in err.splitlines() if "WARNING" in line]
    assert "WANDB_MODE=online (wandb.mode=offline), WANDB_RUN_ID" in line


def test_an_unreachable_server_costs_one_warning_and_no_row(tmp_path):
    err = finish(start(tmp_path, "online", 1, 3, WANDB_BASE_URL="http://127.0.0.1:9", WANDB_API_KEY="a" * 40))
    assert err.count("WARNING") == 1
    assert "goes on offline" in err
    ((_, rows),) = read_offline(tmp_path)
    assert len(rows) == 3


def test_online_without_a_key_goes_offline_and_does_not_ask(tmp_path):
    assert "no API key" in finish(start(tmp_path, "online", 1, 3))
    ((_, rows),) = read_offline(tmp_path)
    assert len(rows) == 3
