"""`solvent chaos` for real: a walk of the world's size by lot, with all kinds of faults, ends like an unbroken run."""

import shutil
import tempfile
from itertools import groupby
from pathlib import Path

import pytest

from tests.ray._exact import LOSS_TOLERANCE, compare
from tests.ray._struck import INTERRUPTED, MOST_WORKERS, NUM_NODES, finish, strike
from tests.ray._traces import assert_nothing_left
from tests.ray._walks import BLOWS, plan_walk

pytestmark = [
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),  # one process reads the whole checkpoint
]

SEED = 8
NUM_CHANGES = 12


@pytest.fixture(scope="module")
def walk():
    """The faults, and the sizes of the world that they lead to."""
    return plan_walk(SEED, num_changes=NUM_CHANGES, num_nodes=NUM_NODES, most=MOST_WORKERS)


@pytest.fixture(scope="module")
def struck(walk, data, tmp_path_factory):
    """What `solvent chaos` told, after everything it started was seen to be gone."""
    temporary = Path(tempfile.mkdtemp(prefix="t-"))
    struck = strike(tmp_path_factory.mktemp("struck"), "walk", walk[0], data=data, temporary=temporary)
    print(struck.log)  # shown if a test fails
    assert_nothing_left(temporary)
    shutil.rmtree(temporary)
    return struck


@pytest.fixture(scope="module")
def difference(struck, data, tmp_path_factory):
    """Between the struck run, trained to its end, and one that nothing happened to."""
    return compare(*finish(struck, tmp_path_factory.mktemp("unbroken"), data=data))


def test_every_fault_strikes_in_its_phase_and_the_run_ends_resumable(struck, walk):
    wanted = sorted((row["fault"], row["phase"]) for row in walk[0] if "phase" in row)
    seen = [(f["fault"].split()[0], f["phase"]) for f in struck.result["faults"] if "phase=" in f["fault"]]
    assert struck.result["faults_missed"] == []
    assert sorted(seen) == wanted
    assert {kind for kind, _ in seen} == set(BLOWS)
    assert struck.exit_code == INTERRUPTED


def test_the_world_goes_through_all_sizes_at_least_as_often_as_planned(struck, walk):
    sizes = [size for size, _ in groupby(struck.result["worlds"])]
    assert len(walk[1]) == NUM_CHANGES + 1
    assert len(sizes) >= len(walk[1])
    assert set(sizes) == {1, 2, 3, 4}


def test_no_sample_is_lost_or_repeated(struck, difference):
    assert (struck.result["samples_lost"], struck.result["samples_repeated"]) == (0, 0)
    assert (difference.steps, difference.samples) == (0, 0)


def test_losses_and_final_state_are_those_of_an_unbroken_run(difference):
    assert difference.loss <= LOSS_TOLERANCE
    assert difference.state <= difference.state_tolerance


def test_the_goodput_of_the_ledger_and_of_the_rows_stand_beside_young_s_prediction(struck):
    goodput = struck.result["goodput"]
    print(goodput)
    assert 0 < goodput["paid"] < 1
    assert 0 < goodput["measured"] < 1
    assert goodput["predicted"] == pytest.approx(goodput["measured"], abs=0.15)  # it is of first order
