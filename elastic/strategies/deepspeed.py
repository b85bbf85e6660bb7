"""DeepSpeed's ZeRO: `deepspeed.stage` says what is spread over the ranks. Needs the extra `deepspeed`.

DeepSpeed computes, reduces and updates; the order of samples, steps, checkpoints and changes of the world are ours. It
trains a copy of the model. The model itself holds the state as FSDP2 spreads it, in fp32, and is never run: checkpoints
find in it what they find under every other strategy, and a run may go from one to another. The state is brought there
when it is saved (`ZeroAdamW.refresh`), and to DeepSpeed once it was initialized or restored; a rank needs memory for
its part of both.
"""

import importlib
import logging
import os
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from elastic.config import OptimConfig, RunConfig
from elastic.errors import ConfigError
from elastic.optim.adamw import AdamW
from elastic.optim.sharded import ShardedAdamW
from elastic.strategies._base import Spread, release_nothing
from elastic.strategies._deepspeed_state import KINDS, Exchange, find_parts
from elastic.world import World

SHARDED_OVER = "world"
CAN_BE_PLANNED = False
CANNOT = {
    "precision": ("fp16", "fp8", "fp8_rowwise"),
    "tune": ("lora", "qlora"),
    "compile": (True,),
    "recompute": ("selective", "budget", "full", "offload"),
}

_VERSION = "0.19.8"
"""Of which the attributes are used that its documentation does not name."""


def spread(model: nn.Module, *, world: World, config: RunConfig) -> Spread:
    """Give a copy of the model to DeepSpeed."""
    deepspeed = _import()
    computing = deepcopy(model).to_empty(device=world.device)
    fully_shard(model, mesh=world.build_mesh(shard=world.world_size))
    model.to_empty(device=world.device)
    engine = _build_engine(deepspeed, computing, world=world, config=config)
    zero = ZeroAdamW(model, config.optim, engine=engine, stage=config.deepspeed.stage, world=world)
    weakref.finalize(zero, _release, engine)
    world_size = world.world_size

    def run(*microbatch: Tensor) -> Tensor:
        zero.take_over()
        nats: Tensor = engine(*microbatch)
        # the same value with a gradient that makes up for DeepSpeed's mean over ranks
        return nats + (world_size - 1) * (nats - nats.detach())

    def get_optimizer(_: OptimConfig) -> AdamW:
        return zero

    return Spread(
        module=run,
        computing=computing,
        cast=nullcontext,
        set_last_microbatch=lambda _is_last: None,
        build_optimizer=get_optimizer,
        release=release_nothing,
    )


class ZeroAdamW(ShardedAdamW):
    """The state of DeepSpeed's optimizer as others know it; clips and updates through DeepSpeed.

    Args:
        model: holds the state; its parameters have the order of DeepSpeed's.
        engine: DeepSpeed's.
    """

    def __init__(self, model: nn.Module, config: OptimConfig, *, engine: Any, stage: int, world: World) -> None:
        super().__init__(model, config)
        self._zero, self._stage, self._world = engine.optimizer, stage, world
        holders = [cast(DTensor, param) for param in model.parameters()]
        rows = [(param, *(self.state[param][kind] for kind in KINDS[1:])) for param in holders]
        self._written = [tensor.to_local() for tensors in rows for tensor in tensors]
        self._steps: list[Tensor] = [self.state[param]["step"] for param in holders]
        self._flat = _make_states(self._zero, stage=stage)
        self._exchange = Exchange(find_parts(list(engine.module.parameters()), self._zero, stage=stage), rows)
        self._versions: list[int] = []

    @property
    def _is_stale(self) -> bool:
        """Tell whether DeepSpeed lacks what was written into the state since it was last brought there or here."""
        return self._versions != self._read_versions()

    def _read_versions(self) -> list[int]:
        return [tensor._version for tensor in self._written]

    def take_over(self) -> None:
        """Bring to DeepSpeed what was initialized or restored; all ranks do so at the same forward."""
        if not self._is_stale:
            return
        zero = self._zero
        if self._stage == 3:
            zero._partition_all_parameters()
        self._exchange.from_rows()
        for state in self._flat:
            state["step"].copy_(self._steps[0])
        if self._stage == 3:
            for number in range(len(zero.fp16_groups)):
                zero._reassign_or_swap_out_partitioned_parameters(number)
        else:
            zero.update_lp_params()
        self._versions = self._read_versions()

    def refresh(self) -> None:
        """Bring the state from DeepSpeed to where checkpoints look for it; all ranks call it after the same step.

        Raises:
            DistError: the exchange was aborted on some rank; what is there must not be saved.
        """
        if self._is_stale:  # it is newer there
            return
        self._exchange.to_rows()
        world = self._world  # aborted messages end without an error where NCCL brings them
        world.presence.check(float(world.sum_(world.presence.read())), world_size=world.world_size)
        for step in self._steps:
            step.copy_(self._flat[0]["step"])
        self._versions = self._read_versions()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the gradients, those of a step that was not made as well."""
        zero = self._zero
        zero.zero_grad(set_to_none)
        zero.set_gradient_accumulation_boundary(False)  # else stage 1 reduces in each backward
        for kept in (zero.averaged_gradients, getattr(zero, "all_grad_tensors", {})):
            for number in kept:
                kept[number] = None
        if self._stage < 3:
            zero._release_preflattened_grad_buffers()

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Return the norm of all gradients; the next update divides them by what brings it down to `max_norm`."""
        zero = self._zero
        if self._stage == 1:  # the others have reduced in each backward
            zero.set_gradient_accumulation_boundary(True)
            zero.reduce_gradients()  # the engine's own call would take the boundary back: it sets it in its step only
        else:
            zero.finalize_gradient_accumulation_boundary()
        zero.clip_grad = max_norm
        if self._stage == 3:
            square = torch.stack([torch.as_tensor(norm).square() for norm in zero._get_norm_groups()]).sum()
            return square.sqrt().to(self._written[0].device)
        return torch.as_tensor(zero.scaled_global_norm()).to(self._written[0].device)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Have DeepSpeed make one update."""
        assert closure is None
        for group, theirs in zip(self.param_groups, self._zero.optimizer.param_groups, strict=True):
            theirs["lr"] = group["lr"]
        self._zero.step()


def _make_states(zero: Any, *, stage: int) -> list[dict[str, Tensor]]:
    """Make the moments of DeepSpeed's optimizer, which it would make in its first step."""
    flat: list[Tensor] = zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups
    for tensor in flat:
        zero.optimizer.state[tensor] = {
            "step": torch.zeros((), dtype=torch.float32, device=tensor.device),
            **{kind: torch.zeros_like(tensor) for kind in KINDS[1:]},
        }
    return [zero.optimizer.state[tensor] for tensor in flat]


def _build_engine(deepspeed: Any, model: nn.Module, *, world: World, config: RunConfig) -> Any:
    os.environ.setdefault("LOCAL_RANK", str(world.local_rank))  # its launcher's; read and not used
    # what it keeps in its modules is of the world before
    groups: Any = importlib.import_module("deepspeed.utils.groups")
    for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_DATA_PARALLEL_GROUP", "_ALL_TO_ALL_GROUP"):
        getattr(groups, name).clear()
    groups._WORLD_GROUP = dist.group.WORLD  # else a copy, which nobody could break
    comm: Any = importlib.import_module("deepspeed.comm.comm")
    comm.cdb = None
    # numbers of modules and parameters are compared between ranks, and one that was in more worlds has counted further
    importlib.import_module("deepspeed.runtime.zero.partition_parameters").Init.param_id = 0
    offload: Any = importlib.import_module("deepspeed.runtime.zero.parameter_offload").DeepSpeedZeRoOffload
    offload._register_deepspeed_module.__defaults__[0][0] = 0  # its counter is a default argument
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=AdamW(model, config.optim),
        dist_init_required=False,
        config={
            "train_micro_batch_size_per_gpu": config.train.micro_batch,
            "gradient_accumulation_steps": 1,
            "managed_gradient_accumulation": False,
            "gradient_clipping": config.train.max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": config.precision == "bf16"},
            "communication_data_type": "fp32",
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": {
                "stage": config.deepspeed.stage,
                "overlap_comm": config.deepspeed.stage == 2 and world.device.type == "cuda",
                "stage3_param_persistence_threshold": 0,  # all are cut, so that a state can be written into them
            },
            "steps_per_print": 10**9,
        },
    )
    return engine


def _release(engine: Any) -> None:
    """Let go of memory and groups: autograd holds the engine by its hooks, in cycles that no collector sees."""
    engine.destroy()
    params = list(engine.module.parameters())
    for holder in (getattr(engine.optimizer, "parameter_offload", None), engine.optimizer, engine):
        if holder is not None:
            vars(holder).clear()
    for param in params:
        vars(param).clear()
        param.data, param.grad = param.new_empty(0), None


def _import() -> Any:
    try:
        deepspeed = importlib.import_module("deepspeed")
    except ImportError as error:
        raise ConfigError(
            f"strategy=deepspeed needs DeepSpeed, and it cannot be imported ({error}). Install it on every node: "
            f"DS_BUILD_OPS=0 pip install --no-build-isolation deepspeed=={_VERSION}; or set strategy=fsdp2."
        ) from error
    if deepspeed.__version__.partition("+")[0] != _VERSION:
        raise ConfigError(
            f"strategy=deepspeed knows DeepSpeed {_VERSION}, but {deepspeed.__version__} is installed. Install that "
            "one, or set strategy=fsdp2."
        )
    return deepspeed
