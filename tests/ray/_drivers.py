"""Drivers and coordinators of runs: how tests end them, and see what they leave."""

import os
import re
import signal

from tests.ray._traces import find_processes, wait_until


def find_own(nodes) -> dict[int, str]:
    """The processes of runs, without those of Ray itself (whose Train keeps one actor per cluster for ever)."""
    ours = re.compile(r"cluster\.(runtime|cli)|ray::(Coordinator|RayTrainWorker|TrainController)")
    return {pid: command[:80] for pid, command in find_processes(nodes.folder).items() if ours.search(command)}


def wait_until_gone(nodes, *, timeout_s=60):
    def find_folders():
        return list(nodes.folder.glob("solvent-*"))

    def is_gone():
        return not find_own(nodes) and not find_folders()

    wait_until(is_gone, timeout_s=timeout_s, what=lambda: f"gone: {find_own(nodes)}, {find_folders()}")


def kill(run) -> None:
    """End the driver as a lost connection or the kernel would."""
    run.driver.kill()
    run.driver.wait()


def committed_steps(run) -> list[int]:
    return sorted(int(path.parent.name.removeprefix("step-")) for path in run.dir.checkpoints.glob("*/COMMITTED"))


def find_coordinators(run) -> list[int]:
    return [pid for pid, command in find_own(run.nodes).items() if "ray::Coordinator" in command]


def kill_coordinator(run) -> int:
    """Kill the run's coordinator as the kernel would; return its process id."""
    # Ray writes the title of a process anew at each call, and whoever reads it at that moment sees none
    (pid,) = wait_until(lambda: find_coordinators(run), timeout_s=60, what=lambda: f"a coordinator\n{run.get_output()}")
    os.kill(pid, signal.SIGKILL)
    return pid
