"""Strangers at the dashboard, as `nodes head` starts it: they read and end nothing, and the run trains on."""

import contextlib
import http.client
import json
import shutil
import signal
import statistics
import tempfile
from pathlib import Path

import pytest

from elastic.processes import list_processes
from elastic.records.rundir import read_rows
from tests.ray._rented import Rented, find_tree
from tests.ray._runs import Run
from tests.ray._strangers import find_ports, get_rss_mib, harass
from tests.ray._traces import find_processes, wait_until

pytestmark = pytest.mark.long

BODY_BYTES = 100_000_000
JOB = json.dumps({"entrypoint": "touch {}", "submission_id": "stranger"})
ASKED = (
    ("GET", "/api/jobs/", ""),
    ("POST", "/api/jobs/", JOB),
    ("POST", "/api/jobs/solvent-r-1/stop", ""),
    ("DELETE", "/api/jobs/solvent-r-1", ""),
    ("PUT", "/api/packages/gcs/_ray_pkg_0123456789abcdef.zip", "x"),
    ("GET", "/nodes?view=summary", ""),
    ("GET", "/logical/actors", ""),
    ("GET", "/logs", ""),
    ("GET", "/api/v0/logs/file?node_id=x&filename=y", ""),
    ("GET", "/worker/traceback?pid=1&ip=127.0.0.1", ""),
)
"""What would read, start or end something."""


@pytest.fixture(scope="module")
def running(data, tmp_path_factory):
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    rented = Rented(folder)
    try:
        rented.start_head()
        rented.join()
        rented.join()
        settings = {"train.steps": 100_000, "checkpoint.every_steps": 1000, "train.global_batch": 192}
        run = Run(rented, data, tmp_path_factory.mktemp("run"), **{**settings, "cluster.max_workers": 2})
        run.start()
        run.wait_for_step(10, world_size=2, timeout_s=240)
        yield run
        run.driver.send_signal(signal.SIGINT)
        assert run.wait() == 3, run.get_output()
    finally:
        rented.close()
        wait_until(lambda: not find_processes(folder), timeout_s=60, what=lambda: f"left: {find_processes(folder)}")
        shutil.rmtree(folder)


def ask(port, method, path, body, *, token=""):
    """Return the status of an answer; 0: there was none."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {token}"} if token else {})
    try:
        connection.request(method, path, body, headers)
        return connection.getresponse().status
    except OSError:
        return 0
    finally:
        connection.close()


def find_dashboard(rented):
    """Return the processes that Ray has for it on the head, and their ports."""
    names = {process.pid: Path(f"/proc/{process.pid}/cmdline") for process in list_processes()}
    found = {}
    for pid in find_tree(rented.head.pid):
        with contextlib.suppress(OSError):
            if b"dashboard" in names[pid].read_bytes():
                found[pid] = find_ports(pid)
    return found


def get_step_times(run, first, last):
    return [row["step_s"] for row in run.rows() if first < row["step"] <= last]


@pytest.mark.parametrize("token", ["", "0" * 64], ids=["none", "another"])
@pytest.mark.parametrize("asked", ASKED, ids=lambda asked: " ".join(asked[:2]))
def test_without_the_token_the_dashboard_neither_tells_nor_starts_nor_ends_anything(running, tmp_path, asked, token):
    method, path, body = asked
    trace = tmp_path / "trace"
    status = ask(running.nodes.dashboard_port, method, path, body.replace("{}", str(trace)), token=token)
    assert status in (401, 403), status
    assert not trace.exists()


def test_strangers_at_the_dashboard_neither_slow_a_step_nor_end_it(running):
    dashboard = find_dashboard(running.nodes)
    port = running.nodes.dashboard_port
    assert port in {number for ports in dashboard.values() for _, number in ports}, dashboard
    start = running.wait_for_step(running.last_row()["step"] + 40)
    usual_s = statistics.median(get_step_times(running, start - 40, start))
    before = {pid: get_rss_mib(pid) for pid in dashboard}
    for address in sorted({address for ports in dashboard.values() for address in ports}):
        step = running.last_row()["step"]
        harass(address)
        running.wait_for_step(step + 1, timeout_s=30)
        print(f"{address}: slowest step {max(get_step_times(running, step, running.last_row()['step'])):.2f} s")
    status = ask(port, "POST", "/api/jobs/", b"a" * BODY_BYTES)  # refused by its header, or while it comes
    assert status in (0, 401, 403, 413), status
    last = running.wait_for_step(running.last_row()["step"] + 5)
    grown = {pid: get_rss_mib(pid) - rss for pid, rss in before.items()}
    times_s = get_step_times(running, start, last)
    print(f"usual step {usual_s:.2f} s, slowest {max(times_s):.2f} s; Ray's processes grew by {grown} MiB")
    assert {row["attempt"] for row in running.rows()} == {1}
    assert list(read_rows(running.dir.incidents)) == []
    assert max(times_s) < 3 * usual_s
    assert max(grown.values()) < 60, "Ray's own, whose memory is not ours to bound to 20 MiB"
    assert ask(port, "GET", "/api/version", "", token=running.nodes.token) == 200, "it serves who knows the token"
