"""Which states can be put together from what replica servers list, and what their manifests say."""

import json
import random
import zlib

from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.format.manifest import BLOCK_BYTES, Manifest, TensorRecord
from elastic.checkpoint.format.read_plan import plan_reads
from elastic.checkpoint.format.sharding import Box, Spread, build_layout, plan_chunks
from elastic.checkpoint.replicas.discovery import assemble, build_record, list_blocks
from elastic.checkpoint.replicas.inventory import ReplicaInfo, Snapshot
from elastic.ports import Progress

SHAPE = (1000, 700)  # 2.7 MiB: several blocks per rank


def make_state(*, step, generation, world_size):
    """Return the shards of one tensor and their records, as replica servers list them."""
    spread = Spread(
        shape=SHAPE, dtype="F32", mesh_shape=(world_size,), ranks=tuple(range(world_size)), sharded_dims=(0,)
    )
    shapes = {"w": TensorRecord(dtype="F32", shape=SHAPE, chunks=())}
    manifest = Manifest(
        progress=Progress(step=step, tokens=7 * step),
        generation=generation,
        world_size=world_size,
        device="cpu",
        mesh=(world_size,),
        config={},
        config_hash="",
        tensors=shapes,
        generators={},
        files={},
        extra={"step": step},
    )
    held = []
    for rank, boxes in enumerate(plan_chunks({"w": spread}, world_size=world_size)):
        layout = build_layout(boxes, {"w": "F32"})
        data = layout.header + random.Random(f"{step}/{rank}").randbytes(layout.num_bytes - len(layout.header))
        blocks = list_blocks(layout)
        held.append(
            ReplicaInfo(
                origin=f"{generation}-{rank}",
                index=0,
                snapshot=Snapshot(generation=generation, step=step, world_size=world_size, rank=rank),
                num_bytes=layout.num_bytes,
                chunks=tuple(blocks),
                checksums=tuple(zlib.crc32(data[start : start + size]) for start, size in blocks),
                record=json.loads(json.dumps(build_record(f"f{rank}", layout, manifest))),
                is_copy=False,
                is_on_disk=False,
                node=f"n{rank}",
            )
        )
    return held


def copy(held, node):
    return ReplicaInfo(**{**held.__dict__, "is_copy": True, "node": node})


def test_blocks_cover_a_shard_from_its_first_byte_to_its_last_and_none_is_longer_than_one():
    layout = build_layout({"w": Box((0, 0), SHAPE), "v": Box((0,), (3,))}, {"w": "F32", "v": "U8"})
    blocks = list_blocks(layout)
    assert [start for start, _ in blocks] == [0, *(start + size for start, size in blocks[:-1])]
    assert sum(size for _, size in blocks) == layout.num_bytes
    assert max(size for _, size in blocks[1:]) == BLOCK_BYTES


def test_a_whole_state_has_the_manifest_that_a_checkpoint_would_have():
    held = make_state(step=3, generation=2, world_size=3)
    (found,) = assemble(held)
    manifest = found.manifest
    assert (manifest.progress, manifest.generation, manifest.world_size) == (Progress(step=3, tokens=21), 2, 3)
    assert manifest.extra == {"step": 3}
    reads, gaps = plan_reads(manifest.tensors, {"w": Box((0, 0), SHAPE)}, max_bytes=16 * BLOCK_BYTES)
    assert gaps == []
    assert {read.file for read in reads} == set(found.places) == set(manifest.files) == {"f0", "f1", "f2"}
    for shard in held:
        of_file = [block for read in reads if read.file == shard.record["file"] for block in read.blocks]
        assert [block.crc32 for block in of_file] == list(shard.checksums[1:])
        assert manifest.files[shard.record["file"]].header_crc32 == shard.checksums[0]


def test_a_copy_stands_in_for_what_is_lost_and_stands_behind_what_is_not():
    held = make_state(step=3, generation=1, world_size=2)
    (both,) = assemble([copy(held[0], "n1"), *held])
    assert [place.is_copy for place in both.places["f0"]] == [False, True]
    assert not both.needs_copies
    (left,) = assemble([copy(held[0], "n1"), held[1]])
    assert left.needs_copies


def test_disks_stand_behind_memories_and_what_they_alone_have_is_said():
    held = make_state(step=3, generation=1, world_size=2)
    stored = [ReplicaInfo(**{**shard.__dict__, "is_on_disk": True}) for shard in held]
    (both,) = assemble([*stored, copy(held[0], "n1"), *held])
    assert [(place.is_on_disk, place.is_copy) for place in both.places["f0"]] == [
        *((False, False), (False, True)),
        (True, False),
    ]
    assert not both.needs_disks
    (left,) = assemble([held[0], stored[1]])
    assert left.needs_disks


@given(
    st.lists(
        st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 3)),
        unique_by=lambda key: key[:2],
        min_size=1,
        max_size=4,
    ),
    st.randoms(use_true_random=False),
)
def test_only_whole_states_count_and_the_highest_step_comes_first(states, random):
    held, whole = [], []
    for step, generation, world_size in states:
        shards = make_state(step=step, generation=generation, world_size=world_size)
        lost = random.choice([None, *range(world_size)])
        held += [shard for rank, shard in enumerate(shards) if rank != lost]
        if lost is None:
            whole.append((step, generation))
    random.shuffle(held)
    found = [(snapshot.step, snapshot.manifest.generation) for snapshot in assemble(held)]
    assert found == sorted(whole, reverse=True)
