"""The update must not depend on how many ranks share it, nor on how the model is spread over them."""

from dataclasses import replace

import numpy as np
import pytest

from elastic.training.step import build_trainable
from elastic.world import World
from tests.distributed._ranks import in_world, run_ranks
from tests.distributed._tiny import CONFIG, full_weights, train, with_model

SCENARIOS = [
    *(("single", 1, 0), ("ddp", 1, 0), ("ddp", 2, 0), ("ddp", 3, 0), ("ddp", 4, 0)),
    *(("fsdp2", size, 0) for size in (1, 2, 3, 4)),
    *(("auto", 1, 0), ("auto", 2, 0)),
    *(("hsdp", 2, 0), ("hsdp", 2, 1), ("hsdp", 3, 2), ("hsdp", 4, 2)),
]


def _all_scenarios(rank: int, port: int, tied: bool):
    results = {}
    for attempt, (strategy, world_size, shard_size) in enumerate(SCENARIOS, start=1):
        config = with_model(replace(CONFIG, strategy=strategy, shard_size=shard_size), tied_head=tied)

        def work(world: World, config=config):
            trainable = build_trainable(config, world)
            first = full_weights(trainable)
            steps = train(trainable, world, steps=5)
            return first, full_weights(trainable), [(s.loss, s.grad_norm, s.target_tokens) for s in steps]

        results[strategy, world_size, shard_size] = in_world(work, rank, port, world_size=world_size, attempt=attempt)
    return results


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def ranks(request):
    return run_ranks(_all_scenarios, 4, request.param)


@pytest.mark.parametrize("scenario", SCENARIOS[1:], ids=str)
def test_init_and_update_do_not_depend_on_the_split(ranks, scenario):
    first, last, steps = ranks[0]["single", 1, 0]
    other_first, other_last, other_steps = ranks[0][scenario]
    assert first.keys() == other_first.keys()
    for name in first:
        np.testing.assert_array_equal(other_first[name], first[name], err_msg=name)
        np.testing.assert_allclose(other_last[name], last[name], atol=1e-5, rtol=0, err_msg=name)
        assert np.abs(last[name] - first[name]).max() > 1e-3, f"{name} did not learn"
    # 7 samples, of which 11 of 12 labels count; the rows added to fill up count nothing
    assert [tokens for *_, tokens in other_steps] == [77] * 5
    np.testing.assert_allclose([s[:2] for s in other_steps], [s[:2] for s in steps], rtol=1e-5)


def test_all_ranks_report_the_same_step(ranks):
    for scenario, (_, _, steps) in ranks[0].items():
        assert all(rank[scenario] is None or rank[scenario][2] == steps for rank in ranks)
