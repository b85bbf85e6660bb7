"""A run along a recorded fleet comes to what was predicted before it began, from a short run that measured the machine.

    python -m pytest -m long tests/ray/test_predicted_goodput.py -s

Six minutes: a calibration of one and a half, and the fleet of a day four hundred times as fast.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import yaml

from elastic.records.rundir import parse_utc, read_rows
from tests.ray._nodes import PACED, get_env
from tests.ray._runs import SOLVENT, TINY
from tests.ray._struck import INTERRUPTED
from tests.ray._traces import assert_nothing_left

ROOT = Path(__file__).parents[2]
TRACE = ROOT.parent / "shared" / "data" / "spot-traces" / "bamboo_gcp_a100_useast1b.csv"
CALIBRATION = ROOT / "configs" / "faults-calibrate.yaml"
pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not TRACE.exists(), reason="the recorded fleet is not here"),
]
WITHIN = 0.03
"""Points of goodput."""


def run_chaos(folder, name, *arguments, data, temporary):
    """Return what `solvent chaos --json` printed of a run of three nodes, and its directory."""
    config = folder / "tiny.yaml"
    config.write_text(yaml.safe_dump(TINY))
    overrides = {"run": name, "storage": folder / "runs", "data.path": data, "train.steps": 100_000}
    done = subprocess.run(
        [
            *(sys.executable, "-c", SOLVENT, "chaos", config, *arguments, "--nodes", "3", "--json"),
            *(f"{key}={value}" for key, value in overrides.items()),
            "checkpoint.every_steps=40",
        ],
        env={**get_env(temporary), **PACED},
        cwd=folder,
        stdout=subprocess.PIPE,
        text=True,
        check=False,
    )
    assert done.returncode == INTERRUPTED
    return json.loads(done.stdout), folder / "runs" / name


@pytest.fixture(scope="module")
def along(data, tmp_path_factory):
    folder, temporary = tmp_path_factory.mktemp("predicted"), Path(tempfile.mkdtemp(prefix="t-"))
    places = {"data": data, "temporary": temporary}
    _, calibration = run_chaos(folder, "calibration", "--faults", CALIBRATION, "--steps-after", "300", **places)
    how = ("--trace", TRACE, "--time-scale", "400", "--predict-from", calibration)
    result, run_dir = run_chaos(folder, "along", *how, **places)
    assert_nothing_left(temporary)
    shutil.rmtree(temporary)
    print(f"load {os.getloadavg()}; predicted {result['prediction']}; realised {result['goodput']}")
    return result, run_dir


def test_the_prediction_was_written_down_before_the_first_step(along):
    result, run_dir = along
    written = json.loads((run_dir / "prediction.json").read_text())
    first = next(iter(read_rows(run_dir / "metrics.jsonl")))
    assert written == result["prediction"]
    assert parse_utc(written["at_utc"]) < parse_utc(first["time_utc"]) - first["step_s"]


def test_goodput_is_what_was_predicted(along):
    """Of the time. What is paid is told only: it goes by how long machines take to join, here Ray on two cores."""
    result, _ = along
    assert result["faults_missed"] == []
    assert result["prediction"]["losses"] == result["goodput"]["num_losses"] == 4
    assert result["goodput"]["measured"] == pytest.approx(result["prediction"]["measured"], abs=WITHIN)


def test_no_sample_is_lost_or_repeated(along):
    result, _ = along
    assert (result["samples_lost"], result["samples_repeated"]) == (0, 0)
