"""DeepSpeed's ZeRO computes what one rank computes, and its state goes to and from every other strategy."""

import os
import warnings
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest

from elastic.checkpoint.checkpointer import Checkpointer
from elastic.checkpoint.restore.load import restore
from elastic.config import DeepSpeedConfig
from elastic.ports import Progress
from elastic.storage import open_storage
from elastic.training.step import build_trainable, eval_loss, train_step
from elastic.world import World
from tests.distributed._ranks import in_world, run_ranks
from tests.distributed._tiny import CONFIG, full_weights, global_batch, rank_microbatches, train

pytestmark = [
    pytest.mark.timeout(300),
    pytest.mark.skipif(find_spec("deepspeed") is None, reason="DeepSpeed is not installed (the extra `deepspeed`)"),
]

STAGES = (1, 2, 3)
JOURNEY = (("fsdp2", 2), ("deepspeed", 3), ("deepspeed", 2), ("deepspeed", 3), ("fsdp2", 3))
STEPS_EACH = 3


def let_deepspeed_warn():
    """Let it warn of itself in this rank's process, which turns warnings into errors."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.simplefilter("default")


def configure(strategy, stage=3):
    ours = DeepSpeedConfig(stage=stage) if strategy == "deepspeed" else DeepSpeedConfig()
    return replace(CONFIG, strategy=strategy, deepspeed=ours)


def five_steps(config, world: World):
    trainable = build_trainable(config, world)
    steps = train(trainable, world, steps=5)
    validation = eval_loss(trainable, rank_microbatches(global_batch(99), world), world)
    trainable.optimizer.refresh()
    return [(step.loss, step.grad_norm) for step in steps], validation, full_weights(trainable)


def train_stages(rank, port, world_size):
    let_deepspeed_warn()
    return [
        in_world(
            lambda world, stage=stage: five_steps(configure("deepspeed", stage), world),
            rank,
            port,
            world_size=world_size,
            attempt=stage,
        )
        for stage in STAGES
    ]


def train_alone(rank, port):
    return in_world(lambda world: five_steps(configure("single"), world), rank, port, world_size=1, attempt=1)


def travel(rank, port, folder, stage, journey):
    """Go on in one world after another, each from the checkpoint of the one before; return the losses of all steps."""
    let_deepspeed_warn()
    losses = []
    for leg, (strategy, world_size) in enumerate(journey):

        def work(world: World, leg=leg, strategy=strategy):
            config, storage = configure(strategy, stage), open_storage(folder)
            trainable = build_trainable(config, world)
            model, optimizer = trainable.model, trainable.optimizer
            restored = restore(storage, model, optimizer, config=config, device=world.device)
            assert (restored.progress.step if restored else 0) == leg * STEPS_EACH
            for step in range(leg * STEPS_EACH, (leg + 1) * STEPS_EACH):
                batch = rank_microbatches(global_batch(step), world)
                losses.append(train_step(trainable, batch, lr=3e-3, max_grad_norm=1.0, world=world).loss)
            optimizer.refresh()
            checkpointer = Checkpointer(storage, config, device=world.device, generation=leg + 1)
            progress = Progress(step=(leg + 1) * STEPS_EACH, tokens=1)
            assert checkpointer.save_now(model, optimizer, progress=progress, extra={})
            checkpointer.close()

        in_world(work, rank, port, world_size=world_size, attempt=leg + 1)
    return losses


@pytest.fixture(scope="module")
def alone():
    return run_ranks(train_alone, 1)[0]


@pytest.mark.parametrize("world_size", [2, 3])
def test_every_stage_has_the_losses_norms_and_weights_of_one_rank(alone, world_size):
    losses, validation, weights = alone
    for stage, found in zip(STAGES, run_ranks(train_stages, world_size, world_size)[0], strict=True):
        np.testing.assert_allclose(found[0], losses, rtol=2e-5, err_msg=f"stage {stage}")
        assert found[1] == pytest.approx(validation, rel=2e-5), stage
        for name, weight in weights.items():
            np.testing.assert_allclose(found[2][name], weight, atol=2e-5, err_msg=f"stage {stage}: {name}")


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_goes_from_fsdp2_to_deepspeed_and_back_on_other_worlds_as_if_it_had_stayed(stage, tmp_path):
    stayed = run_ranks(travel, 2, str(tmp_path / "stayed"), 3, [("fsdp2", 2)] * len(JOURNEY))[0]
    went = run_ranks(travel, 3, str(tmp_path / "went"), stage, JOURNEY)[0]
    assert len(went) == len(stayed) == len(JOURNEY) * STEPS_EACH
    np.testing.assert_allclose(went, stayed, rtol=1e-4)
