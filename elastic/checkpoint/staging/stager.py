"""Copy the live state to host memory while the next forward and backward run."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from elastic.checkpoint.format.sharding import Box, ShardLayout
from elastic.checkpoint.staging.device_to_host import DeviceToHostCopy
from elastic.checkpoint.staging.host_buffers import HostBuffers
from elastic.checkpoint.train_state import get_local


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A copy that is under way (CUDA) or done (CPU); `live` keeps its sources alive."""

    live: Mapping[str, Tensor]
    layout: ShardLayout
    index: int
    """Of the buffer."""
    buffer: memoryview
    copy: DeviceToHostCopy | None
    """What is still on the device."""

    @property
    def has_left(self) -> bool:
        """The device is free for the next copy."""
        return self.copy is None or self.copy.is_over

    def wait_on_device(self) -> None:
        """Let the device change the live state only after the copy.

        The calling thread waits only if the device had no room to copy the state within it.
        """
        if self.copy is not None:
            self.copy.wait_on_device()

    def wait_on_host(self) -> None:
        """Bring what is still on the device to the buffer, and return when that may be read; on one thread only.

        Raises:
            AbandonedError: `give_up` was called.
        """
        if self.copy is not None:
            self.copy.bring()

    def wait_left(self) -> None:
        """Return once the device is free for the next copy."""
        if self.copy is not None:
            self.copy.wait()

    def give_up(self) -> None:
        """Return once nothing is written to the buffer any more."""
        if self.copy is not None:
            self.copy.give_up()


class Stager:
    """Fills buffers; on CUDA on a stream of its own.

    The way to the host is slow and a step is short. What fits into free device memory is therefore copied there first,
    in milliseconds, and leaves it piece by piece while training goes on; only the rest is in the update's way.
    """

    def __init__(self, buffers: HostBuffers) -> None:
        self._buffers = buffers
        self._layout: ShardLayout | None = None
        self._known: dict[str, tuple[Tensor, Tensor]] = {}
        """The tensors of the last state and their bytes: to find these for hundreds took most of what a save costs."""

    def stage(self, live: Mapping[str, Tensor], layout: ShardLayout, held: Mapping[str, Box], *, index: int) -> Staged:
        """Start to copy the chunks of `layout` out of the live tensors into a buffer.

        Args:
            held: the box of each tensor that this rank holds; a chunk is a part of it.
        """
        buffer = self._buffers.get(index)[: layout.num_bytes]
        buffer[: len(layout.header)] = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        if layout is not self._layout:
            self._layout, self._known = layout, {}
        for name in layout.entries:
            tensor, known = live[name], self._known.get(name)
            if known is None or known[0] is not tensor:
                self._known[name] = tensor, _find_bytes(tensor, layout, held, name)
        sources = {name: self._known[name][1] for name in layout.entries}
        copy: DeviceToHostCopy | None = None
        for name, source in sources.items():
            if not source.is_cuda:
                offset = layout.entries[name].offset
                buffer[offset : offset + source.numel()].copy_(source)
        if self._buffers.engine is not None:
            on_device = {name: source for name, source in sources.items() if source.is_cuda}
            copy = DeviceToHostCopy(on_device, layout, buffer, self._buffers.engine, index=index)
        return Staged(live=live, layout=layout, index=index, buffer=buffer.numpy().data, copy=copy)


def _find_bytes(tensor: Tensor, layout: ShardLayout, held: Mapping[str, Box], name: str) -> Tensor:
    """Return the bytes of one chunk in the live state, in a row."""
    local = get_local(tensor).detach()
    for dim, (first, size) in enumerate(
        zip(layout.entries[name].box.start, layout.entries[name].box.shape, strict=True)
    ):
        local = local.narrow(dim, first - held[name].start[dim], size)
    assert local.is_contiguous(), f"{name} does not lie in a row"
    return local.reshape(-1).view(torch.uint8)
