"""Write the shards of one checkpoint with torch.distributed.checkpoint, each byte once over all ranks.

Its planner spreads what several ranks hold alike (DDP, HSDP) over them. Two things differ from its defaults: the
data come from staged host copies while the plan is made from the live tensors, which need no staged twin; and every
file is counted and checksummed as it is written.
"""

import io
import os
import threading
import zlib
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, cast

import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from elastic.checkpoint.layout import FileRecord, format_checksum
from elastic.checkpoint.stage import Staged

_WRITE_BYTES = 16 * 2**20  # what a shut fence may have to wait for


class AbandonedError(Exception):
    """The save was given up; nothing more may reach the storage."""


class Fence:
    """Lets one thread at a time act on the storage, and none after `shut` has returned.

    A thread that still waits for a peer of a dead world must never touch what the next world writes.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_shut = False

    def shut(self) -> None:
        """Wait for the action under way, then refuse all others."""
        with self._lock:
            self._is_shut = True

    def __enter__(self) -> None:
        self._lock.acquire()
        if self._is_shut:
            self._lock.release()
            raise AbandonedError

    def __exit__(self, _t: type[BaseException] | None, _e: BaseException | None, _tb: TracebackType | None) -> None:
        self._lock.release()


def write_shards(directory: Path, staged: Staged, *, group: dist.ProcessGroup, fence: Fence) -> dict[str, FileRecord]:
    """Write this rank's shards (on rank 0 also `.metadata`) and return the durable files of this rank.

    Collective over `group`, which nothing else may use meanwhile. `directory` must be empty.

    Raises:
        CheckpointException: a rank failed; on all ranks alike.
    """
    files = _RecordingFiles(fence)
    writer = FileSystemWriter(directory, per_thread_copy_ahead=0)  # the data are on the host: no copies to overlap
    writer.fs = files
    save(dict(staged.live), storage_writer=writer, planner=_StagedPlanner(staged.host), process_group=group)
    return files.records


class _StagedPlanner(DefaultSavePlanner):
    def __init__(self, host: Mapping[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self._host = host

    def lookup_object(self, index: MetadataIndex) -> Any:
        return self._host[index.fqn]


class _RecordingFiles(FileSystem):
    def __init__(self, fence: Fence) -> None:
        self.records: dict[str, FileRecord] = {}
        self._fence = fence

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Generator[io.IOBase, None, None]:
        assert mode == "wb", "this file system is for saving"
        with self._fence:
            file = Path(path).open("wb", buffering=0)  # noqa: SIM115 - closed by the next line
        with file:
            recorder = _Recorder(file, self._fence)
            try:
                yield cast(io.IOBase, recorder)
            except RuntimeError as error:
                if recorder.error is None:
                    raise
                raise recorder.error from error  # torch's archive writer had covered it with an error of its own
        self.records[Path(path).name] = FileRecord(
            size_bytes=recorder.size_bytes, checksum=format_checksum(recorder.crc32)
        )

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        with self._fence:
            super().rename(path, new_path)
        self.records[Path(new_path).name] = self.records.pop(Path(path).name)


class _Recorder:
    """An unbuffered file that counts and checksums what passes."""

    def __init__(self, file: io.FileIO, fence: Fence) -> None:
        self.size_bytes = 0
        self.crc32 = 0
        self.error: OSError | None = None
        self._file = file
        self._fence = fence

    def write(self, data: bytes | memoryview) -> int:
        rest = memoryview(data).cast("B")
        try:
            while rest:
                with self._fence:
                    written = self._file.write(rest[:_WRITE_BYTES])
                self.crc32 = zlib.crc32(rest[:written], self.crc32)
                self.size_bytes += written
                rest = rest[written:]
        except OSError as error:
            self.error = error
            raise
        return memoryview(data).nbytes

    def tell(self) -> int:
        return self.size_bytes

    def flush(self) -> None:
        pass

    def fileno(self) -> int:
        return self._file.fileno()

    def close(self) -> None:
        self._file.close()
