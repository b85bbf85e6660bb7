"""What `solvent chaos` refuses before anything starts, and what it takes for a save."""

import pytest

from cluster.cli import _struck, main
from elastic.config import RunConfig
from elastic.records.rundir import RunDir


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "neither --faults nor --trace is given"),
        (["--trace", "t.csv", "--nodes", "0"], "--nodes 0 leaves nobody to train"),
        (["--trace", "t.csv", "--steps-after", "0"], "--steps-after 0 ends the run before the last fault shows"),
        (["--trace", "t.csv", "--time-scale", "0"], "--time-scale 0.0 must be above 0"),
        (["--trace", "t.csv", "--notice-s", "-1"], "--notice-s -1.0 must be 0 or more seconds"),
    ],
)
def test_arguments_that_cannot_work_are_refused_with_the_reason(arguments, message, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text("run: r\n")
    assert main(["chaos", str(config), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_a_prediction_needs_a_trace_without_notices_and_a_run_of_chaos(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("cluster.cli.chaos.check_before_paying", lambda config: None)  # there are no data here
    config, trace = tmp_path / "config.yaml", tmp_path / "t.csv"
    config.write_text(f"run: r\nstorage: {tmp_path}\ncluster: {{max_workers: 2}}\n")
    trace.write_text("t_s,nodes\n0,2\n600,1\n1200,2\n")
    earlier = tmp_path / "earlier"
    earlier.mkdir()
    arguments = ["chaos", str(config), "--trace", str(trace), "--predict-from", str(earlier)]
    assert main([*arguments, "--notice-s", "5"]) == 2
    assert "--predict-from needs a --trace without --notice-s" in capsys.readouterr().err
    assert main(arguments) == 2
    assert "has no chaos.json" in capsys.readouterr().err
    (earlier / "chaos.json").write_text('{"faults": []}')
    assert main(arguments) == 2
    assert "one of each is needed" in capsys.readouterr().err
    assert not (tmp_path / "r").exists()


def test_a_checkpoint_is_being_saved_from_its_first_file_to_its_commit_and_not_while_an_old_one_is_removed(tmp_path):
    config = RunConfig(run="r", storage=str(tmp_path))
    folder = RunDir(tmp_path / "r").checkpoints
    is_saving = lambda: _struck.is_saving(config)  # noqa: E731
    assert not is_saving()
    for step in (10, 20):
        (folder / f"step-{step:08d}").mkdir(parents=True)
        assert is_saving()
        (folder / f"step-{step:08d}" / "COMMITTED").touch()
        assert not is_saving()
    (folder / "step-00000010" / "COMMITTED").unlink()
    assert not is_saving()
