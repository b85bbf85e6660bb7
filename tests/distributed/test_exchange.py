"""Values and errors from rank to rank, over a real gloo group; and never by way of a pickle."""

import errno
import pickle

import torch.distributed as dist

from elastic.checkpoint.durable.shard_writer import Written
from elastic.checkpoint.exchange import Parcels
from elastic.checkpoint.format.manifest import FileRecord, Manifest, TensorRecord
from elastic.errors import CheckpointError, StaleGenerationError, StorageError
from elastic.ports import Progress
from tests.distributed._spawn_ckpt import run_ranks

MANIFEST = Manifest(
    progress=Progress(step=3, tokens=10),
    generation=2,
    world_size=3,
    device="cpu",
    mesh=(3,),
    config={"a": {"b": [1, None]}},
    config_hash="x",
    tensors={"w": TensorRecord(dtype="float32", shape=(4, 7), chunks=())},
    generators={},
    files={"f": FileRecord(size_bytes=1, header_bytes=1, header_crc32=1)},
    extra={},
)
FOUND, WRITTEN, DAMAGE = Parcels(Manifest | str), Parcels(Written), Parcels(str | None)


def collect(_run_dir):
    """Return what this rank has found."""

    def refuse(*_args, **_fields):
        raise AssertionError("something was pickled")

    pickle.loads = pickle.load = pickle.dumps = pickle.Unpickler = refuse
    rank = dist.get_rank()
    record = FileRecord(size_bytes=rank, header_bytes=1, header_crc32=2)
    own = Written(record=record, crc32={f"tensor {n}": (n, rank) for n in range(rank * 50)})
    full = OSError(errno.ENOSPC, "No space left on device", "a/b")
    return [
        FOUND.broadcast(MANIFEST if rank == 0 else None, None) == MANIFEST,
        FOUND.broadcast("damaged" if rank == 0 else None, None),
        [describe(each) for each in WRITTEN.gather(own if rank != 1 else full, None)],
        DAMAGE.all_gather(None if rank == 0 else f"of {rank}", None),
        [
            describe(FOUND.broadcast(error if rank == 0 else None, None))
            for error in (StorageError("full"), StaleGenerationError("late"), CheckpointError("torn"), full)
        ],
    ]


def describe(value):
    if isinstance(value, OSError):
        return (type(value).__name__, value.errno, value.strerror, value.filename)
    return (type(value).__name__, str(value)) if isinstance(value, Exception) else len(value.crc32)


def test_every_rank_gets_what_the_others_have_or_met(tmp_path):
    results = run_ranks(collect, 3, tmp_path)
    full = ("OSError", errno.ENOSPC, "No space left on device", "a/b")
    errors = [("StorageError", "full"), ("StaleGenerationError", "late"), ("CheckpointError", "torn"), full]
    for rank, (is_same, damage, written, of_all, met) in enumerate(results):
        assert (is_same, damage, of_all) == (True, "damaged", [None, "of 1", "of 2"])
        assert written == ([0, full, 100] if rank == 0 else [])
        assert met == errors
