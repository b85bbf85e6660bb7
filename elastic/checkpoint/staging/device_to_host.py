"""How a state leaves the device: cloned there first, then piece by piece through page-locked buffers.

The way to the host is slow and a step is short. What fits into free device memory is therefore copied there first, in
milliseconds, and leaves it while training goes on.
"""

import os
import threading
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor, wait

# torch._foreach_*, as torch.optim uses them, are not in torch's __all__:
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
import numpy as np
import torch
from torch import Tensor

from elastic.checkpoint.format.sharding import ShardLayout
from elastic.checkpoint.staging.device_cache import BLOCK_BYTES, Resident, Rows

_SPARE_DEVICE_BYTES = 2 * 2**30
"""What copies on the device leave free there."""
_PIECE_BYTES = 32 * 2**20
"""So much leaves the device at a time: whatever else goes to the host, like the loss of a step, waits for no more than
a few of these (0.7 ms each). One engine does all such copies, in the order in which they were asked for."""
_ALIGNED_BYTES = 512
"""Where a tensor in device memory begins; torch's allocator uses the same."""
_NUM_COPIERS = max(1, min(8, (os.cpu_count() or 1) // 4))
"""Threads that empty page-locked buffers side by side. What takes longest is to find the pages of a new shared buffer,
which goes on in each of them."""


class AbandonedError(Exception):
    """The save was given up; nothing more of it may become visible."""


class DeviceToHostEngine:
    """Copies states off one device, for all worlds of a process: a stream, page-locked buffers, and threads."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.stream = torch.cuda.Stream(device)
        """Memory on the device is cached for the stream that used it, so all copies of the state are made on this."""
        self._cached_bytes = 0
        """What the allocator keeps for the next copy of the state."""
        self._in_use: list[int] = []
        """The sizes of the copies that have not left yet."""
        self._has_two, self._num_flushes = False, 0
        """Whether the allocator keeps memory for two of them, since it last had to give up all that it kept."""
        self._residents: dict[int, Resident] = {}
        """The last copies that were made on the device, by the buffers they went to, the newest last."""
        pinned = torch.empty(2 * _NUM_COPIERS, _PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        self._free = list(pinned.unbind())
        self._busy: list[tuple[Tensor, Future[None]]] = []
        self._copiers = ThreadPoolExecutor(_NUM_COPIERS, "leave")
        self.lock = threading.Lock()
        """Held by the thread that sends."""

    def clone_some(self, sources: Mapping[str, Tensor], *, index: int) -> tuple[Tensor, dict[str, int]]:
        """Copy on the device what fits there, on the current stream, which must be this one; `release` takes it back.

        The copy that went to another buffer than `index` is spared if there is room.

        Returns:
            One stretch of memory, so that the allocator is asked once and finds the same again, and what begins where.
        """
        num_flushes = torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)
        if num_flushes != self._num_flushes:
            self._has_two, self._num_flushes = False, num_flushes
        free_bytes = torch.cuda.mem_get_info(self.device)[0] - _SPARE_DEVICE_BYTES
        places, num_bytes = plan_clones(
            {name: source.numel() for name, source in sources.items()},
            budget_bytes=max(free_bytes - BLOCK_BYTES, 0 if self._in_use else self._cached_bytes),
        )
        num_bytes = -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self._in_use.append(num_bytes)
        try:
            memory = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:  # what was cached was needed elsewhere
            self._cached_bytes, self._has_two = 0, False
            return torch.empty(0, dtype=torch.uint8), {}
        self._cached_bytes = max(self._cached_bytes, num_bytes)
        others = {copy.address for buffer, copy in self._residents.items() if buffer != index}
        if memory.data_ptr() in others and (self._has_two or has_room_for_two(num_bytes, free_bytes=free_bytes)):
            memory = self._allocate_beside(memory)
        if places:
            clones = [memory[place : place + sources[name].numel()] for name, place in places.items()]
            torch._foreach_copy_(clones, [sources[name] for name in places])
        return memory, places

    def _allocate_beside(self, memory: Tensor) -> Tensor:
        """Return as much memory elsewhere; the same if there is none."""
        try:
            memory = torch.empty_like(memory)
            self._has_two = True
        except torch.OutOfMemoryError:
            self._has_two = False
        return memory

    def release(self) -> None:
        """Say that the memory of a copy is free again."""
        self._in_use.pop()

    def remember(self, index: int, layout: ShardLayout, memory: Tensor, places: Mapping[str, int]) -> None:
        """Note where the copy for a buffer was made, on the current stream, which must be this one."""
        copy = Resident(layout, memory, places) if places else None
        spared = [(i, r) for i, r in self._residents.items() if i != index and not (copy and r.address == copy.address)]
        self._residents = dict(spared[-1:]) | ({index: copy} if copy else {})

    def find_resident(self, index: int, file: str) -> Rows | None:
        """Return what is left on the device of the snapshot that went to a buffer, if it was one of the last.

        Args:
            file: name of the shard file that the buffer is.
        """
        if index not in self._residents:
            return None
        with torch.cuda.stream(self.stream):
            return self._residents[index].find(file, is_alone=len(self._residents) == 1)

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copy a piece to the host; returns once the device has been asked to, on the current stream."""
        if not self._free:
            pinned, copied = self._busy[0]
            copied.result()
            self._free.append(pinned)
            del self._busy[0]
        pinned = self._free.pop()
        pinned[: source.numel()].copy_(source, non_blocking=True)
        has_left = torch.cuda.Event(blocking=True)
        has_left.record()
        self._busy.append((pinned, self._copiers.submit(_empty, pinned, has_left, target)))

    def wait(self) -> None:
        """Return when all pieces are where they belong, or nothing is under way any more.

        Raises:
            RuntimeError: the device failed.
        """
        self.stream.synchronize()
        busy, self._busy = self._busy, []
        self._free += [pinned for pinned, _ in busy]
        wait([copied for _, copied in busy])
        for _, copied in busy:
            copied.result()


def has_room_for_two(num_bytes: int, *, free_bytes: int) -> bool:
    """Tell whether a second copy of the state may stay on the device: as much again must stay free for others."""
    return free_bytes >= 2 * num_bytes


def plan_clones(num_bytes: Mapping[str, int], *, budget_bytes: int) -> tuple[dict[str, int], int]:
    """Return where in one stretch of memory each tensor is copied to, as far as there is room, and how long that is."""
    places: dict[str, int] = {}
    stop = 0
    for name, size in num_bytes.items():
        aligned = -(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES
        if stop + aligned <= budget_bytes:
            places[name] = stop
            stop += aligned
    return places, stop


def _empty(pinned: Tensor, has_left: torch.cuda.Event, target: Tensor) -> None:
    has_left.synchronize()
    np.copyto(target.numpy(), pinned[: target.numel()].numpy())  # torch would copy with as many threads as train


class DeviceToHostCopy:
    """A state on its way from the device to a buffer: `bring` does it, on a thread that has time for it."""

    def __init__(
        self, sources: dict[str, Tensor], layout: ShardLayout, buffer: Tensor, engine: DeviceToHostEngine, *, index: int
    ) -> None:
        self._layout, self._buffer, self._engine = layout, buffer, engine
        engine.stream.wait_stream(torch.cuda.current_stream(engine.device))
        with torch.cuda.stream(engine.stream):
            memory, places = engine.clone_some(sources, index=index)
            self._is_free = engine.stream.record_event()
            engine.remember(index, layout, memory, places)
        self.memory: Tensor | None = memory
        """The copy on the device, until it has left."""
        self.places = places
        """What begins where in it."""
        self._clones = {name: memory[place : place + sources[name].numel()] for name, place in places.items()}
        self._late = {name: source for name, source in sources.items() if name not in self._clones}
        """What found no room on the device."""
        self._is_asked_for = threading.Event()
        """The device knows all that it must copy before the live state may change."""
        self.is_cloned = not self._late
        """The live state is not needed any more."""
        if self.is_cloned:
            self._is_asked_for.set()
        self._is_given_up = False
        self._is_over = threading.Event()

    def bring(self) -> None:
        """Copy it all, then give the memory on the device back."""
        try:
            with self._engine.lock:
                torch.cuda.set_device(self._engine.device)
                try:
                    with torch.cuda.stream(self._engine.stream):
                        if self._late:
                            self._send(self._late)
                            self._is_free = self._engine.stream.record_event()
                            self._is_asked_for.set()
                        self._send(self._clones)
                finally:
                    self._engine.wait()
        finally:
            self._clones.clear()
            self.memory = None
            self._engine.release()
            self._is_asked_for.set()
            self._is_over.set()

    def _send(self, sources: dict[str, Tensor]) -> None:
        for name in list(sources):
            source, offset = sources.pop(name), self._layout.entries[name].offset
            for start in range(0, source.numel(), _PIECE_BYTES):
                if self._is_given_up:
                    raise AbandonedError
                part = source[start : start + _PIECE_BYTES]
                self._engine.send(part, self._buffer[offset + start : offset + start + part.numel()])

    def wait_on_device(self) -> None:
        """Let the current stream wait until the live state may change."""
        self._is_asked_for.wait()
        self._is_free.wait()

    @property
    def is_over(self) -> bool:
        """Nothing of it is on the device any more."""
        return self._is_over.is_set()

    def wait(self) -> None:
        """Return once it is over."""
        self._is_over.wait()

    def give_up(self) -> None:
        """Let `bring`, which may be at it, end early, and wait for that."""
        self._is_given_up = True
        self._is_over.wait()
