"""One rank, no communication, no copies but the one that computes in bf16."""

from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from elastic.config import RunConfig
from elastic.errors import ConfigError
from elastic.nn.fp8 import set_fp8
from elastic.nn.graphs import MAX_FLOPS
from elastic.nn.precision import build_cast, get_dtype
from elastic.optim.adamw import AdamW
from elastic.optim.copies import CopyingAdamW
from elastic.strategies._base import Spread, release_nothing
from elastic.strategies._copies import LowPrecisionCopy
from elastic.world import World

MAX_WORLD_SIZE = 1


def _pay_graphs(config: RunConfig) -> bool:
    """Tell whether a microbatch is so short that launching its kernels would take longer than running them."""
    num_tokens = config.train.micro_batch * config.data.seq_len
    if config.recompute == "offload":  # a recorded graph cannot take host memory anew
        return False
    return config.cuda_graph == "auto" and 6.0 * config.model.num_matrix_params * num_tokens < MAX_FLOPS


def spread(model: nn.Module, *, world: World, config: RunConfig) -> Spread:
    """Leave the model whole."""
    if world.world_size != 1:
        raise ConfigError(
            f"strategy=single trains on one rank, but the world has {world.world_size}: they would not share "
            "gradients. Set strategy=auto (or fsdp2, ddp), or start one process."
        )
    if get_dtype(config.precision) == torch.bfloat16 and config.tune == "full":
        copy = LowPrecisionCopy(
            model, torch.bfloat16, device=world.device, uses_graphs=_pay_graphs(config) and world.device.type == "cuda"
        )
        set_fp8(copy.model, config.precision)
        return Spread(
            module=copy,
            computing=copy.model,
            cast=nullcontext,
            set_last_microbatch=copy.set_last_microbatch,
            build_optimizer=partial(CopyingAdamW, model, copies=copy.copies),
            release=release_nothing,
        )
    model.to_empty(device=world.device)
    return Spread(
        module=model,
        computing=model,
        cast=build_cast(config, world.device),
        set_last_microbatch=lambda _is_last: None,
        build_optimizer=partial(AdamW, model),
        release=release_nothing,
    )
