"""FSDP2 on a mesh: what `fsdp2` (one axis) and `hsdp` (two axes) share."""

from contextlib import nullcontext
from functools import partial

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from elastic.config import RunConfig
from elastic.nn.fp8 import set_fp8
from elastic.nn.precision import build_policy
from elastic.optim.sharded import ShardedAdamW
from elastic.strategies._base import Spread
from elastic.world import World


def shard(model: nn.Module, mesh: DeviceMesh, *, world: World, config: RunConfig) -> Spread:
    """Shard parameters, gradients and optimizer state along the mesh's last axis; an axis before it replicates.

    One unit per block, gathered when it runs and freed after; embedding, last norm and head are the root unit,
    which the end of the forward and the start of the backward need anyway.

    Gradients are reduce-scattered in every microbatch, so that no rank ever holds all of them; the all-reduce
    between replicas waits for the last one.
    """
    set_fp8(model, config.precision)
    policy = build_policy(config)
    for block in model.get_submodule("blocks").children():
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
    root = fully_shard(model, mesh=mesh, mp_policy=policy, reshard_after_forward=False)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            # A plain sum: else the factor becomes PREMUL_SUM, which gloo lacks.
            module.set_force_sum_reduction_for_comms(True)
    model.to_empty(device=world.device)
    return Spread(
        module=model,
        computing=model,
        cast=nullcontext,
        set_last_microbatch=root.set_requires_all_reduce,
        build_optimizer=partial(ShardedAdamW, model),
        release=root.reshard,  # blocks free what they gathered by themselves
    )
