"""Copy the live state to host memory while the next forward and backward run.

The copy lies in an arena: one stretch of memory that is, byte for byte, the rank's shard file.
"""

import os
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

# torch._foreach_*, as torch.optim uses them, are not in torch's __all__:
# pyright: reportPrivateImportUsage=false, reportPrivateUsage=false
import numpy as np
import torch
from torch import Tensor

from elastic.checkpoint.durable.writer import AbandonedError
from elastic.checkpoint.format.sharding import Box, ShardLayout
from elastic.checkpoint.staging.device_cache import BLOCK_BYTES, Resident, Rows
from elastic.checkpoint.staging.shared_memory import Arena, allocate_arena
from elastic.checkpoint.train_state import get_local

_SPARE_DEVICE_BYTES = 2 * 2**30
"""What copies on the device leave free there."""
_PIECE_BYTES = 32 * 2**20
"""So much leaves the device at a time: whatever else goes to the host, like the loss of a step, waits for no more than
a few of these (0.7 ms each). One engine does all such copies, in the order in which they were asked for."""
_ALIGNED_BYTES = 512
"""Where a tensor in device memory begins; torch's allocator uses the same."""
_NUM_COPIERS = max(1, min(8, (os.cpu_count() or 1) // 4))
"""Empty buffers side by side. What takes longest is to find the pages of a new arena, which goes on in each of them."""


class HostArenas:
    """The arenas that one process stages in; they outlive worlds.

    They are not page-locked: for tens of GiB that takes as many seconds, in which no other call that has to do with
    memory gets through to the device, at a save or anywhere else; and restoring was no faster. What leaves a GPU comes
    through a few buffers that are.

    Args:
        count: how many arenas there will be; may be changed before `make_room`.
        on_allocated: takes each new arena with its number, before it is used.
        on_released: takes the number of one that will not be used again.
        wait_for_freed: returns once the memory of those is free, as far as others hold it.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        count: int,
        on_allocated: Callable[[int, Arena], None] = lambda _index, _arena: None,
        on_released: Callable[[int], None] = lambda _index: None,
        wait_for_freed: Callable[[], object] = lambda: None,
    ) -> None:
        self.count = count
        self._on_allocated, self._on_released = on_allocated, on_released
        self._wait_for_freed = wait_for_freed
        self._arenas: dict[int, Arena] = {}
        self._outgrown: dict[int, Arena] = {}
        """Too small for this world, but what they hold is all there is until it has filled one of its own."""
        self._unfound: list[Arena] = []
        """Memory for these is yet to be found."""
        self._tensors: dict[int, Tensor] = {}
        self._num_allocated = 0
        self.capacity_bytes = 0
        """What each of them has room for."""
        self._is_released = False
        """This world has a state that is safe, and earlier ones hold nothing any more."""
        self.is_roomy = False
        """The node has memory for all of this world's without what earlier ones hold."""
        self.exit = DeviceExit(device) if device.type == "cuda" else None

    @property
    def indices(self) -> list[int]:
        """Return the numbers of the arenas that may be filled."""
        return [index for index, arena in self._arenas.items() if arena not in self._unfound]

    @property
    def limit(self) -> int:
        """Return how many may be filled, at least, on every rank of the world."""
        return self.count if self.is_roomy or self._is_released else min(1, self.count)

    def begin_world(self, count: int, *, is_roomy: bool) -> None:
        """Take what all ranks of a world have agreed on."""
        self.count, self.is_roomy, self._is_released = count, is_roomy, False

    @property
    def num_held(self) -> int:
        """Return how many there are that are large enough, those too that must not be filled yet."""
        return len(self._arenas)

    @property
    def held_bytes(self) -> int:
        """Return what all of them have room for, those too that are about to be released."""
        return sum(arena.num_bytes for arena in (*self._arenas.values(), *self._outgrown.values()))

    def make_room(self, num_bytes: int) -> None:
        """Make sure that each arena has room for so much; the memory of the first is found before it is written to.

        That of the others waits for `release_outgrown`, and so do they: until this world has a snapshot that is safe,
        the node still holds those of the one before. Where it has room for all (`is_roomy`), none waits.

        Raises:
            CheckpointError: the memory is refused.
        """
        is_new = num_bytes > self.capacity_bytes
        if is_new:
            self._outgrown |= self._arenas
            self._arenas, self._unfound, self.capacity_bytes = {}, [], num_bytes
        added = [self._allocate() for _ in range(self.count - len(self._arenas))]
        if not added:
            return
        at_once = added if self.is_roomy else added[:1] if is_new else []
        self._unfound += added[len(at_once) :]
        self._find_one_after_another(at_once)

    def _allocate(self) -> Arena:
        index, arena = self._num_allocated, allocate_arena(self.capacity_bytes, name="snapshot")
        self._num_allocated += 1
        self._arenas[index] = arena
        self._tensors[index] = torch.frombuffer(arena.view, dtype=torch.uint8)
        self._on_allocated(index, arena)
        return arena

    def _find_one_after_another(self, arenas: Sequence[Arena]) -> None:
        def find() -> None:
            for arena in arenas:
                arena.populate().join()

        threading.Thread(target=find, name="free", daemon=True).start()

    def is_found(self, index: int) -> bool:
        """Tell whether the memory of an arena was found, so that it can be filled at full speed."""
        return index in self._arenas and self._arenas[index].is_found

    def get(self, index: int) -> Tensor:
        """Return an arena as bytes."""
        return self._tensors[index]

    def release_outgrown(self) -> None:
        """Give the memory of arenas back that were too small for this world, then have that of the others found."""
        self._is_released = True
        for index in self._outgrown:
            self._on_released(index)
            del self._tensors[index]
        outgrown, unfound = list(self._outgrown.values()), self._unfound
        self._outgrown, self._unfound = {}, []

        def exchange() -> None:
            for arena in outgrown:
                arena.close()
            self._wait_for_freed()
            for arena in unfound:
                arena.populate().join()

        if outgrown or unfound:
            threading.Thread(target=exchange, name="free", daemon=True).start()  # takes seconds


@dataclass(frozen=True, kw_only=True)
class Staged:
    """A copy that is under way (CUDA) or done (CPU); `live` keeps its sources alive."""

    live: Mapping[str, Tensor]
    layout: ShardLayout
    index: int
    """Of the arena."""
    arena: memoryview
    leaving: "Leaving | None"
    """What is still on the device."""

    @property
    def has_left(self) -> bool:
        """The device is free for the next copy."""
        return self.leaving is None or self.leaving.is_over

    def wait_on_device(self) -> None:
        """Let the device change the live state only after the copy.

        The calling thread waits only if the device had no room to copy the state within it.
        """
        if self.leaving is not None:
            self.leaving.wait_on_device()

    def wait_on_host(self) -> None:
        """Bring what is still on the device to the arena, and return when that may be read; on one thread only.

        Raises:
            AbandonedError: `give_up` was called.
        """
        if self.leaving is not None:
            self.leaving.bring()

    def wait_left(self) -> None:
        """Return once the device is free for the next copy."""
        if self.leaving is not None:
            self.leaving.wait()

    def give_up(self) -> None:
        """Return once nothing is written to the arena any more."""
        if self.leaving is not None:
            self.leaving.give_up()


class Stager:
    """Fills arenas; on CUDA on a stream of its own.

    The way to the host is slow and a step is short. What fits into free device memory is therefore copied there first,
    in milliseconds, and leaves it piece by piece while training goes on; only the rest is in the update's way.
    """

    def __init__(self, arenas: HostArenas) -> None:
        self._arenas = arenas

    def stage(self, live: Mapping[str, Tensor], layout: ShardLayout, held: Mapping[str, Box], *, index: int) -> Staged:
        """Start to copy the chunks of `layout` out of the live tensors into an arena.

        Args:
            held: the box of each tensor that this rank holds; a chunk is a part of it.
        """
        arena = self._arenas.get(index)[: layout.num_bytes]
        arena[: len(layout.header)] = torch.frombuffer(bytearray(layout.header), dtype=torch.uint8)
        sources = {name: _find_bytes(live[name], layout, held, name) for name in layout.entries}
        leaving: Leaving | None = None
        for name, source in sources.items():
            if not source.is_cuda:
                offset = layout.entries[name].offset
                arena[offset : offset + source.numel()].copy_(source)
        if self._arenas.exit is not None:
            on_device = {name: source for name, source in sources.items() if source.is_cuda}
            leaving = Leaving(on_device, layout, arena, self._arenas.exit, index=index)
        return Staged(live=live, layout=layout, index=index, arena=arena.numpy().data, leaving=leaving)


def _find_bytes(tensor: Tensor, layout: ShardLayout, held: Mapping[str, Box], name: str) -> Tensor:
    """Return the bytes of one chunk in the live state, in a row."""
    local = get_local(tensor).detach()
    for dim, (first, size) in enumerate(
        zip(layout.entries[name].box.start, layout.entries[name].box.shape, strict=True)
    ):
        local = local.narrow(dim, first - held[name].start[dim], size)
    assert local.is_contiguous(), f"{name} does not lie in a row"
    return local.reshape(-1).view(torch.uint8)


class DeviceExit:
    """The way off one device, for all worlds of a process: a stream, page-locked buffers, and threads to empty them."""

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
        """The last copies that were made on the device, by the arenas they went to, the newest last."""
        buffers = torch.empty(2 * _NUM_COPIERS, _PIECE_BYTES, dtype=torch.uint8, pin_memory=True)
        self._free = list(buffers.unbind())
        self._busy: list[tuple[Tensor, Future[None]]] = []
        self._copiers = ThreadPoolExecutor(_NUM_COPIERS, "leave")
        self.lock = threading.Lock()
        """Held by whoever sends."""

    def clone_some(self, sources: Mapping[str, Tensor], *, index: int) -> tuple[Tensor, dict[str, int]]:
        """Copy on the device what fits there, on the current stream, which must be this one; `release` takes it back.

        The copy that went to another arena than `index` is spared if there is room.

        Returns:
            One stretch of memory, so that the allocator is asked once and finds the same again, and what begins where.
        """
        num_flushes = torch.cuda.memory_stats(self.device).get("num_alloc_retries", 0)
        if num_flushes != self._num_flushes:
            self._has_two, self._num_flushes = False, num_flushes
        free_bytes = torch.cuda.mem_get_info(self.device)[0] - _SPARE_DEVICE_BYTES
        places, num_bytes = plan_clones(
            {name: source.numel() for name, source in sources.items()},
            room_bytes=max(free_bytes - BLOCK_BYTES, 0 if self._in_use else self._cached_bytes),
        )
        num_bytes = -(-num_bytes // BLOCK_BYTES) * BLOCK_BYTES
        self._in_use.append(num_bytes)
        try:
            memory = torch.empty(num_bytes, dtype=torch.uint8, device=self.device)
        except torch.OutOfMemoryError:  # what was cached was needed elsewhere
            self._cached_bytes, self._has_two = 0, False
            return torch.empty(0, dtype=torch.uint8), {}
        self._cached_bytes = max(self._cached_bytes, num_bytes)
        others = {copy.address for arena, copy in self._residents.items() if arena != index}
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
        """Note where the copy for an arena was made, on the current stream, which must be this one."""
        copy = Resident(layout, memory, places) if places else None
        spared = [(i, r) for i, r in self._residents.items() if i != index and not (copy and r.address == copy.address)]
        self._residents = dict(spared[-1:]) | ({index: copy} if copy else {})

    def find_resident(self, index: int, file: str) -> Rows | None:
        """Return what is left on the device of the snapshot that went to an arena, if it was one of the last.

        Args:
            file: name of the shard file that the arena is.
        """
        if index not in self._residents:
            return None
        with torch.cuda.stream(self.stream):
            return self._residents[index].find(file, is_alone=len(self._residents) == 1)

    def send(self, source: Tensor, target: Tensor) -> None:
        """Copy a piece to the host; returns once the device has been asked to, on the current stream."""
        if not self._free:
            buffer, copied = self._busy[0]
            copied.result()
            self._free.append(buffer)
            del self._busy[0]
        buffer = self._free.pop()
        buffer[: source.numel()].copy_(source, non_blocking=True)
        has_left = torch.cuda.Event(blocking=True)
        has_left.record()
        self._busy.append((buffer, self._copiers.submit(_empty, buffer, has_left, target)))

    def wait(self) -> None:
        """Return when all pieces are where they belong, or nothing is under way any more.

        Raises:
            RuntimeError: the device failed.
        """
        self.stream.synchronize()
        busy, self._busy = self._busy, []
        self._free += [buffer for buffer, _ in busy]
        wait([copied for _, copied in busy])
        for _, copied in busy:
            copied.result()


def has_room_for_two(num_bytes: int, *, free_bytes: int) -> bool:
    """Tell whether a second copy of the state may stay on the device: as much again must stay free for others."""
    return free_bytes >= 2 * num_bytes


def plan_clones(num_bytes: Mapping[str, int], *, room_bytes: int) -> tuple[dict[str, int], int]:
    """Return where in one stretch of memory each tensor is copied to, as far as there is room, and how long that is."""
    places: dict[str, int] = {}
    stop = 0
    for name, size in num_bytes.items():
        aligned = -(-size // _ALIGNED_BYTES) * _ALIGNED_BYTES
        if stop + aligned <= room_bytes:
            places[name] = stop
            stop += aligned
    return places, stop


def _empty(buffer: Tensor, has_left: torch.cuda.Event, target: Tensor) -> None:
    has_left.synchronize()
    np.copyto(target.numpy(), buffer[: target.numel()].numpy())  # torch would copy with as many threads as train


class Leaving:
    """A state on its way from the device to an arena: `bring` does it, on a thread that has time for it."""

    def __init__(
        self, sources: dict[str, Tensor], layout: ShardLayout, arena: Tensor, way: DeviceExit, *, index: int
    ) -> None:
        self._layout, self._arena, self._exit = layout, arena, way
        way.stream.wait_stream(torch.cuda.current_stream(way.device))
        with torch.cuda.stream(way.stream):
            memory, places = way.clone_some(sources, index=index)
            self._is_free = way.stream.record_event()
            way.remember(index, layout, memory, places)
        self._clones = {name: memory[place : place + sources[name].numel()] for name, place in places.items()}
        self._late = {name: source for name, source in sources.items() if name not in self._clones}
        """What found no room on the device."""
        self._is_asked_for = threading.Event()
        """The device knows all that it must copy before the live state may change."""
        if not self._late:
            self._is_asked_for.set()
        self._is_given_up = False
        self._is_over = threading.Event()

    def bring(self) -> None:
        """Copy it all, then give the memory on the device back."""
        try:
            with self._exit.lock:
                torch.cuda.set_device(self._exit.device)
                try:
                    with torch.cuda.stream(self._exit.stream):
                        if self._late:
                            self._send(self._late)
                            self._is_free = self._exit.stream.record_event()
                            self._is_asked_for.set()
                        self._send(self._clones)
                finally:
                    self._exit.wait()
        finally:
            self._clones.clear()
            self._exit.release()
            self._is_asked_for.set()
            self._is_over.set()

    def _send(self, sources: dict[str, Tensor]) -> None:
        for name in list(sources):
            source, offset = sources.pop(name), self._layout.entries[name].offset
            for start in range(0, source.numel(), _PIECE_BYTES):
                if self._is_given_up:
                    raise AbandonedError
                part = source[start : start + _PIECE_BYTES]
                self._exit.send(part, self._arena[offset + start : offset + start + part.numel()])

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
