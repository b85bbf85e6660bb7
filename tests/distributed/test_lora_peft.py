"""Adapters beside PEFT itself: the same losses, the same logits from what is written, and back."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from cluster.cli import main
from elastic.checkpoint.restore.base import load_base
from elastic.checkpoint.restore.load import restore
from elastic.config_load import dump, load
from elastic.nn.loss import IGNORE
from elastic.storage import open_storage
from elastic.training.step import build_trainable
from elastic.tuning import LoraConfig
from elastic.world import close_world, open_store, open_world
from tests.distributed._loops import Watcher, train_rank, write_data
from tests.distributed._lora import make_lora_config, write_theirs
from tests.distributed._ranks import run_ranks, spec
from tests.distributed._tiny import global_batch
from tests.distributed._tiny import train as train_steps

# PEFT's own words to transformers 5
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

STEPS, LR = 6, 1e-2
KINDS = {  # what is trained, and its adapters
    "all": ("lora", LoraConfig(rank=4, alpha=12.0)),
    "some": ("lora", LoraConfig(rank=3, alpha=4.5, targets="query,value,down", scaling="sqrt_rank")),
    "in_4_bits": ("qlora", LoraConfig(rank=4, alpha=12.0, targets="query,key,value,gate,down")),
    "in_4_bits_fp32": ("qlora", LoraConfig(rank=4, alpha=12.0, nf4_scales="fp32")),
}


def solvent(capsys, *arguments):
    capsys.readouterr()
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    assert code == 0, captured.err
    return json.loads(captured.out)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("peft")
    write_data(folder)
    write_theirs(folder / "theirs")
    return folder


@pytest.fixture
def world():
    store = open_store("127.0.0.1", timeout_s=10)
    world = open_world(spec(0, store.port, world_size=1, attempt=1), device="cpu", timeout_s=10, store=store)
    yield world
    close_world(world)


def import_run(capsys, folder, name, *more, tune, lora):
    config = make_lora_config(folder, name, steps=STEPS, tune=tune, lora=lora, strategy="fsdp2")
    (folder / f"{name}.yaml").write_text(dump(config))
    solvent(capsys, "checkpoint", "import", folder / "theirs" / tune, folder / f"{name}.yaml", *more, "--json")
    return folder / "runs" / name


def open_run(run, world):
    config = load(run / "config.yaml")
    trainable, storage = build_trainable(config, world, first_weights="undefined"), open_storage(run)
    load_base(storage, trainable.model, device=world.device)
    assert restore(storage, trainable.model, trainable.optimizer, config=config, device=world.device)
    return trainable


def train_theirs(theirs):
    """Train as the text books do: PEFT's model, torch's AdamW and clipping, the mean loss of a batch."""
    params = [param for param in theirs.parameters() if param.requires_grad]
    optimizer = torch.optim.AdamW(params, lr=LR, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    losses = []
    for step in range(STEPS):
        tokens_BS, labels_BS = global_batch(step)
        logits_BSV = theirs(input_ids=tokens_BS).logits
        loss = torch.nn.functional.cross_entropy(logits_BSV.flatten(0, 1), labels_BS.flatten(), ignore_index=IGNORE)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        losses.append(loss.item())
    return losses


@torch.no_grad()
def get_logits(model, tokens_BS):
    out = model(tokens_BS)
    return out if isinstance(out, torch.Tensor) else out.logits


@pytest.mark.parametrize("kind", KINDS)
def test_adapters_have_the_losses_of_peft_and_go_there_and_back(kind, folder, world, capsys):
    tune, lora = KINDS[kind]
    run = import_run(capsys, folder, kind, tune=tune, lora=lora)
    solvent(capsys, "checkpoint", "export", run, "--out", folder / f"{kind}-first", "--to", "peft", "--json")
    # adapters begin without effect: what is merged with them are the frozen weights, rounded to 4 bits or not
    frozen = folder / f"{kind}-frozen"
    solvent(capsys, "checkpoint", "export", run, "--out", frozen, "--json")
    base = AutoModelForCausalLM.from_pretrained(frozen)
    read = AutoModelForCausalLM.from_pretrained(folder / "theirs" / tune).state_dict()
    rounding = max((value - read[name]).abs().max().item() for name, value in base.state_dict().items())
    assert rounding > 1e-3 if tune == "qlora" else rounding == 0
    theirs = PeftModel.from_pretrained(base, folder / f"{kind}-first", is_trainable=True)
    ours = open_run(run, world)
    trained = {param.numel() for param in ours.model.parameters() if param.requires_grad}
    assert trained == {param.numel() for param in theirs.parameters() if param.requires_grad}

    losses = [result.loss for result in train_steps(ours, world, steps=STEPS, lr=LR)]
    assert losses == pytest.approx(train_theirs(theirs), rel=1e-5)
    assert losses[-1] < losses[0] - 0.1, "else equal losses would prove nothing"

    # what PEFT has learned becomes a run of ours, with the rank, scale and places that its files say
    theirs.save_pretrained(folder / f"{kind}-theirs")
    again = import_run(
        capsys, folder, f"{kind}-again", "--adapter", folder / f"{kind}-theirs", tune=tune, lora=replace(lora, rank=7)
    )
    assert (load(again / "config.yaml").tune, load(again / "config.yaml").lora) == (tune, lora)
    tokens_BS = torch.randint(300, (3, 40), generator=torch.Generator().manual_seed(0))
    expected = get_logits(theirs, tokens_BS)
    back = open_run(again, world)
    torch.testing.assert_close(get_logits(back.model, tokens_BS), expected, rtol=0, atol=1e-5)

    # and leaves it merged, and as adapters
    solvent(capsys, "checkpoint", "export", again, "--out", folder / f"{kind}-merged", "--json")
    merged = AutoModelForCausalLM.from_pretrained(folder / f"{kind}-merged")
    torch.testing.assert_close(get_logits(merged, tokens_BS), expected, rtol=0, atol=1e-5)
    solvent(capsys, "checkpoint", "export", again, "--out", folder / f"{kind}-peft", "--to", "peft", "--json")
    plain = AutoModelForCausalLM.from_pretrained(frozen)
    far = (get_logits(plain, tokens_BS) - expected).abs().max()
    assert far > 0.1, "else equal logits would prove nothing"
    reloaded = PeftModel.from_pretrained(plain, folder / f"{kind}-peft")
    torch.testing.assert_close(get_logits(reloaded, tokens_BS), expected, rtol=0, atol=1e-5)


def test_a_run_answers_a_prompt_as_its_exported_model_does(folder, capsys):
    run = import_run(capsys, folder, "asked", tune="lora", lora=KINDS["all"][1])
    said = solvent(capsys, "generate", run, "--prompt", "In the beginning", "--max-tokens", 5, "--json")
    theirs, tokenizer = (
        AutoModelForCausalLM.from_pretrained(folder / "theirs" / "lora"),
        AutoTokenizer.from_pretrained(folder / "data"),
    )
    tokens_BS = tokenizer("In the beginning", return_tensors="pt")["input_ids"]
    expected = theirs.generate(tokens_BS, do_sample=False, max_new_tokens=5)[0, tokens_BS.shape[1] :]
    answer = tokenizer.decode(expected, skip_special_tokens=True)
    assert said == {"run": str(run), "step": 0, "answers": [{"prompt": "In the beginning", "answer": answer}]}


def train_on(rank, port, config):
    return train_rank(config, rank, port, world_size=1, attempt=1, watcher=Watcher())


@pytest.mark.long
def test_following_a_run_gives_answers_from_each_new_checkpoint_until_the_last(folder, capsys):
    run = import_run(capsys, folder, "followed", tune="qlora", lora=LoraConfig(rank=4, alpha=12.0))
    solvent_path = Path(sys.executable).parent / "solvent"
    command = [solvent_path, "generate", run, "--prompt", "In the beginning", "--max-tokens", "3"]
    with subprocess.Popen([*command, "--follow", "--poll-s", "0.1"], stdout=subprocess.PIPE, text=True) as follower:
        try:
            while not (run / "answers" / "step-00000000.json").exists():
                assert follower.poll() is None
                time.sleep(0.1)
            run_ranks(train_on, 1, load(run / "config.yaml"))
            said, _ = follower.communicate(timeout=60)
        finally:
            follower.kill()
    assert follower.returncode == 0
    assert f"step 0 of {STEPS}" in said and f"step {STEPS} of {STEPS}" in said
    kept = {path.name: json.loads(path.read_text()) for path in (run / "answers").iterdir()}
    assert {"step-00000000.json", f"step-{STEPS:08d}.json"} <= kept.keys()
    last = kept[f"step-{STEPS:08d}.json"]
    assert last["step"] == STEPS and last["answers"][0]["prompt"] == "In the beginning"
