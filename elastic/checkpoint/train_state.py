"""What a checkpoint holds: the live tensors of a run under names that no strategy changes."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.placement_types import Shard

from elastic.checkpoint.format.sharding import Spread

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""Types by the names that safetensors gives them."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def get_live_state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the tensors of model and optimizer themselves, not copies: writing into them restores a run.

    Names are ``model.<parameter>`` and ``optim.<parameter>.<moment>``; plain, DDP, FSDP2 and HSDP models have the same.
    A parameter with two names (a tied head) comes once; frozen ones, which a run reads anew (`restore/base.py`), do not
    come at all. The optimizer's hyperparameters are left out: the
    configuration has them. An optimizer that never stepped gets its moments here, as zeros.
    """
    weights, moments = get_state_dict(model, optimizer, options=StateDictOptions(ignore_frozen_params=True))
    state: dict[str, Any] = {f"model.{name}": tensor for name, tensor in _drop_aliases(weights).items()}
    for parameter, values in cast(Mapping[str, Mapping[str, Any]], moments["state"]).items():
        state |= {f"optim.{parameter}.{name}": value for name, value in values.items()}
    strange = [name for name, value in state.items() if not isinstance(value, Tensor)]
    assert not strange, f"an optimizer keeps values that are no tensors: {strange}"
    return state


def get_local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this rank holds, sharing its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def get_mesh_shape(state: Mapping[str, Tensor], world_size: int) -> tuple[int, ...]:
    """Return the ranks along each axis of the mesh that the state lies on."""
    meshes = (tensor.device_mesh.shape for tensor in state.values() if isinstance(tensor, DTensor))
    return tuple(next(meshes, (world_size,)))


def get_spread(tensor: Tensor, *, world_size: int) -> Spread:
    """Return how a tensor lies on the ranks; what is no DTensor is the same on all of them."""
    if not isinstance(tensor, DTensor):
        return Spread(
            shape=tuple(tensor.shape),
            dtype=_NAMES[tensor.dtype],
            mesh_shape=(world_size,),
            ranks=tuple(range(world_size)),
            sharded_dims=(None,),
        )
    # exactly these: a _StridedShard (FSDP with tensor parallelism) is cut differently
    strange = [placement for placement in tensor.placements if type(placement) not in (Replicate, Shard)]
    assert not strange, f"a strategy spreads the state in a way that checkpoints do not know: {strange}"
    return Spread(
        shape=tuple(tensor.shape),
        dtype=_NAMES[tensor.dtype],
        mesh_shape=tuple(tensor.device_mesh.shape),
        ranks=tuple(tensor.device_mesh.mesh.flatten().tolist()),
        sharded_dims=tuple(place.dim if isinstance(place, Shard) else None for place in tensor.placements),
    )


def get_rng_name(device: torch.device, rank: int) -> str:
    """Return the name of one rank's random number generators."""
    return f"rng.{device.type}.{rank}"


def get_rng_state(device: torch.device) -> Tensor:
    """Return this rank's generators (CPU and, if it trains there, CUDA) as bytes.

    They fit only a world of the same size. Nothing depends on them yet: the order of samples is a function of seed
    and step, and no model here has dropout.
    """
    cpu = torch.get_rng_state()
    return torch.cat([cpu, torch.cuda.get_rng_state(device)]) if device.type == "cuda" else cpu


def set_rng_state(device: torch.device, state: Tensor) -> None:
    """Put back what `get_rng_state` returned."""
    num_cpu_bytes = torch.get_rng_state().numel()
    torch.set_rng_state(state[:num_cpu_bytes].clone())
    if device.type == "cuda":
        torch.cuda.set_rng_state(state[num_cpu_bytes:].clone(), device)


def _drop_aliases(weights: Mapping[str, Any]) -> dict[str, Tensor]:
    by_memory: dict[object, str] = {}
    for name, tensor in weights.items():
        local = get_local(tensor)
        # the storage of an empty shard is padded, so its address is one of a kind as well
        by_memory.setdefault((local.untyped_storage().data_ptr(), local.storage_offset(), tensor.shape), name)
    return {name: weights[name] for name in by_memory.values()}
