"""Copy the live state to host memory while the next forward and backward run.

The copy lies in an arena: one stretch of memory that is, byte for byte, the rank's shard file.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.checkpoint.shards import Box, ShardLayout
from elastic.checkpoint.state import DTYPES, get_local

Allocate = Callable[[int], Tensor]
"""Returns so many bytes of host memory as a flat uint8 tensor; on CUDA page-locked, or the copies would not overlap."""


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A copy that is under way (CUDA) or done (CPU); `live` keeps its sources alive."""

    live: Mapping[str, Tensor]
    layout: ShardLayout
    arena: memoryview
    copied: torch.Event | None

    def wait_on_device(self) -> None:
        """Let the device change the live state only after the copy; the calling thread does not wait."""
        if self.copied is not None:
            self.copied.wait()

    def wait_on_host(self) -> None:
        """Return when `arena` may be read."""
        if self.copied is not None:
            self.copied.synchronize()


class Stager:
    """One arena that all saves share, so at most one copy may be in use.

    On CUDA it is filled on a stream of its own.
    """

    def __init__(self, device: torch.device, *, allocate: Allocate | None = None) -> None:
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._allocate = allocate or self._allocate_here
        self._layout: ShardLayout | None = None
        self._arena = torch.empty(0, dtype=torch.uint8)

    def stage(self, live: Mapping[str, Tensor], layout: ShardLayout, held: Mapping[str, Box]) -> Staged:
        """Start to copy the chunks of `layout` out of the live tensors.

        Args:
            held: the box of each tensor that this rank holds; a chunk is a part of it.
        """
        if layout != self._layout:
            self._arena = self._allocate(layout.num_bytes)
            self._arena[: len(layout.header)] = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
            self._layout = layout
        copied = None
        if self._stream is None:
            self._copy(live, layout, held)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                self._copy(live, layout, held)
            copied = self._stream.record_event()
        return Staged(live=live, layout=layout, arena=self._arena.numpy().data, copied=copied)

    def _allocate_here(self, num_bytes: int) -> Tensor:
        return torch.empty(num_bytes, dtype=torch.uint8, pin_memory=self._stream is not None)

    @torch.no_grad()
    def _copy(self, live: Mapping[str, Tensor], layout: ShardLayout, held: Mapping[str, Box]) -> None:
        for name, entry in layout.entries.items():
            local = get_local(live[name])
            for dim, (first, size) in enumerate(zip(entry.box.start, entry.box.shape, strict=True)):
                local = local.narrow(dim, first - held[name].start[dim], size)
            place = self._arena[entry.offset : entry.offset + entry.num_bytes]
            place.view(DTYPES[entry.dtype]).view(entry.box.shape).copy_(local, non_blocking=True)
