"""The buffers that one process stages in: where their memory comes from, and when it is given back.

The copy of a rank's state lies in a buffer: one stretch of memory that is, byte for byte, the rank's shard file.
"""

import threading
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from elastic.checkpoint.staging.device_to_host import DeviceToHostEngine
from elastic.checkpoint.staging.shared_memory import SharedBuffer, allocate_buffer


class HostBuffers:
    """The buffers that one process stages in; they outlive worlds.

    They are not page-locked: for tens of GiB that takes as many seconds, in which no other call that has to do with
    memory gets through to the device, at a save or anywhere else; and restoring was no faster. What leaves a GPU comes
    through a few buffers that are.

    Args:
        count: how many buffers there will be; may be changed before `reserve`.
        on_allocated: takes each new buffer with its number, before it is used.
        on_released: takes the number of one that will not be used again.
        wait_for_freed: returns once the memory of those is free, as far as others hold it.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        count: int,
        on_allocated: Callable[[int, SharedBuffer], None] = lambda _index, _buffer: None,
        on_released: Callable[[int], None] = lambda _index: None,
        wait_for_freed: Callable[[], object] = lambda: None,
    ) -> None:
        self.count = count
        self._on_allocated, self._on_released = on_allocated, on_released
        self._wait_for_freed = wait_for_freed
        self._buffers: dict[int, SharedBuffer] = {}
        self._outgrown: dict[int, SharedBuffer] = {}
        """Too small for this world, but what they hold is all there is until it has filled one of its own."""
        self._unfound: list[SharedBuffer] = []
        """Memory for these is yet to be found."""
        self._tensors: dict[int, Tensor] = {}
        self._num_allocated = 0
        self.capacity_bytes = 0
        """What each of them has room for."""
        self._is_released = False
        """This world has a state that is safe, and earlier ones hold nothing any more."""
        self.has_room_at_once = False
        """The node has memory for all of this world's without what earlier ones hold."""
        self.engine = DeviceToHostEngine(device) if device.type == "cuda" else None

    @property
    def indices(self) -> list[int]:
        """Return the numbers of the buffers that may be filled."""
        return [index for index, buffer in self._buffers.items() if buffer not in self._unfound]

    @property
    def limit(self) -> int:
        """Return how many may be filled, at least, on every rank of the world."""
        return self.count if self.has_room_at_once or self._is_released else min(1, self.count)

    def begin_world(self, count: int, *, has_room_at_once: bool) -> None:
        """Take what all ranks of a world have agreed on."""
        self.count, self.has_room_at_once, self._is_released = count, has_room_at_once, False

    @property
    def num_held(self) -> int:
        """Return how many there are that are large enough, those too that must not be filled yet."""
        return len(self._buffers)

    @property
    def held_bytes(self) -> int:
        """Return what all of them have room for, those too that are about to be released."""
        return sum(buffer.num_bytes for buffer in (*self._buffers.values(), *self._outgrown.values()))

    def reserve(self, num_bytes: int) -> None:
        """Make sure that each buffer has room for so much; the memory of the first is found before it is written to.

        That of the others waits for `release_outgrown`, and so do they: until this world has a snapshot that is safe,
        the node still holds those of the one before. Where it has room for all (`has_room_at_once`), none waits.

        Raises:
            CheckpointError: the memory is refused.
        """
        is_new = num_bytes > self.capacity_bytes
        if is_new:
            self._outgrown |= self._buffers
            self._buffers, self._unfound, self.capacity_bytes = {}, [], num_bytes
        added = [self._allocate() for _ in range(self.count - len(self._buffers))]
        if not added:
            return
        at_once = added if self.has_room_at_once else added[:1] if is_new else []
        self._unfound += added[len(at_once) :]
        self._find_one_after_another(at_once)

    def _allocate(self) -> SharedBuffer:
        index, buffer = self._num_allocated, allocate_buffer(self.capacity_bytes, name="snapshot")
        self._num_allocated += 1
        self._buffers[index] = buffer
        self._tensors[index] = torch.frombuffer(buffer.view, dtype=torch.uint8)
        self._on_allocated(index, buffer)
        return buffer

    def _find_one_after_another(self, buffers: Sequence[SharedBuffer]) -> None:
        def find() -> None:
            for buffer in buffers:
                buffer.populate().join()

        threading.Thread(target=find, name="free", daemon=True).start()

    def is_found(self, index: int) -> bool:
        """Tell whether the memory of a buffer was found, so that it can be filled at full speed."""
        return index in self._buffers and self._buffers[index].is_found

    def get(self, index: int) -> Tensor:
        """Return a buffer as bytes."""
        return self._tensors[index]

    def release_outgrown(self) -> None:
        """Give the memory of buffers back that were too small for this world, then have that of the others found."""
        self._is_released = True
        for index in self._outgrown:
            self._on_released(index)
            del self._tensors[index]
        outgrown, unfound = list(self._outgrown.values()), self._unfound
        self._outgrown, self._unfound = {}, []

        def exchange() -> None:
            for buffer in outgrown:
                buffer.close()
            self._wait_for_freed()
            for buffer in unfound:
                buffer.populate().join()

        if outgrown or unfound:
            threading.Thread(target=exchange, name="free", daemon=True).start()  # takes seconds
