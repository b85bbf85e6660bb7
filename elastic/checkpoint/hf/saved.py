"""The weights of a checkpoint, piece by piece, each verified before it is given away. No torch here."""

import math
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

from elastic.checkpoint.format.manifest import CommittedCheckpoint, Manifest, is_committed, read_manifest
from elastic.checkpoint.format.read_plan import plan_reads
from elastic.checkpoint.format.sharding import ITEM_BYTES, Box
from elastic.checkpoint.format.sources import DamageError, StorageSource, read_verified
from elastic.checkpoint.hf.exporting import WeightSource
from elastic.checkpoint.hf.four_bits import dequantise
from elastic.checkpoint.hf.numbers import DTYPES, to_fp32
from elastic.errors import CheckpointError
from elastic.model_config import ModelConfig
from elastic.records.rundir import BASE
from elastic.storage import Storage
from elastic.tuning import LORA_A, LORA_B, LoraConfig, get_adapter_shapes

_PIECE_BYTES = 16 * 2**20
_IN_4_BITS = "U8"
"""Of frozen weights whose rows are bytes of `elastic/nf4.py`."""


class SavedWeights:
    """The model of one checkpoint, as a `WeightSource`."""

    def __init__(self, storage: Storage, checkpoint: CommittedCheckpoint, manifest: Manifest) -> None:
        self._where = f"{storage.url}/{checkpoint.directory}"
        self._source = StorageSource(storage, checkpoint.directory)
        self._tensors = manifest.tensors

    def read(self, name: str) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the numbers of a parameter in row-major order.

        Raises:
            CheckpointError: the checkpoint lacks it, or holds other bytes than were written.
        """
        record = self._tensors.get(f"model.{name}")
        if record is None or record.dtype not in (*DTYPES, _IN_4_BITS):
            raise CheckpointError(
                f"{self._where} has no weights called {name}: the code of the model changed since it was saved. "
                "Export it with the version of Solvent that wrote it."
            )
        num_rows, *row_shape = record.shape
        rows_per_piece = max(1, _PIECE_BYTES // (math.prod(row_shape) * ITEM_BYTES[record.dtype]))
        for row in range(0, num_rows, rows_per_piece):
            box = Box((row, *[0] * len(row_shape)), (min(rows_per_piece, num_rows - row), *row_shape))
            data = self._read_box(f"model.{name}", box)
            if record.dtype == _IN_4_BITS:
                yield dequantise(np.frombuffer(data, np.uint8).reshape(box.shape)).reshape(-1)
            else:
                yield to_fp32(data, record.dtype)

    def _read_box(self, name: str, box: Box) -> bytearray:
        item_bytes = ITEM_BYTES[self._tensors[name].dtype]
        filled = bytearray(box.num_elements * item_bytes)
        reads, gaps = plan_reads(self._tensors, {name: box}, max_bytes=_PIECE_BYTES)
        if gaps:
            raise self._fail(f"a part of {name} is in no file")
        for read in reads:
            buffer = memoryview(bytearray(read.num_bytes))
            try:
                data = read_verified(read, [self._source], lambda buffer=buffer: buffer)
            except DamageError as error:
                raise self._fail(str(error)) from error
            for piece in read.pieces:
                num_bytes = piece.num_elements * item_bytes
                target = piece.target * item_bytes
                filled[target : target + num_bytes] = data[piece.start : piece.start + num_bytes]
        return filled

    def _fail(self, reason: str) -> CheckpointError:
        return CheckpointError(
            f"{self._where} is damaged: {reason}. Export an older checkpoint with --step; `solvent checkpoint ls` "
            "shows which there are."
        )


class MergedWeights:
    """Frozen weights with what adapters add to them, as a `WeightSource`: ``weight + scale * B @ A``, row by row."""

    def __init__(self, base: WeightSource, adapters: WeightSource, model: ModelConfig, lora: LoraConfig) -> None:
        self._base, self._adapters, self._scale = base, adapters, lora.scale
        self._shapes = get_adapter_shapes(model, lora)

    def read(self, name: str) -> Iterator[npt.NDArray[np.float32]]:
        """Yield the numbers of a parameter in row-major order.

        Raises:
            CheckpointError: frozen weights or adapters are damaged.
        """
        layer = name.removesuffix(".weight")
        if f"{layer}.{LORA_A}" not in self._shapes:
            yield from self._base.read(name)
            return
        lora_a, lora_b = self._read_adapter(f"{layer}.{LORA_A}"), self._read_adapter(f"{layer}.{LORA_B}")
        row = 0
        for piece in self._base.read(name):
            rows = piece.reshape(-1, lora_a.shape[1])
            added = lora_b[row : row + len(rows)] @ lora_a
            yield (rows + np.float32(self._scale) * added).astype(np.float32, copy=False).reshape(-1)
            row += len(rows)

    def _read_adapter(self, name: str) -> npt.NDArray[np.float32]:
        return np.concatenate(list(self._adapters.read(name))).reshape(self._shapes[name])


def open_base(storage: Storage) -> tuple[SavedWeights, Manifest]:
    """Return the frozen weights of a run with adapters, and what is said of them.

    Raises:
        CheckpointError: they are not there.
        OSError: the storage does not work.
    """
    checkpoint = CommittedCheckpoint(directory=BASE, step=0)
    if not is_committed(storage, BASE):
        raise CheckpointError(
            f"{storage.url}/{BASE} is not there, or not whole: the frozen weights beside which this run's adapters "
            "were trained. Bring it back from a copy, or export the adapters alone (--to peft)."
        )
    manifest = read_manifest(storage, checkpoint)
    return SavedWeights(storage, checkpoint, manifest), manifest
