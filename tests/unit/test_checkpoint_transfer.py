"""How a shard is cut for several connections, and what becomes of its pieces on the way."""

import random
import socket
import threading
import zlib
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from elastic.checkpoint.bandwidth import Rate
from elastic.checkpoint.replicas import transfer
from elastic.checkpoint.replicas.messages import COPY_ANSWERS, Taken
from elastic.checkpoint.replicas.transfer import checksum_parts, cut_stripes, join, receive_parts
from elastic.checkpoint.staging.shared_memory import allocate_buffer
from elastic.transport import Channel, Peer


def lay_out(sizes):
    return [(sum(sizes[:number]), size) for number, size in enumerate(sizes)]


@given(st.lists(st.integers(1, 1000), min_size=1, max_size=60), st.integers(1, 9))
def test_stripes_are_all_chunks_once_and_in_order_and_none_is_empty_or_much_longer_than_its_share(sizes, num_stripes):
    stripes = cut_stripes(lay_out(sizes), num_stripes)
    assert [number for first, stop in stripes for number in range(first, stop)] == list(range(len(sizes)))
    assert all(first < stop for first, stop in stripes)
    assert len(stripes) <= num_stripes
    assert max(sum(sizes[first:stop]) for first, stop in stripes) <= sum(sizes) / num_stripes + max(sizes)


@given(st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=1, max_size=30))
def test_parts_that_touch_are_joined_and_no_others(pieces):
    parts, at = [], 0
    for size, has_gap in pieces:
        at += has_gap
        parts.append((at, size))
        at += size
    joined = join(parts)
    assert [at for start, size in joined for at in range(start, start + size)] == [
        at for start, size in parts for at in range(start, start + size)
    ]
    assert all(a + b < c for (a, b), (c, _) in pairwise(joined))


def test_what_is_sent_from_one_buffer_is_in_the_other_with_its_checksums(monkeypatch):
    monkeypatch.setattr(transfer, "PIECE_BYTES", 1000)
    sizes = [17, 999, 1, 5000, 400, 400, 400, 3]
    parts = lay_out(sizes)
    source, target = (allocate_buffer(sum(sizes), name="test") for _ in range(2))
    source.view[:] = random.Random(1).randbytes(sum(sizes))
    ours, theirs = (Channel(Peer(each, None), COPY_ANSWERS) for each in socket.socketpair())
    ours.set_timeout(10)

    def send():
        ours.send_file(Taken(), source.descriptor, join(parts), check=lambda: None)

    sender = threading.Thread(target=send)
    sender.start()
    assert theirs.receive() == Taken()
    assert theirs.payload_bytes == sum(sizes)
    received = receive_parts(theirs, target, parts, check=lambda: None)
    sender.join()
    assert bytes(target.view) == bytes(source.view)
    assert received == checksum_parts(source, parts) == [zlib.crc32(source.view[at : at + n]) for at, n in parts]
    for each in (ours, theirs, source, target):
        each.close()


def test_a_rate_is_what_the_way_can_do_and_not_what_was_in_its_way_once():
    rate = Rate(assumed=100.0)
    assert rate.estimate_s(1000) == 10
    rate.measured(1000, 50.0)  # while something else took the way
    rate.measured(1000, 2.0)
    assert rate.estimate_s(1000) == 2
    for _ in range(5):  # it has become slower for good
        rate.measured(1000, 8.0)
    assert rate.estimate_s(1000) == 8
