"""`solvent prepare` on a small file."""

import json

from cluster.cli import main


def prepare(capsys, tmp_path, *options):
    (tmp_path / "a.txt").write_text("the cat sat on the mat and the dog sat on the log. " * 200)
    argv = ["prepare", str(tmp_path / "a.txt"), "--out", str(tmp_path / "out"), "--vocab-size", "300", *options]
    return main([*argv, "--val-fraction", "0"]), capsys.readouterr()


def test_prepare_tells_in_json_what_it_made(capsys, tmp_path):
    code, (out, _) = prepare(capsys, tmp_path, "--json")
    summary = json.loads(out)
    assert code == 0
    assert summary["path"] == str(tmp_path / "out")
    assert 0 < summary["train_tokens"] < 200 * 52  # fewer tokens than characters
    assert summary["val_tokens"] == 0


def test_preparing_into_a_folder_with_data_is_a_user_error(capsys, tmp_path):
    assert prepare(capsys, tmp_path)[0] == 0
    code, (_, err) = prepare(capsys, tmp_path)
    assert code == 2
    assert "--overwrite" in err


def test_a_missing_input_is_a_user_error(capsys, tmp_path):
    assert main(["prepare", str(tmp_path / "none.txt"), "--out", str(tmp_path / "out")]) == 2
    assert "none.txt" in capsys.readouterr().err
