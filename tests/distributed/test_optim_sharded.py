"""The update of a rank's own rows is that of the whole tensors, whatever mesh they lie on."""

import pytest
import torch
from torch import nn
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from elastic.config import OptimConfig
from elastic.optim.adamw import AdamW
from elastic.optim.sharded import ShardedAdamW
from elastic.world import World
from tests.distributed._ranks import in_world, run_ranks

NUM_RANKS = 4
SHAPES = {"matrix": (5, 3), "short": (2, 4), "gains": (7,)}
"""The second has no row for some ranks."""
MESHES = {"fsdp2": ({"shard": NUM_RANKS}, [Shard(0)]), "hsdp": ({"replicate": 2, "shard": 2}, [Replicate(), Shard(0)])}
MAX_NORMS = (0.1, 100.0, 0.1)
"""Of three steps: the gradients of the second are short enough as they are."""


def make_tensors(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=generator) for name, shape in SHAPES.items()}


def update(model: nn.ParameterDict, optimizer: torch.optim.Optimizer, clip, place) -> list[float]:
    norms = []
    for seed, max_norm in enumerate(MAX_NORMS, start=1):
        for name, grad in make_tensors(seed).items():
            model[name].grad = place(grad)
        norms.append(float(clip(max_norm)))
        optimizer.step()
    return norms


def describe(model: nn.ParameterDict, optimizer: torch.optim.Optimizer):
    def get_whole(tensor: torch.Tensor):
        return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone().numpy()

    states = {
        name: {key: get_whole(value) for key, value in optimizer.state[param].items()} for name, param in model.items()
    }
    return {name: get_whole(param) for name, param in model.items()}, states


def update_sharded(world: World):
    results = {}
    for kind, (axes, placements) in MESHES.items():
        mesh = world.build_mesh(**axes)
        model = nn.ParameterDict(
            {name: nn.Parameter(distribute_tensor(value, mesh, placements)) for name, value in make_tensors(0).items()}
        )
        optimizer = ShardedAdamW(model, OptimConfig())
        norms = update(
            model, optimizer, optimizer.clip, lambda grad, at=(mesh, placements): distribute_tensor(grad, *at)
        )
        results[kind] = (norms, *describe(model, optimizer))
    return results


def work(rank: int, port: int):
    return in_world(update_sharded, rank, port, world_size=NUM_RANKS, attempt=1)


@pytest.fixture(scope="module")
def ranks():
    return run_ranks(work, NUM_RANKS)


@pytest.mark.parametrize("kind", MESHES)
def test_the_update_is_that_of_the_whole_tensors(ranks, kind):
    model = nn.ParameterDict({name: nn.Parameter(value) for name, value in make_tensors(0).items()})
    optimizer = AdamW(model, OptimConfig())
    norms = update(model, optimizer, lambda norm: nn.utils.clip_grad_norm_(model.parameters(), norm), lambda grad: grad)
    weights, states = describe(model, optimizer)
    for rank in ranks:
        found_norms, found_weights, found_states = rank[kind]
        assert found_norms == pytest.approx(norms, rel=1e-6)
        for name in SHAPES:
            assert found_weights[name] == pytest.approx(weights[name], rel=1e-6, abs=1e-7)
            assert found_states[name].keys() == states[name].keys()
            for key, value in states[name].items():
                assert found_states[name][key] == pytest.approx(value, rel=1e-5, abs=1e-9)
