"""Who writes what of a state: the same on all ranks, and for every save of one world."""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from elastic.checkpoint.format.manifest import TensorRecord, get_shard_name
from elastic.checkpoint.format.sharding import Box, ShardLayout, Spread, build_layout, get_box, plan_chunks
from elastic.checkpoint.train_state import get_rng_name, get_rng_state, get_spread


@dataclass(frozen=True, kw_only=True)
class SavePlan:
    """The shards of one state."""

    spreads: Mapping[str, Spread]
    """Of the state, and of the generators of all ranks."""
    layouts: Mapping[str, ShardLayout]
    """Of each file, in the order of the ranks."""
    own_file: str
    held: Mapping[str, Box]
    """What this rank holds, all of it or a part of which it writes."""

    @property
    def own(self) -> ShardLayout:
        """Return the layout of this rank's file."""
        return self.layouts[self.own_file]

    def get_shapes(self) -> dict[str, TensorRecord]:
        """Return every tensor without the places of its chunks."""
        return {
            name: TensorRecord(dtype=spread.dtype, shape=spread.shape, chunks=())
            for name, spread in self.spreads.items()
        }


def build_plan(
    state: Mapping[str, Tensor], *, device: torch.device, generation: int, rank: int, world_size: int
) -> SavePlan:
    """Cut a state into one shard per rank."""
    spreads = {name: get_spread(tensor, world_size=world_size) for name, tensor in state.items()}
    rng = get_spread(get_rng_state(device), world_size=1)
    for other in range(world_size):
        spreads[get_rng_name(device, other)] = replace(rng, ranks=(other,))
    dtypes = {name: spread.dtype for name, spread in spreads.items()}
    chunks = plan_chunks(spreads, world_size=world_size)
    boxes = {name: get_box(spread, rank) for name, spread in spreads.items() if rank in spread.ranks}
    files = [get_shard_name(generation=generation, rank=other) for other in range(world_size)]
    return SavePlan(
        spreads=spreads,
        layouts={file: build_layout(of_rank, dtypes) for file, of_rank in zip(files, chunks, strict=True)},
        own_file=files[rank],
        held={name: box for name, box in boxes.items() if box is not None},
    )
