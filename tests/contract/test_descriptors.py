"""How many hosts a coordinator may hold on a machine that starts processes with few descriptors."""

import subprocess
import sys

import pytest

from cluster.runtime.coordinator.descriptors import OTHERS, describe_shortage

COORDINATOR = """
import resource, sys, tempfile
from dataclasses import asdict
from cluster.runtime.coordinator import actor as module
from cluster.runtime.coordinator.actor import Coordinator, Session
from elastic.config import RunConfig
from tests.bench_coordinator import stand_in_for_ray

resource.setrlimit(resource.RLIMIT_NOFILE, (200, 300))
module.adapter = stand_in_for_ray(int(sys.argv[1]))
with tempfile.TemporaryDirectory() as folder:
    config = asdict(RunConfig(storage=folder, run="r"))
    coordinator = Coordinator(config, session=Session(id="s", secret="s"))
    coordinator.attach("d", config)
    lines = []
    while not any("open files" in line for line in lines) and len(lines) < 50:
        lines += coordinator.poll("d").lines or [""]
        module.time.sleep(0.05)
    print(resource.getrlimit(resource.RLIMIT_NOFILE), [line for line in lines if "open files" in line], flush=True)
    import os
    os._exit(0)
"""


def start_coordinator(num_nodes):
    done = subprocess.run(
        [sys.executable, "-c", COORDINATOR, str(num_nodes)], check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_coordinator_takes_as_many_as_its_machine_allows_and_says_if_these_are_too_few():
    said = start_coordinator(100)  # 300 are allowed, and 100 + 256 are needed
    assert said.startswith("(300, 300) ")
    assert said.count("100 nodes need about 356 open files here, and this machine allows 300") == 1, said


@pytest.mark.parametrize(("limit", "num_hosts"), [(None, 10**6), (1000 + OTHERS, 1000)])
def test_where_all_hosts_can_connect_nothing_is_said(limit, num_hosts):
    assert describe_shortage(limit, num_hosts) == ""
