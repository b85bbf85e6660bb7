"""Which states the memories of the living hold, whole: from what replica servers list to manifests. Pure; no torch
here.

A snapshot in memory is the same bytes as a checkpoint in a storage, rank by rank, so it is described by the same
manifest and loaded by the same code. Nothing commits it: it counts once the shards of all ranks of its world are there.
The checksums of a shard that was filled just now may not be known yet, and are not waited for.
"""

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from elastic.checkpoint.format.manifest import BLOCK_BYTES, Chunk, FileRecord, Manifest, TensorRecord, parse_tensor
from elastic.checkpoint.format.sharding import ShardLayout
from elastic.checkpoint.replicas.inventory import ReplicaInfo
from elastic.ports import Progress


@dataclass(frozen=True, kw_only=True)
class WholeSnapshot:
    """A state of which every shard is in the memory or on the disk of a node."""

    manifest: Manifest
    places: Mapping[str, Sequence[ReplicaInfo]]
    """Of each file, its replicas: originals in memory, copies there, then what is on disks."""

    @property
    def step(self) -> int:
        """Return the step whose state it is."""
        return self.manifest.progress.step

    @property
    def needs_copies(self) -> bool:
        """Tell whether some shard is only left as a copy: the memory that it was made in is gone."""
        return any(all(replica.is_copy for replica in places) for places in self.places.values())

    @property
    def needs_disks(self) -> bool:
        """Tell whether some shard is in no memory, only on the disk of a node."""
        return any(all(replica.is_on_disk for replica in places) for places in self.places.values())


def outline(snapshot: WholeSnapshot) -> WholeSnapshot:
    """Return what a rank must know of a state to read it, beside the manifest: without the hundred thousand blocks."""

    def shorten(replica: ReplicaInfo) -> ReplicaInfo:
        return replace(replica, chunks=(), checksums=None if replica.checksums is None else (), record=None)

    return WholeSnapshot(
        manifest=replace(snapshot.manifest, tensors={}, generators={}, files={}),
        places={file: [shorten(replica) for replica in places] for file, places in snapshot.places.items()},
    )


def list_blocks(layout: ShardLayout) -> list[tuple[int, int]]:
    """Return offset and size of the parts of a shard that have checksums of their own, in the order of the file."""
    blocks = [(0, len(layout.header))]
    for entry in layout.entries.values():
        stop = entry.offset + entry.num_bytes
        blocks += [(start, min(BLOCK_BYTES, stop - start)) for start in range(entry.offset, stop, BLOCK_BYTES)]
    return blocks


def build_record(file: str, layout: ShardLayout, manifest: Manifest) -> dict[str, Any]:
    """Return what a rank gives its replica server with a shard.

    Args:
        manifest: of the whole state, with the shape of each tensor but without its chunks.
    """
    return {
        "file": file,
        "manifest": asdict(manifest),
        "chunks": {
            name: {
                "offset": entry.offset,
                "num_bytes": entry.num_bytes,
                "start": entry.box.start,
                "shape": entry.box.shape,
            }
            for name, entry in layout.entries.items()
        },
    }


def get_newest_whole_step(replicas: Iterable[ReplicaInfo]) -> int:
    """Return the step of the best state that is whole; 0: there is none."""
    return max((step for step, _, _ in _find_whole(replicas)), default=0)


def assemble(replicas: Iterable[ReplicaInfo]) -> list[WholeSnapshot]:
    """Return the states that are whole, the best first: of the highest step, then of the newest attempt."""
    whole = _find_whole(replicas)
    return [
        _assemble([sorted(whole[key][rank], key=_get_distance) for rank in range(key[2])])
        for key in sorted(whole, reverse=True)
    ]


_Shards = Mapping[int, Sequence[ReplicaInfo]]
"""The replicas of each rank's shard."""


def _find_whole(replicas: Iterable[ReplicaInfo]) -> dict[tuple[int, int, int], _Shards]:
    """Return the shards of the states that are whole, by step, generation and size of the world."""
    sets: defaultdict[tuple[int, int, int], defaultdict[int, list[ReplicaInfo]]] = defaultdict(
        lambda: defaultdict(list)
    )
    for shard in replicas:
        key = (shard.snapshot.step, shard.snapshot.generation, shard.snapshot.world_size)
        sets[key][shard.snapshot.rank].append(shard)
    return {key: by_rank for key, by_rank in sets.items() if all(rank in by_rank for rank in range(key[2]))}


def _get_distance(replica: ReplicaInfo) -> tuple[bool, bool]:
    return replica.is_on_disk, replica.is_copy


def _assemble(shards: Sequence[Sequence[ReplicaInfo]]) -> WholeSnapshot:
    """Put the manifest together from the records that came with the shards.

    Args:
        shards: of each rank, the replicas of its shard.
    """
    manifest = _parse_manifest(shards[0][0].record["manifest"])
    chunks: defaultdict[str, list[Chunk]] = defaultdict(list)
    files: dict[str, FileRecord] = {}
    for places in shards:
        first, known = places[0], next((replica.checksums for replica in places if replica.checksums is not None), None)
        file = first.record["file"]
        checksums = None if known is None else iter(known)
        header_bytes, header_crc32 = first.chunks[0][1], None if checksums is None else next(checksums)
        files[file] = FileRecord(size_bytes=first.num_bytes, header_bytes=header_bytes, header_crc32=header_crc32)
        for name, place in first.record["chunks"].items():
            num_blocks = -(-place["num_bytes"] // BLOCK_BYTES)
            chunks[name].append(
                Chunk(
                    file=file,
                    offset=place["offset"],
                    num_bytes=place["num_bytes"],
                    start=tuple(place["start"]),
                    shape=tuple(place["shape"]),
                    crc32=() if checksums is None else tuple(next(checksums) for _ in range(num_blocks)),
                )
            )
    return WholeSnapshot(
        manifest=replace(
            manifest,
            tensors={name: replace(record, chunks=tuple(chunks[name])) for name, record in manifest.tensors.items()},
            generators={
                name: replace(record, chunks=tuple(chunks[name])) for name, record in manifest.generators.items()
            },
            files=files,
        ),
        places={places[0].record["file"]: places for places in shards},
    )


def _parse_manifest(fields: Mapping[str, Any]) -> Manifest:
    def parse(records: Mapping[str, Any]) -> dict[str, TensorRecord]:
        return {name: parse_tensor(record) for name, record in records.items()}

    parsed: dict[str, Any] = {
        **fields,
        "progress": Progress(**fields["progress"]),
        "mesh": tuple(fields["mesh"]),
        "tensors": parse(fields["tensors"]),
        "generators": parse(fields["generators"]),
    }
    return Manifest(**parsed)
