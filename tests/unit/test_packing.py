"""What of a working directory travels to a cluster: code and configuration, no data and no secrets."""

import io
import subprocess
import zipfile

import pytest

from cluster.runtime.jobs import packing
from cluster.runtime.jobs.packing import pack
from elastic.errors import ConfigError

LEFT_OUT = [
    *("data/shard-0.arrow", "runs/mine/metrics.jsonl", "wandb/x", "checkpoints/step-1/a", "models/m.json", "deep/w.pt"),
    *(".git/config", ".venv/bin/python", "deep/__pycache__/a.py", "deep/a.pyc", "node_modules/x.js"),
    *(".env", "deep/.env.local", ".netrc", "key.pem", "deep/id_rsa", ".ssh/config", ".kube/config", "auth_token"),
    *(".aws/credentials", "deep/credentials.json", "kubeconfig.yaml", ".ray/auth_token"),
]
SENT = ["run.yaml", "elastic/data/loader.py", "deep/models/a.py", "deep/runs/b.py", "keys.py", "environment.yaml"]


def make(folder, *names):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)


def names_in(package):
    with zipfile.ZipFile(io.BytesIO(package)) as archive:
        return set(archive.namelist())


@pytest.mark.parametrize("is_git", [False, True], ids=["plain", "git"])
def test_data_runs_environments_and_secrets_stay_here(tmp_path, is_git):
    make(tmp_path, *LEFT_OUT, *SENT)
    if is_git:
        subprocess.run(["rm", "-r", tmp_path / ".git"], check=True)
        subprocess.run(["git", "init", "-q", tmp_path], check=True)
        make(tmp_path, "ignored/x.py", "new.py")
        (tmp_path / ".gitignore").write_text("ignored/\n")
        subprocess.run(["git", "-C", tmp_path, "add", "-f", ".env", "run.yaml"], check=True)
        (tmp_path / "deleted.py").touch()
        subprocess.run(["git", "-C", tmp_path, "add", "deleted.py"], check=True)
        (tmp_path / "deleted.py").unlink()
        assert names_in(pack(tmp_path, added={})) == {*SENT, "new.py", ".gitignore"}
    else:
        assert names_in(pack(tmp_path, added={})) == set(SENT)


def test_the_same_files_make_the_same_bytes(tmp_path):
    make(tmp_path / "a", "run.yaml", "b/c.py")
    make(tmp_path / "b", "b/c.py", "run.yaml")
    one = pack(tmp_path / "a", added={"x/y": b"z"})
    assert one == pack(tmp_path / "b", added={"x/y": b"z"})
    (tmp_path / "b" / "run.yaml").write_text("other")
    assert one != pack(tmp_path / "b", added={"x/y": b"z"})


def test_a_link_out_of_the_folder_is_not_followed(tmp_path):
    make(tmp_path, "outside/secret.txt", "work/a.py")
    (tmp_path / "work" / "file").symlink_to(tmp_path / "outside" / "secret.txt")
    (tmp_path / "work" / "folder").symlink_to(tmp_path / "outside")
    (tmp_path / "work" / "inside").symlink_to("a.py")
    assert names_in(pack(tmp_path / "work", added={})) == {"a.py", "inside"}


@pytest.mark.parametrize("pattern", ["notes", "notes/", "*.txt", "notes/*", "a.txt"])
def test_more_can_be_left_out(tmp_path, pattern):
    make(tmp_path, "run.yaml", "notes/a.txt")
    assert names_in(pack(tmp_path, added={}, excludes=[pattern])) == {"run.yaml"}


def test_what_is_added_wins(tmp_path):
    make(tmp_path, ".solvent/config.yaml")
    with zipfile.ZipFile(io.BytesIO(pack(tmp_path, added={".solvent/config.yaml": b"ours"}))) as archive:
        assert archive.read(".solvent/config.yaml") == b"ours"


def test_a_folder_that_is_too_large_is_refused_with_its_largest_files(tmp_path, monkeypatch):
    monkeypatch.setattr(packing, "MOST_BYTES", 100)
    make(tmp_path, "a.py")
    (tmp_path / "large.bin").write_bytes(b"0" * 90)
    (tmp_path / "middle.bin").write_bytes(b"0" * 20)
    with pytest.raises(ConfigError, match=r"large.bin \(0.0 MiB\), middle.bin.*--exclude PATTERN"):
        pack(tmp_path, added={})
