"""A model of others becomes a run, trains on several ranks, and goes back: with transformers at both ends."""

import json
import subprocess
import sys

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from cluster.cli import main
from elastic import plugins
from elastic.checkpoint.format.manifest import COMMITTED, get_directory
from elastic.checkpoint.restore.load import restore
from elastic.checkpoint.train_state import get_live_state
from elastic.config_load import load
from elastic.data.preparation.prepare import prepare
from elastic.data.prepared.shards import open_dataset
from elastic.ports import WorldSpec
from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, read_rows
from elastic.storage import open_storage
from elastic.training.step import build_trainable
from elastic.world import close_world, open_store, open_world
from tests.distributed._launch import ROOT, Ranks, read_samples

SHAPE = {
    "vocab_size": 320,  # more than the tokenizer has, as is usual
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 96,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": None,
    "dtype": torch.bfloat16,
}
TEXT = "In the beginning God created the heaven and the earth. And the earth was without form, and void.\n"
CONFIG = {
    "strategy": "fsdp2",
    "device": "cpu",
    "data": {"seq_len": 16},
    "train": {"steps": 4, "global_batch": 8, "micro_batch": 4, "eval_samples": 4},
    "optim": {"lr": 1e-2},
    "checkpoint": {"every_steps": 2},
    "wandb": {"mode": "disabled"},
}


def make_theirs(folder, model_type):
    """Save a random model in bf16, as models are published, with a tokenizer that has a setting of its own."""
    tokenizer_from = folder.parent / "tokenizer"
    (folder.parent / "text.txt").write_text(TEXT * 40)
    prepare([str(folder.parent / "text.txt")], tokenizer_from, vocab_size=300, val_fraction=0.0, num_processes=1)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_from, eos_token="<|endoftext|>", model_max_length=77)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SHAPE))
    for parameter in theirs.parameters():
        if parameter.ndim == 1:
            parameter.data += 0.2 * torch.randn(parameter.shape).bfloat16()
    theirs.save_pretrained(folder, max_shard_size="30KB")
    data = folder.parent / "data"
    arguments = {"tokenizer": folder / "tokenizer.json", "val_fraction": 0.3, "num_processes": 1}
    (folder.parent / "lines.jsonl").write_text("".join(json.dumps({"text": f"{i}. {TEXT}"}) + "\n" for i in range(60)))
    prepare([str(folder.parent / "lines.jsonl")], data, **arguments)
    return theirs, data


def solvent(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


@torch.no_grad()
def get_loss(model, dataset, ids):
    tokens = torch.stack([torch.from_numpy(dataset.read("train", i, CONFIG["data"]["seq_len"])) for i in ids])
    logits = model(tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten()).item()


@pytest.mark.parametrize("model_type", plugins.get_names("elastic.checkpoint.hf.families"))
def test_a_model_of_others_trains_on_from_what_it_was_and_goes_back(model_type, tmp_path, capsys):
    theirs, data = make_theirs(tmp_path / "theirs", model_type)
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    where = (f"storage={tmp_path / 'runs'}", "run=tuned", f"data.path={data}", "data.record_samples=true")
    run = RunDir(tmp_path / "runs" / "tuned")
    imported = solvent(capsys, "checkpoint", "import", tmp_path / "theirs", config, *where, "--json")
    assert imported["start"] == f"solvent train {run.config}"
    assert imported["num_params"] == sum(parameter.numel() for parameter in theirs.parameters())
    assert load(run.config).model.max_positions == 96 and run.origin.exists()

    # before any training it comes back as it was, to the bit
    solvent(capsys, "checkpoint", "export", run.root, "--out", tmp_path / "same", "--dtype", "bf16", "--json")
    same = AutoModelForCausalLM.from_pretrained(tmp_path / "same")
    assert type(same) is type(theirs)
    assert same.state_dict().keys() == theirs.state_dict().keys()
    assert [n for n, p in theirs.state_dict().items() if not torch.equal(same.state_dict()[n], p)] == []

    # it trains on two ranks
    with Ranks(2, str(run.config)) as ranks:
        codes, output = ranks.wait()
    assert codes == [0, 0], output
    rows = final_rows(read_rows(run.metrics))
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert [row["resumed_from"] for row in read_rows(run.attempts)] == ["disk"]
    assert rows[0]["loss"] == pytest.approx(
        get_loss(theirs.float(), open_dataset(data), read_samples(run)[1]), rel=1e-4
    )
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.1

    # and what it has learned goes back, with their tokenizer
    exported = solvent(
        capsys, "checkpoint", "export", run.root, "--out", tmp_path / "ours", "--max-shard-gib", 2e-5, "--json"
    )
    assert exported["step"] == 4 and exported["model_type"] == model_type and len(exported["files"]) > 6
    ours = AutoModelForCausalLM.from_pretrained(tmp_path / "ours")
    assert ours.dtype == torch.float32 and ours.config.eos_token_id == 0
    # the last row's loss is of before the last update
    assert get_loss(ours, open_dataset(data), read_samples(run)[4]) < rows[-1]["loss"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "ours")
    assert tokenizer.model_max_length == 77
    assert tokenizer(TEXT)["input_ids"] == AutoTokenizer.from_pretrained(tmp_path / "theirs")(TEXT)["input_ids"]
    check_states(run, last=ours, first=theirs)


GREEDY = {"do_sample": False, "max_new_tokens": 8, "min_new_tokens": 8}


def continue_text(model, tokens_BS):
    """Choose the likeliest token eight times, without any cache, but never the one that ends a text."""
    for _ in range(8):
        logits_BV = model(tokens_BS)[:, -1]
        logits_BV[:, 0] = -torch.inf
        tokens_BS = torch.cat((tokens_BS, logits_BV.argmax(-1, keepdim=True)), dim=1)
    return tokens_BS[0].tolist()


@torch.no_grad()
def check_states(run, *, last, first):
    """Load what a run wrote as it would itself, on a world of another size: logits of both models of transformers."""
    config = load(run.config, ["strategy=single"])
    store = open_store("127.0.0.1", timeout_s=10)
    place = {"rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1, "attempt": 9}
    spec = WorldSpec(**place, store_host=store.host, store_port=store.port)
    world = open_world(spec, device="cpu", timeout_s=10, store=store)
    trainable = build_trainable(config, world)
    storage, tokens_BS = open_storage(run.root), torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(0))

    def restore_step():
        return restore(storage, trainable.model, trainable.optimizer, config=config, device=world.device).progress.step

    assert restore_step() == 4
    torch.testing.assert_close(last(tokens_BS).logits, trainable.model(tokens_BS), rtol=0, atol=1e-5)
    assert continue_text(trainable.model, tokens_BS[:1, :9]) == last.generate(tokens_BS[:1, :9], **GREEDY)[0].tolist()
    # whatever was loaded before: back at step 0 the moments are zeros
    storage.delete(f"{get_directory(step)}/{COMMITTED}" for step in (2, 4))
    assert restore_step() == 0
    torch.testing.assert_close(first(tokens_BS).logits, trainable.model(tokens_BS), rtol=0, atol=1e-5)
    state = get_live_state(trainable.model, trainable.optimizer)
    assert [name for name, tensor in state.items() if name.startswith("optim.") and tensor.count_nonzero()] == []
    close_world(world)


MEASURE = """
import sys
from cluster.cli import main
assert main(sys.argv[1:]) == 0
print(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1])
"""


def test_neither_way_needs_memory_for_more_than_pieces_of_the_model(tmp_path):
    """300 MiB of weights, the largest tensor 128 MiB, through about 60 MiB: 5 pieces of 16 MiB at most are alive."""

    def measure(*arguments):
        command = [sys.executable, "-c", MEASURE, "checkpoint", *map(str, arguments)]
        result = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT)
        return int(result.stdout.split()[-1]) * 1024

    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump(CONFIG))
    peaks = {}
    for name, vocab_size in (("small", 512), ("large", 2**16)):
        shape = {
            **SHAPE,
            "hidden_size": 512,
            "intermediate_size": 2048,
            "vocab_size": vocab_size,
            "dtype": torch.float32,
        }
        theirs = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **shape))
        theirs.save_pretrained(tmp_path / name)
        num_bytes = 4 * sum(parameter.numel() for parameter in theirs.parameters())
        del theirs
        where = (f"storage={tmp_path / 'runs'}", f"run={name}", f"data.path={tmp_path / 'none'}")
        peaks[name] = measure("import", tmp_path / name, config, *where)
        prepared = tmp_path / "data"
        if not prepared.exists():
            (tmp_path / "text.txt").write_text(TEXT * 40)
            prepare([str(tmp_path / "text.txt")], prepared, vocab_size=300, val_fraction=0.0, num_processes=1)
        out = ("--out", tmp_path / f"{name}-again", "--tokenizer", prepared)
        peaks[f"{name}, export"] = measure("export", tmp_path / "runs" / name, *out)
    print({name: f"{peak / 2**20:.0f} MiB" for name, peak in peaks.items()}, f"{num_bytes / 2**20:.0f} MiB of weights")
    assert num_bytes > 300 * 2**20
    assert peaks["large"] - peaks["small"] < 96 * 2**20
    assert peaks["large, export"] - peaks["small, export"] < 96 * 2**20
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "large-again").state_dict()
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "large").state_dict()
    assert [name for name, tensor in theirs.items() if not torch.equal(again[name], tensor)] == []
