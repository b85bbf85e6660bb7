"""Copy the live state to host memory while the next forward and backward run.

The copy lies in an arena: one stretch of memory that is, byte for byte, the rank's shard file.
"""

import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic.checkpoint.arena import Arena, allocate_arena
from elastic.checkpoint.shards import Box, ShardLayout
from elastic.checkpoint.state import get_local

_PIN_BYTES = 256 * 2**20
"""So much is page-locked at a time, so that no launch of a kernel waits long for the driver; no copy may cross the
border of two such parts."""
_SPARE_DEVICE_BYTES = 2 * 2**30
"""What copies on the device leave free there."""


class HostArenas:
    """The arenas that one process stages in; they outlive worlds, because page-locking them anew takes seconds.

    On CUDA they are prepared by a thread, without stopping training.

    Args:
        count: how many copies are kept.
        on_allocated: takes each new arena with its number, before it is ready.
        on_released: takes the number of one that will not be used again.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        count: int,
        on_allocated: Callable[[int, Arena], None] = lambda _index, _arena: None,
        on_released: Callable[[int], None] = lambda _index: None,
    ) -> None:
        self.count = count
        self._device = device
        self._on_allocated, self._on_released = on_allocated, on_released
        self._arenas: dict[int, Arena] = {}
        self._outgrown: dict[int, Arena] = {}
        """Too small for this world, but what they hold is all there is until it has filled one of its own."""
        self._tensors: dict[int, Tensor] = {}
        self._num_allocated = 0
        self.capacity_bytes = 0
        """What each of them has room for."""
        self._preparing: threading.Thread | None = None
        self._problem: BaseException | None = None

    @property
    def indices(self) -> list[int]:
        """Return the numbers of the arenas in use."""
        return list(self._arenas)

    def start_preparing(self, num_bytes: int) -> None:
        """Make sure that each arena will have room for so much; they are ready later if that takes long.

        Raises:
            CheckpointError: the memory is refused.
        """
        if num_bytes <= self.capacity_bytes:
            return
        self.wait_ready()
        self._outgrown |= self._arenas
        self._arenas = {}
        self.capacity_bytes = num_bytes
        for _ in range(self.count):
            index, arena = self._num_allocated, allocate_arena(num_bytes, name="snapshot")
            self._num_allocated += 1
            self._arenas[index] = arena
            self._tensors[index] = torch.frombuffer(arena.view, dtype=torch.uint8)
            self._on_allocated(index, arena)
        if self._device.type == "cuda":
            self._preparing = threading.Thread(target=self._pin, name="pin", daemon=True)
            self._preparing.start()

    def is_ready(self) -> bool:
        """Tell whether all arenas may be filled."""
        return bool(self._arenas) and (self._preparing is None or not self._preparing.is_alive())

    def wait_ready(self) -> None:
        """Return when all arenas may be filled.

        Raises:
            RuntimeError: they cannot be page-locked.
        """
        if self._preparing is not None:
            self._preparing.join()
            self._preparing = None
        if self._problem is not None:
            raise self._problem

    def get(self, index: int) -> Tensor:
        """Return an arena as bytes."""
        return self._tensors[index]

    def release_outgrown(self) -> None:
        """Give the memory of arenas back that were too small for this world."""
        for index, arena in self._outgrown.items():
            if self._device.type == "cuda":
                for start, _ in _cut(0, arena.num_bytes):
                    _get_cudart().cudaHostUnregister(arena.get_address() + start)
            self._on_released(index)
            del self._tensors[index]
            arena.close()
        self._outgrown.clear()

    def _pin(self) -> None:
        try:
            torch.cuda.set_device(self._device)
            for arena in self._arenas.values():
                for start, num_bytes in _cut(0, arena.num_bytes):
                    arena.populate(start, num_bytes)
                    torch.cuda.check_error(_get_cudart().cudaHostRegister(arena.get_address() + start, num_bytes, 0))
        except BaseException as error:  # raised by `wait_ready`
            self._problem = error


def _get_cudart() -> Any:
    return torch.cuda.cudart()


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A copy that is under way (CUDA) or done (CPU); `live` keeps its sources alive."""

    live: Mapping[str, Tensor]
    layout: ShardLayout
    index: int
    """Of the arena."""
    arena: memoryview
    is_free: torch.Event | None
    """The live state may change."""
    is_copied: torch.Event | None

    def wait_on_device(self) -> None:
        """Let the device change the live state only after the copy; the calling thread does not wait."""
        if self.is_free is not None:
            self.is_free.wait()

    def wait_on_host(self) -> None:
        """Return when `arena` may be read."""
        if self.is_copied is not None:
            self.is_copied.synchronize()


class Stager:
    """Fills arenas; on CUDA on a stream of its own.

    The way to the host is slow (about 50 GB/s) and a step is short. What fits into free device memory is therefore
    copied there first, in milliseconds, and leaves it while training goes on; only the rest is in the update's way.
    """

    def __init__(self, arenas: HostArenas, device: torch.device) -> None:
        self._arenas = arenas
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def stage(self, live: Mapping[str, Tensor], layout: ShardLayout, held: Mapping[str, Box], *, index: int) -> Staged:
        """Start to copy the chunks of `layout` out of the live tensors into an arena.

        Args:
            held: the box of each tensor that this rank holds; a chunk is a part of it.
        """
        arena = self._arenas.get(index)[: layout.num_bytes]
        arena[: len(layout.header)] = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        sources = {name: _find_bytes(live[name], layout, held, name) for name in layout.entries}
        is_free = is_copied = None
        if self._stream is None:
            _copy(sources, layout, arena)
        else:
            self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
            with torch.cuda.stream(self._stream):
                clones = _clone_some(sources, self._stream.device)
                _copy({name: source for name, source in sources.items() if name not in clones}, layout, arena)
                is_free = self._stream.record_event()
                _copy(clones, layout, arena)
                is_copied = self._stream.record_event()
        return Staged(
            live=live, layout=layout, index=index, arena=arena.numpy().data, is_free=is_free, is_copied=is_copied
        )


def _find_bytes(tensor: Tensor, layout: ShardLayout, held: Mapping[str, Box], name: str) -> Tensor:
    """Return the bytes of one chunk in the live state, in a row."""
    local = get_local(tensor).detach()
    for dim, (first, size) in enumerate(
        zip(layout.entries[name].box.start, layout.entries[name].box.shape, strict=True)
    ):
        local = local.narrow(dim, first - held[name].start[dim], size)
    assert local.is_contiguous(), f"{name} does not lie in a row"
    return local.reshape(-1).view(torch.uint8)


def _clone_some(sources: Mapping[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """Copy on the device what fits there; on the current stream, which alone may use the memory again."""
    free_bytes = torch.cuda.mem_get_info(device)[0] - _SPARE_DEVICE_BYTES
    clones: dict[str, Tensor] = {}
    for name, source in sources.items():
        if source.is_cuda and source.numel() <= free_bytes:
            clones[name] = source.clone()
            free_bytes -= source.numel()
    return clones


def _copy(sources: Mapping[str, Tensor], layout: ShardLayout, arena: Tensor) -> None:
    for name, source in sources.items():
        offset = layout.entries[name].offset
        for start, num_bytes in _cut(offset, source.numel()) if source.is_cuda else [(offset, source.numel())]:
            first = start - offset
            arena[start : start + num_bytes].copy_(source[first : first + num_bytes], non_blocking=True)


def _cut(start: int, num_bytes: int) -> Iterator[tuple[int, int]]:
    """Yield the parts of a range of an arena that are page-locked together."""
    stop = start + num_bytes
    while start < stop:
        size = min(stop, (start // _PIN_BYTES + 1) * _PIN_BYTES) - start
        yield start, size
        start += size
