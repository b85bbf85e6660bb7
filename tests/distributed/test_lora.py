"""Adapters beside frozen weights: what is trained, what is saved, and that no change of the world changes either."""

import json
import random
from dataclasses import replace

import pytest
import torch

from cluster.cli import main
from elastic.checkpoint.format.manifest import list_committed, read_manifest
from elastic.checkpoint.hf.saved import SavedWeights
from elastic.checkpoint.restore.base import load_base
from elastic.checkpoint.restore.load import restore
from elastic.checkpoint.train_state import get_local
from elastic.config import ClusterConfig
from elastic.errors import CheckpointError, ConfigError
from elastic.ports import Finished, Interrupted, Notice
from elastic.storage import open_storage
from elastic.training.step import build_trainable
from elastic.tuning import LoraConfig, count_frozen_bytes, get_adapter_shapes
from tests.distributed._loops import Watcher, train_rank, write_data
from tests.distributed._lora import LORA, MODEL, MODELS, import_theirs, make_lora_config, write_theirs
from tests.distributed._ranks import in_world, run_ranks
from tests.distributed._tiny import train

SHAPES = get_adapter_shapes(MODEL, LORA)


class LeaveAfter:
    """The notices of a rank that must go once it has seen a step."""

    def __init__(self, watcher, step):
        self.watcher, self.step = watcher, step

    def get_notice(self):
        if not self.watcher.rows or self.watcher.rows[-1]["step"] < self.step:
            return None
        return Notice(source="a test", deadline_s=None, keep_in="storage")


def live_through(rank, port, config, worlds):
    """Train in one world after the other (ranks, strategy, step after which the last rank goes)."""
    lives = []
    for attempt, (world_size, strategy, step) in enumerate(worlds, start=1):
        watcher = Watcher()
        notices = LeaveAfter(watcher, step) if rank == world_size - 1 else None
        place = {"world_size": world_size, "attempt": attempt, "watcher": watcher, "notices": notices}
        lives.append(train_rank(replace(config, strategy=strategy), rank, port, **place))
    return lives


def read_adapters(config):
    """Return the last checkpoint's step and tensors."""
    storage = open_storage(f"{config.storage}/{config.run}")
    checkpoint = list_committed(storage)[-1]
    manifest = read_manifest(storage, checkpoint)
    weights = SavedWeights(storage, checkpoint, manifest)
    state = {name: torch.cat([torch.from_numpy(p.copy()) for p in weights.read(name)]) for name in SHAPES}
    return checkpoint.step, manifest, state


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("lora")
    write_data(folder)
    write_theirs(folder / "theirs")
    return folder


def check_equal_to_unbroken(folder, name, worlds, *, steps, tune="lora"):
    config, unbroken = (make_lora_config(folder, run, steps=steps, tune=tune) for run in (name, f"{name}-unbroken"))
    for each in (config, unbroken):
        import_theirs(folder / "theirs", each)
    (alone,) = run_ranks(live_through, 1, unbroken, [(1, "auto", 10**6)])[0]
    lives = run_ranks(live_through, 3, config, worlds)[0]
    assert [type(outcome) for outcome, _ in lives] == [Interrupted] * (len(worlds) - 1) + [Finished]
    expected = {row["step"]: row["loss"] for row in alone[1]}
    assert expected[steps] < expected[1] - 0.5, "else equal losses would prove nothing"
    seen = {row["step"]: row["loss"] for _, rows in lives for row in rows}
    assert seen == pytest.approx(expected, rel=1e-5)
    (step, manifest, state), (_, _, other) = read_adapters(config), read_adapters(unbroken)
    assert step == steps
    for tensor, value in other.items():
        torch.testing.assert_close(state[tensor], value, rtol=1e-3, atol=1e-4)
    return manifest


@pytest.mark.parametrize("tune", ["lora", "qlora"])
def test_changes_of_world_and_strategy_do_not_change_what_adapters_learn_and_only_they_are_saved(folder, tune):
    worlds = [(1, "auto", 2), (3, "fsdp2", 5), (2, "ddp", 7), (3, "ddp", 9), (2, "fsdp2", 10**6)]
    manifest = check_equal_to_unbroken(folder, f"short-{tune}", worlds, steps=12, tune=tune)
    shapes = get_adapter_shapes(MODELS[tune], LORA)
    moments = [f"optim.{name}.{kind}" for name in shapes for kind in ("exp_avg", "exp_avg_sq", "step")]
    assert manifest.tensors.keys() == {*(f"model.{name}" for name in shapes), *moments}
    num_adapters = sum(rows * columns for rows, columns in shapes.values())
    saved_bytes = sum(chunk.num_bytes for record in manifest.tensors.values() for chunk in record.chunks)
    assert saved_bytes == 12 * num_adapters + 4 * len(shapes)


@pytest.mark.long
def test_twelve_random_changes_of_the_world_do_not_change_what_adapters_learn(folder):
    lot = random.Random(7)
    worlds, step = [], 0
    for _ in range(12):
        step += lot.randint(3, 5)  # a world leaves a step or two after it was told to
        size = lot.randint(1, 3)
        worlds.append((size, lot.choice(["fsdp2", "ddp", "auto"]), step))
    worlds.append((2, "fsdp2", 10**6))
    check_equal_to_unbroken(folder, "long", worlds, steps=step + 4)


def _look(world, config):
    trainable = build_trainable(config, world)
    before = {name: param.detach().clone() for name, param in trainable.model.named_parameters()}
    losses = [result.loss for result in train(trainable, world, steps=4, lr=1e-2)]
    params = dict(trainable.model.named_parameters())
    changed = {name for name, param in params.items() if not torch.equal(before[name], param.detach())}
    held = {id(param) for group in trainable.optimizer.param_groups for param in group["params"]}
    return (
        losses,
        changed,
        {name for name in params if id(params[name]) in held},
        {name: param.dtype for name, param in params.items()},
    )


def look(rank, port, config):
    return in_world(lambda world: _look(world, config), rank, port, world_size=1, attempt=1)


@pytest.mark.parametrize("strategy", ["single", "ddp", "fsdp2"])
def test_only_adapters_are_trained_and_frozen_weights_are_held_in_the_type_that_computes(folder, strategy):
    alone = ClusterConfig()
    config = make_lora_config(folder, "any", steps=4, strategy=strategy, precision="bf16", cluster=alone)
    losses, changed, held, dtypes = run_ranks(look, 1, config)[0]
    assert changed == held == SHAPES.keys()
    assert {name for name, dtype in dtypes.items() if dtype == torch.float32} == SHAPES.keys()
    assert set(dtypes.values()) == {torch.float32, torch.bfloat16}
    (precise, *_) = run_ranks(look, 1, replace(config, precision="fp32"))[0]
    assert losses == pytest.approx(precise, rel=0.02) and losses[-1] < losses[0]


def _weigh(world, config):
    trainable = build_trainable(config, world)
    train(trainable, world, steps=2, lr=1e-2)
    frozen = [get_local(param) for param in trainable.model.parameters() if not param.requires_grad]
    return sum(tensor.nbytes for tensor in frozen), {tensor.dtype for tensor in frozen}


def weigh(rank, port, config):
    return in_world(lambda world: _weigh(world, config), rank, port, world_size=2, attempt=1)


@pytest.mark.parametrize(("strategy", "copies"), [("ddp", 2), ("fsdp2", 1)])
def test_frozen_weights_in_4_bits_take_half_a_byte_each_and_stay_so(folder, strategy, copies):
    model = replace(MODEL, dim=256, ffn_dim=512, num_heads=4)
    config = make_lora_config(folder, "any", steps=2, strategy=strategy, precision="bf16", tune="qlora", model=model)
    held, dtypes = zip(*run_ranks(weigh, 2, config), strict=True)
    assert dtypes == ({torch.uint8, torch.bfloat16},) * 2
    num_weights = model.num_layers * sum(rows * columns for rows, columns in model.block_matrices.values())
    others = 2 * (model.num_params - num_weights)
    assert sum(held) == copies * count_frozen_bytes(model, LORA, "qlora", item_bytes=2)
    # rows of 256 and 512: half a byte, a 64th for the block and at most 4 for the row
    assert 0.52 < (sum(held) / copies - others) / num_weights < 0.532


@pytest.mark.parametrize("tune", ["lora", "qlora"])
@pytest.mark.parametrize("recompute", ["selective", "full"])
def test_adapters_learn_the_same_if_activations_are_computed_again(folder, recompute, tune):
    config = make_lora_config(folder, "any", steps=4, strategy="fsdp2", tune=tune)
    losses = run_ranks(look, 1, config)[0][0]
    assert run_ranks(look, 1, replace(config, recompute=recompute))[0][0] == pytest.approx(losses, rel=1e-6)


@pytest.mark.long
@pytest.mark.parametrize("tune", ["lora", "qlora"])
def test_adapters_learn_the_same_if_blocks_are_compiled(folder, tune):
    config = make_lora_config(folder, "any", steps=4, strategy="fsdp2", tune=tune)
    losses = run_ranks(look, 1, config)[0][0]
    assert run_ranks(look, 1, replace(config, compile=True))[0][0] == pytest.approx(losses, rel=1e-5)


def _start(world, config):
    storage = open_storage(f"{config.storage}/{config.run}")
    trainable = build_trainable(config, world, first_weights="undefined")
    try:
        load_base(storage, trainable.model, device=world.device)
        restore(storage, trainable.model, trainable.optimizer, config=config, device=world.device)
    except (CheckpointError, ConfigError) as error:
        return str(error)
    return ""


def start(rank, port, config):
    return in_world(lambda world: _start(world, config), rank, port, world_size=2, attempt=1)


@pytest.mark.parametrize("rank", [0, 1])
def test_damaged_frozen_weights_are_named_and_not_trained_beside(folder, rank, capsys):
    config = make_lora_config(folder, f"damaged-{rank}", steps=4, strategy="fsdp2")
    import_theirs(folder / "theirs", config)
    assert run_ranks(start, 2, config) == ["", ""]
    shards = sorted((folder / "runs" / config.run / "base").glob("*.safetensors"))
    content = bytearray(shards[-rank].read_bytes())
    content[-5 - 2000 * rank] ^= 1
    shards[-rank].write_bytes(content)
    capsys.readouterr()
    assert main(["checkpoint", "verify", f"{config.storage}/{config.run}", "--json"]) == 1
    assert "checksum" in str(json.loads(capsys.readouterr().out)["base_damage"])
    for said in run_ranks(start, 2, config):
        assert "base is damaged" in said and "the checksum does not fit" in said


def test_a_run_that_was_not_imported_or_was_for_something_else_is_refused(folder):
    config = make_lora_config(folder, "other", steps=4)
    assert "solvent checkpoint import" in run_ranks(start, 2, config)[0]
    import_theirs(folder / "theirs", config)
    wider = replace(config, lora=LoraConfig(rank=5, alpha=12.0))
    assert "lora.rank=5, but this run was trained with lora.rank=4" in run_ranks(start, 2, wider)[1]
    packed = make_lora_config(folder, "packed", steps=4, tune="qlora")
    import_theirs(folder / "theirs", packed)
    assert "imported with tune=qlora" in run_ranks(start, 2, replace(packed, tune="lora"))[1]
    whole = replace(config, tune="full", lora=LoraConfig())
    assert "tune=full, but this run was trained with tune=lora" in run_ranks(start_whole, 2, whole)[0]


def _start_whole(world, config):
    trainable = build_trainable(config, world)
    storage = open_storage(f"{config.storage}/{config.run}")
    with pytest.raises(ConfigError) as error:
        restore(storage, trainable.model, trainable.optimizer, config=config, device=world.device)
    return str(error.value)


def start_whole(rank, port, config):
    return in_world(lambda world: _start_whole(world, config), rank, port, world_size=2, attempt=1)
