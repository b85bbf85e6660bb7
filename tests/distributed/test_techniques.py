"""Precision, recomputation, compilation and state dicts, in every strategy, in real groups of two ranks."""

from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_model_state_dict,
    set_state_dict,
)

from elastic.checkpoint.train_state import get_local
from elastic.errors import ConfigError
from elastic.nn.loss import IGNORE
from elastic.training.step import Abandoned, build_trainable, eval_loss, train_step
from elastic.world import World
from tests.distributed._ranks import in_world, run_ranks
from tests.distributed._tiny import CONFIG, SEQ_LEN, full_weights, global_batch, rank_microbatches, train

STRATEGIES = ["ddp", "fsdp2", "hsdp"]
FULL = StateDictOptions(full_state_dict=True)


def _gradients(config, world: World):
    trainable = build_trainable(config, world)
    train(trainable, world, steps=1)
    return {
        name: (p.grad.full_tensor() if hasattr(p.grad, "full_tensor") else p.grad).numpy()
        for name, p in trainable.model.named_parameters()
    }


COMPILED = [("ddp", "selective"), ("fsdp2", "selective"), ("fsdp2", "full"), ("fsdp2", "offload")]


def _gradients_of_all_recomputes(world: World):
    return {
        (strategy, precision, recompute): _gradients(
            replace(CONFIG, strategy=strategy, precision=precision, recompute=recompute), world
        )
        for strategy in STRATEGIES
        for precision in ("fp32", "bf16")
        for recompute in ("none", "selective", "full", "offload")
    }


def _compiled_losses(world: World):
    losses = {}
    for strategy, recompute in COMPILED:
        for compiled in (False, True):
            config = replace(CONFIG, strategy=strategy, recompute=recompute, compile=compiled)
            steps = train(build_trainable(config, world), world, steps=3)
            losses[strategy, recompute, compiled] = [(step.loss, step.grad_norm) for step in steps]
    return losses


def _losses_per_precision(world: World):
    losses = {}
    for strategy in STRATEGIES:
        for precision in ("fp32", "bf16", "fp16"):
            trainable = build_trainable(replace(CONFIG, strategy=strategy, precision=precision), world)
            assert {p.dtype for p in trainable.model.parameters()} == {torch.float32}
            losses[strategy, precision] = [step.loss for step in train(trainable, world, steps=40, lr=1e-2)]
    return losses


def _state_dicts(world: World):
    """Train 2 steps, move the whole state to each other strategy, and train 2 more there."""
    results = {}
    for source in STRATEGIES:
        trainable = build_trainable(replace(CONFIG, strategy=source), world)
        train(trainable, world, steps=2)
        model, optimizer = deepcopy(get_state_dict(trainable.model, trainable.optimizer, options=FULL))
        names = {name: sorted(state) for name, state in optimizer["state"].items()}
        groups = [sorted(group["params"]) for group in optimizer["param_groups"]]
        results["names", source] = (sorted(model), names, groups)
        steps = train(trainable, world, steps=2)
        results["loss", source] = [s.loss for s in steps]
        for target in STRATEGIES:
            other = build_trainable(replace(CONFIG, strategy=target, train=replace(CONFIG.train, seed=7)), world)
            set_state_dict(
                other.model,
                other.optimizer,
                model_state_dict=dict(model),  # torch replaces the items of the dict that it is given
                optim_state_dict=deepcopy(optimizer),
                options=FULL,
            )
            results["loss", source, target] = [s.loss for s in train(other, world, steps=2)]
    return results


def _overflows(world: World):
    """Make one rank's gradients infinite once by a huge loss scale; then save and restore the scaler."""
    results = {}
    for strategy in STRATEGIES:
        trainable = build_trainable(replace(CONFIG, strategy=strategy, precision="fp16"), world)
        fine = train(trainable, world, steps=1)[0]
        trainable.scaler.load_state_dict({**trainable.scaler.state_dict(), "scale": 2.0**40})
        before, scales, applied = full_weights(trainable), [], []
        for _ in range(40):
            step = train(trainable, world, steps=1)[0]
            scales.append(trainable.scaler.get_scale())
            applied.append(step.verdict == "good")
            if applied[-1]:
                break
            for name, weight in full_weights(trainable).items():
                np.testing.assert_array_equal(weight, before[name])
        restored = build_trainable(replace(CONFIG, strategy=strategy, precision="fp16"), world)
        restored.scaler.load_state_dict(trainable.scaler.state_dict())
        results[strategy] = (fine.verdict, applied, scales, restored.scaler.get_scale())
    return results


def _set_bad_weight(trainable) -> None:
    state = get_model_state_dict(trainable.model, options=FULL)
    state["norm.weight"][3] = float("nan")
    set_model_state_dict(trainable.model, state, options=FULL)


def _bad_values(world: World):
    results = {}
    for strategy in STRATEGIES:
        trainable = build_trainable(replace(CONFIG, strategy=strategy), world)
        _set_bad_weight(trainable)
        before = full_weights(trainable)
        (step,) = train(trainable, world, steps=1)
        for name, weight in full_weights(trainable).items():
            np.testing.assert_array_equal(weight, before[name])
        moments = [value for state in trainable.optimizer.state.values() for value in state.values()]
        results[strategy] = (step.verdict, str(step.loss), sum(bool(get_local(value).any()) for value in moments))
    return results


def _shared_answers(world: World):
    """Only the last rank has a notice; it has no target token in its second microbatch either."""
    trainable = build_trainable(CONFIG, world)
    order = []
    hook = trainable.optimizer.register_step_pre_hook(lambda *_: order.append("update"))
    microbatches = rank_microbatches(global_batch(0), world)
    if world.rank == world.world_size - 1:
        tokens, labels = microbatches[-1]
        microbatches[-1] = (tokens, torch.full_like(labels, IGNORE))
    options = {"lr": 1e-3, "max_grad_norm": 1.0, "world": world}
    quiet = train_step(trainable, microbatches, **options, before_update=lambda: order.append("before"))
    hook.remove()
    wish = "finish_and_save" if world.rank == world.world_size - 1 else "continue"
    noticed = train_step(trainable, microbatches, **options, get_wish=lambda _: wish)
    before = [id(param) for param in trainable.model.parameters()]
    mean = eval_loss(trainable, microbatches, world)
    assert [id(param) for param in trainable.model.parameters()] == before, "whole parameters were left behind"
    again = train_step(trainable, microbatches, **options)
    return order, quiet, noticed, mean, again


def _abandoned_steps(world: World):
    """Give up a step in each strategy, then train on: what is saved in between must be the state before it."""
    results = {}
    for strategy in STRATEGIES:
        trainable = build_trainable(replace(CONFIG, strategy=strategy), world)
        train(trainable, world, steps=2)
        before = full_weights(trainable)
        params = [id(param) for param in trainable.model.parameters()]
        wishes = {"start": ("save_now", "continue")[world.rank], "end": "continue"}
        abandoned = train_step(
            trainable,
            rank_microbatches(global_batch(2), world),
            lr=1e-3,
            max_grad_norm=1.0,
            world=world,
            get_wish=wishes.__getitem__,
        )
        assert [id(param) for param in trainable.model.parameters()] == params, "whole parameters were left behind"
        for name, weight in full_weights(trainable).items():
            np.testing.assert_array_equal(weight, before[name])
        steps = {int(state["step"]) for state in trainable.optimizer.state.values()}
        results[strategy] = (abandoned, steps)
    return results


def _single_in_a_world_of_two(world: World):
    with pytest.raises(ConfigError, match="strategy=single"):
        build_trainable(replace(CONFIG, strategy="single"), world)


WORKS = [
    _gradients_of_all_recomputes,
    _compiled_losses,
    _losses_per_precision,
    _state_dicts,
    _overflows,
    _bad_values,
    _shared_answers,
    _abandoned_steps,
    _single_in_a_world_of_two,
]


def _all_works(rank: int, port: int):
    return {
        work.__name__: in_world(work, rank, port, world_size=2, attempt=attempt)
        for attempt, work in enumerate(WORKS, start=1)
    }


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(_all_works, 2)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("recompute", ["selective", "full", "offload"])
def test_recomputation_gives_the_same_gradients(ranks, strategy, precision, recompute):
    gradients = ranks[0]["_gradients_of_all_recomputes"]
    kept = gradients[strategy, precision, "none"]
    recomputed = gradients[strategy, precision, recompute]
    assert kept.keys() == recomputed.keys()
    for name in kept:
        np.testing.assert_array_equal(recomputed[name], kept[name], err_msg=name)


@pytest.mark.parametrize(("strategy", "recompute"), COMPILED)
def test_compiled_blocks_give_the_same_loss(ranks, strategy, recompute):
    losses = ranks[0]["_compiled_losses"]
    np.testing.assert_allclose(losses[strategy, recompute, True], losses[strategy, recompute, False], rtol=1e-5)


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_stays_within_1_percent_of_fp32(ranks, strategy, precision):
    losses = ranks[0]["_losses_per_precision"]
    assert losses[strategy, "fp32"][-1] < 0.8 * losses[strategy, "fp32"][0]
    assert losses[strategy, precision] != losses[strategy, "fp32"]
    # single steps scatter by up to 1 %, in both directions
    assert np.mean(losses[strategy, precision][-10:]) == pytest.approx(
        np.mean(losses[strategy, "fp32"][-10:]), rel=0.01
    )


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_state_has_the_same_names_in_every_strategy(ranks, strategy):
    names, moments, groups = ranks[0]["_state_dicts"]["names", strategy]
    assert (names, moments, groups) == ranks[0]["_state_dicts"]["names", "ddp"]
    assert set(names) == set(moments)
    assert {"embed.weight", "blocks.1.attention.output.weight", "norm.weight"} < set(names)
    assert all("norm" not in name for name in groups[0])
    assert all("norm" in name for name in groups[1])


@pytest.mark.parametrize("source", STRATEGIES)
@pytest.mark.parametrize("target", STRATEGIES)
def test_state_moves_between_strategies(ranks, source, target):
    results = ranks[0]["_state_dicts"]
    np.testing.assert_allclose(results["loss", source, target], results["loss", source], rtol=1e-6)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_fp16_skips_overflows_until_the_scale_fits(ranks, strategy):
    fine, applied, scales, restored = ranks[0]["_overflows"][strategy]
    assert fine == "good"
    assert applied[:-1] == [False] * (len(applied) - 1)
    assert len(applied) > 5
    assert applied[-1]
    assert scales[:3] == [2.0**39, 2.0**38, 2.0**37]
    assert restored == scales[-1]
    assert ranks[1]["_overflows"][strategy] == ranks[0]["_overflows"][strategy]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_values_that_are_not_finite_are_seen_by_all_ranks_and_touch_nothing(ranks, strategy):
    assert [rank["_bad_values"][strategy] for rank in ranks] == [("not_finite", "nan", 0)] * 2


def test_one_rank_s_notice_reaches_all_in_the_same_step(ranks):
    for rank in ranks:
        _, quiet, noticed, _, again = rank["_shared_answers"]
        decisions = [step.decision for step in (quiet, noticed, again)]
        assert decisions == ["continue", "finish_and_save", "continue"]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_step_that_one_rank_gives_up_at_its_start_changes_nothing_on_any(ranks, strategy):
    for rank in ranks:
        abandoned, steps = rank["_abandoned_steps"][strategy]
        assert abandoned == Abandoned(decision="save_now")
        assert steps == {2}


def test_staging_ends_right_before_the_update(ranks):
    assert ranks[0]["_shared_answers"][0] == ["before", "update"]


def test_ignored_microbatches_count_nothing(ranks):
    # rank 0 has 4 of 7 samples; rank 1 has 2 in its first microbatch, and in the second all are ignored
    _, quiet, *_ = ranks[1]["_shared_answers"]
    assert quiet.target_tokens == 6 * (SEQ_LEN - 1)
    assert quiet.verdict == "good"


def test_eval_loss_is_what_the_next_step_reports(ranks):
    for rank in ranks:
        _, _, _, mean, again = rank["_shared_answers"]
        assert mean == pytest.approx(again.loss, rel=1e-6)


def test_single_refuses_a_world_of_two(ranks):
    assert "_single_in_a_world_of_two" in ranks[1]
