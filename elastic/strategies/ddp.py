"""A full copy of the model on every rank; gradients are all-reduced in buckets while the backward runs."""

from functools import partial

# torch.distributed re-exports GradBucket without listing it in __all__:
# pyright: reportPrivateImportUsage=false
import torch._dynamo.config
import torch.distributed as dist
from torch import Tensor, nn
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from elastic.config import RunConfig
from elastic.nn.fp8 import set_fp8
from elastic.nn.precision import build_cast
from elastic.optim.adamw import AdamW
from elastic.strategies._base import Spread, release_nothing
from elastic.world import World


def _sum_bucket(_state: object, bucket: dist.GradBucket) -> Future[Tensor]:
    """Sum a bucket over ranks; DDP's own hook would average."""
    buffer = bucket.buffer()
    work = dist.all_reduce(buffer, async_op=True)
    assert work is not None  # async_op

    def get_buffer(done: Future[object]) -> Tensor:
        done.value()  # raises what went wrong
        return buffer

    return work.get_future().then(get_buffer)


def spread(model: nn.Module, *, world: World, config: RunConfig) -> Spread:
    """Wrap the model in DistributedDataParallel."""
    set_fp8(model, config.precision)
    model.to_empty(device=world.device)
    # init_sync: `init_weights` (or a checkpoint) gives every rank the same values, so nothing is sent at the start.
    module = DistributedDataParallel(model, init_sync=False, gradient_as_bucket_view=True)
    module.register_comm_hook(None, _sum_bucket)
    # Blocks are compiled one by one, so DDP overlaps as it is; its graph splitter does not know checkpointing.
    torch._dynamo.config.optimize_ddp = False

    def set_last_microbatch(is_last: bool) -> None:
        module.require_backward_grad_sync = is_last  # what `no_sync()` does, without a context around the loop

    return Spread(
        module=module,
        computing=model,
        cast=build_cast(config, world.device),
        set_last_microbatch=set_last_microbatch,
        build_optimizer=partial(AdamW, model),
        release=release_nothing,
    )
