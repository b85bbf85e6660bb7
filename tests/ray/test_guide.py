"""What the guides mark as run is run, as written: the rented machines where there is only a loop-back network."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from elastic.records.rundir import RunDir, read_rows
from tests.guide import RENTED, ROOT, find_commands, read_blocks
from tests.ray._nodes import get_env
from tests.ray._runs import TINY
from tests.ray._traces import assert_nothing_left

pytestmark = pytest.mark.long

ISOLATED = ["unshare", "--net", "--pid", "--fork", "--mount-proc", "--kill-child"]
"""The ports that the guide takes for granted are free there."""
SCRIPT = """
ip link set lo up
{head} >head.log 2>&1 &
until curl -s -o /dev/null http://127.0.0.1:8265; do sleep 1; done
{join} >join.log 2>&1 &
join=$!
until grep -q 'Ray runtime started' join.log; do sleep 1; done
{submit}; echo "submit returned $?"
{delete}; echo "delete returned $?"
kill -TERM $join; wait $join; echo "join returned $?"
"""


def test_the_commands_do_what_the_guide_says(data):
    if subprocess.run([*ISOLATED, "true"], check=False, capture_output=True).returncode or not shutil.which("ip"):
        pytest.skip("a network namespace of its own needs root, and iproute2")
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    try:
        own = {"run": "guide", "storage": str(folder / "runs"), "cluster": {"min_workers": 1, "max_workers": 1}}
        config = {**TINY, **own, "data": {**TINY["data"], "path": str(data)}, "train": {**TINY["train"], "steps": 20}}
        (folder / "work").mkdir()
        (folder / "work" / "run.yaml").write_text(yaml.safe_dump(config))
        head, join, submit, delete = find_commands(RENTED, "sh")
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        done = subprocess.run(
            [*ISOLATED, "bash", "-c", SCRIPT.format(head=head, join=join, submit=submit, delete=delete)],
            env={**get_env(folder), "HOME": str(folder), "RAY_TMPDIR": str(folder), "PATH": path},
            cwd=folder / "work",
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )
        logs = [(folder / "work" / name).read_text() for name in ("head.log", "join.log")]
        assert done.stdout.splitlines()[-3:] == ["submit returned 0", "delete returned 0", "join returned 0"], (
            done,
            logs,
        )
        assert "no job of" in done.stderr
        (attempt,) = read_rows(RunDir(folder / "runs" / "guide").attempts)
        assert (attempt["end"], attempt["last_step"]) == ("finished", 20)
        for path in folder.iterdir():
            shutil.rmtree(path)
        assert_nothing_left(folder, timeout_s=30)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_what_the_readme_and_the_guide_of_elastic_show_works_in_their_order():
    """One journey of a newcomer: the environment, data, a run, its report and checkpoints, and a model that leaves."""
    folder = Path(tempfile.mkdtemp(prefix="t-"))
    try:
        (folder / "configs").symlink_to(ROOT / "configs")
        (folder / ".venv").symlink_to(Path(sys.executable).parents[1])
        blocks = [block for guide in ("README.md", "elastic/README.md") for block in read_blocks(guide)]
        script = "".join(
            text if kind == "sh" else f"python <<'END'\n{text}END\n" for kind, text in blocks if kind != "text"
        )
        done = subprocess.run(
            ["bash", "-exc", script],
            env={**get_env(folder), "RAY_TMPDIR": str(folder), "OMP_NUM_THREADS": "1"},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=800,
            check=False,
        )
        assert done.returncode == 0, (done.stdout[-2000:], done.stderr[-4000:])
        ends = {
            name: list(read_rows(RunDir(folder / "runs" / name).attempts))[-1] for name in ("first", "second", "tuned")
        }
        assert {name: (end["end"], end["last_step"]) for name, end in ends.items()} == {
            "first": ("finished", 40),
            "second": ("finished", 40),
            "tuned": ("finished", 2),
        }
        assert (folder / "runs" / "first" / "report.html").exists()
        assert done.stdout.splitlines()[-1].startswith("And it came to pass")
    finally:
        shutil.rmtree(folder, ignore_errors=True)
