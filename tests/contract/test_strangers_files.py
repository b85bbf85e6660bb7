"""Files from a stranger, through the commands that read them: none of their code runs, nothing is written elsewhere."""

import io
import json
import os
import pickle
import tarfile
import zlib
from pathlib import Path

import pytest
import yaml

from tests.contract.test_bad_input import ELASTIC, SOLVENT, call, read_tree, saved  # noqa: F401 (a fixture)
from tests.distributed._launch import ROOT


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, canary):
        self.canary = canary

    def __reduce__(self):
        return os.mknod, (str(self.canary),)


@pytest.fixture
def canary(tmp_path):
    """A file that only a stranger's code would make."""
    path = tmp_path / "canary"
    pickle.loads(pickle.dumps(Payload(path)))  # the payload works
    assert path.exists()
    path.unlink()
    yield path
    assert not path.exists(), "a stranger's code has run"


def tag(canary):
    return f"!!python/object/apply:os.mknod [{canary}]\n"


def write_manifest(directory: Path, manifest: dict) -> None:
    """Commit a manifest again: its checksum finds damage, not forgery."""
    data = json.dumps(manifest).encode()
    (directory / "manifest.json").write_bytes(data)
    (directory / "COMMITTED").write_text(f"crc32:{zlib.crc32(data):08x}")


@pytest.fixture
def stolen(saved, tmp_path):  # noqa: F811
    """A copy of a run with one checkpoint, for a stranger to change."""
    import shutil

    shutil.copytree(saved.storage, tmp_path / "runs")
    (checkpoint,) = (tmp_path / "runs" / "saved" / "checkpoints").iterdir()
    return checkpoint


def where(saved, tmp_path):  # noqa: F811
    return (saved.config, f"storage={tmp_path / 'runs'}", f"data.path={saved.data}")


@pytest.mark.parametrize("verb", ["configuration", "prices", "faults", "override"])
def test_a_yaml_tag_is_refused(saved, tmp_path, canary, verb):  # noqa: F811
    evil = tmp_path / "evil.yaml"
    evil.write_text({"configuration": f"run: {tag(canary)}", "prices": f"aws: {tag(canary)}"}.get(verb, tag(canary)))
    commands = {
        "configuration": ["train", evil],
        "prices": ["train", saved.config, f"data.path={saved.data}", f"cost.price_file={evil}"],
        "faults": ["chaos", saved.config, f"data.path={saved.data}", "--faults", evil],
        "override": ["render", saved.config, "storage=s3://b/r", "data.path=/mnt/solvent/d", "--profile", "generic"],
    }
    words = commands[verb]
    if verb == "override":
        words += ["--set", "image=r.example.com/i:1", "--set", "claim=c", "--override", evil]
    result = call(SOLVENT, *words, PYTHONPATH=str(ROOT))
    assert result.returncode == 2, result.stderr
    assert "python/object/apply" in result.stderr and "Traceback" not in result.stderr


def test_a_pickle_in_a_checkpoint_is_never_loaded(saved, stolen, tmp_path, canary):  # noqa: F811
    """As a DCP checkpoint has it (.metadata), and in the place of each of our files."""
    evil = pickle.dumps(Payload(canary))
    (stolen / ".metadata").write_bytes(evil)
    (stolen / "__0_0.distcp").write_bytes(evil)
    resumed = call(ELASTIC, *where(saved, tmp_path), "train.steps=3")
    assert resumed.returncode == 0, resumed.stderr
    for path in sorted(stolen.iterdir()):
        held = path.read_bytes()
        size_bytes = len(held)
        path.write_bytes(evil.ljust(size_bytes, b"\0")[:size_bytes] if path.suffix == ".safetensors" else evil)
        verified = call(SOLVENT, "checkpoint", "verify", tmp_path / "runs" / "saved")
        assert verified.returncode in (0, 1, 2)
        path.write_bytes(held)


def test_a_pickle_in_a_hugging_face_folder_is_refused(saved, tmp_path, canary):  # noqa: F811
    folder = tmp_path / "hf"
    folder.mkdir()
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 16}
    shape |= {"vocab_size": 300, "rms_norm_eps": 1e-5, "tie_word_embeddings": True, "max_position_embeddings": 64}
    kind = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_act": "silu"}
    (folder / "config.json").write_text(json.dumps({**kind, **shape}))
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Payload(canary)))
    result = call(SOLVENT, "checkpoint", "import", folder, saved.config, f"storage={tmp_path / 'runs'}", "run=new")
    assert result.returncode == 2
    assert "is a pickle" in result.stderr


def test_a_tar_is_no_text_and_is_not_unpacked(tmp_path, canary):
    """One with a path that leads out, a link that leads out, and a device."""
    with tarfile.open(tmp_path / "evil.tar", "w") as archive:
        for name, kind in (("../canary", tarfile.REGTYPE), ("link", tarfile.SYMTYPE), ("dev", tarfile.CHRTYPE)):
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname, entry.size = kind, str(canary), 4 if kind == tarfile.REGTYPE else 0
            archive.addfile(entry, io.BytesIO(b"evil"))
    for name in ("evil.tar", "evil.tar.gz"):
        (tmp_path / name).write_bytes((tmp_path / "evil.tar").read_bytes())
        result = call(SOLVENT, "prepare", tmp_path / name, "--out", tmp_path / "data")
        assert result.returncode == 2
        assert name in result.stderr and "Traceback" not in result.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evil.tar", "evil.tar.gz"]


@pytest.mark.parametrize("path", ["../../../outside", "/etc/passwd"])
def test_a_manifest_whose_paths_lead_out_of_its_folder_is_refused(saved, stolen, tmp_path, path):  # noqa: F811
    path = str(tmp_path / "outside") if path.startswith("/") else path
    manifest = json.loads((stolen / "manifest.json").read_text())
    (name,) = manifest["files"]
    (tmp_path / "outside").write_bytes((stolen / name).read_bytes())
    text = json.dumps(manifest).replace(json.dumps(name), json.dumps(path))
    (stolen / name).unlink()
    write_manifest(stolen, json.loads(text))
    before = read_tree(tmp_path)
    verified = call(SOLVENT, "checkpoint", "verify", tmp_path / "runs" / "saved")
    assert verified.returncode != 0
    assert "Traceback" not in verified.stderr, verified.stderr
    resumed = call(ELASTIC, *where(saved, tmp_path), "train.steps=3")
    assert resumed.returncode != 0 or "step 3/3" in resumed.stdout
    assert "resumed from step 2" not in resumed.stdout
    after = read_tree(tmp_path)
    assert {key: after[key] for key in before if "outside" in str(key)} == {
        key: before[key] for key in before if "outside" in str(key)
    }


def test_a_dataset_whose_shards_lie_elsewhere_is_refused(saved, tmp_path):  # noqa: F811
    import shutil

    shutil.copytree(saved.data, tmp_path / "data")
    info = json.loads((tmp_path / "data" / "dataset.json").read_text())
    info["train"]["shards"][0]["file"] = "../outside.arrow"
    (tmp_path / "data" / "dataset.json").write_text(json.dumps(info))
    result = call(ELASTIC, saved.config, f"storage={tmp_path / 'runs'}", f"data.path={tmp_path / 'data'}", "run=new")
    assert result.returncode == 2
    assert "'../outside.arrow', a file outside of its folder" in result.stderr, result.stderr


def test_a_run_and_its_files_stay_in_their_folder(saved, tmp_path):  # noqa: F811
    for run in ("../elsewhere", "/tmp/elsewhere", "..", "a/b"):
        result = call(ELASTIC, saved.config, f"storage={tmp_path / 'runs'}", f"data.path={saved.data}", f"run={run}")
        assert result.returncode == 2 and "no leading dot or dash" in result.stderr
    config = yaml.safe_load(saved.config.read_text())
    assert config["run"] == "saved"
    assert not (tmp_path / "runs").exists()
