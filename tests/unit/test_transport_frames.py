"""Bytes into messages: whatever comes, and however it is cut."""

import contextlib
import json
import tracemalloc
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic.transport.frames import Decoder, Seal, WireError, encode
from elastic.transport.typed import Vocabulary, to_header

LIMIT = 1000
KEY = b"k" * 32

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=5),
    lambda v: st.lists(v, max_size=3) | st.dictionaries(st.text(max_size=3), v, max_size=3),
    max_leaves=5,
)
HEADERS = st.dictionaries(st.text(min_size=1, max_size=3), JSON, max_size=3).map(lambda v: {**v, "kind": "x"})


def feed_all(decoder, data, cuts):
    """Return the messages and whether all of it was understood."""
    found, at = [], 0
    try:
        for cut in [*sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]:
            found += decoder.feed(data[at:cut])
            assert len(decoder._rest) <= LIMIT + 4 + 16 + (cut - at)
            at = cut
    except WireError:
        return found, False
    return found, True


@pytest.mark.parametrize("key", [None, KEY])
@given(headers=st.lists(HEADERS, max_size=5), cuts=st.lists(st.integers(0, 10_000), max_size=8))
def test_messages_arrive_the_same_however_the_bytes_are_cut(key, headers, cuts):
    sent, received = (Seal(key), Seal(key)) if key else (None, None)
    data = b"".join(encode(header, seal=sent, limit_bytes=10_000) for header in headers)
    decoder = Decoder(limit_bytes=10_000, seal=received)
    found, at = [], 0
    for cut in [*sorted({cut % (len(data) + 1) for cut in cuts}), len(data)]:
        found += decoder.feed(data[at:cut])
        at = cut
    assert found == headers


@pytest.mark.parametrize("key", [None, KEY])
@given(data=st.binary(max_size=3000), cuts=st.lists(st.integers(0, 3000), max_size=5))
def test_arbitrary_bytes_are_refused_or_waited_for_and_never_raise_anything_else(key, data, cuts):
    found, _ = feed_all(Decoder(limit_bytes=LIMIT, seal=Seal(key) if key else None), data, cuts)
    assert all(isinstance(header["kind"], str) for header in found)
    if key:
        assert found == []


@given(text=st.binary(max_size=200), cuts=st.lists(st.integers(0, 300), max_size=4))
def test_a_frame_of_anything_is_a_message_with_a_kind_or_refused(text, cuts):
    found, is_ours = feed_all(Decoder(limit_bytes=LIMIT), len(text).to_bytes(4, "big") + text, cuts)
    assert is_ours == bool(found)


@given(number=st.integers(0, 2), at=st.integers(0, 10_000), bit=st.integers(0, 7))
def test_a_sealed_message_with_one_bit_changed_ends_it_and_is_never_told(number, at, bit):
    seal = Seal(KEY)
    frames = [bytearray(encode({"kind": "x", "n": n}, seal=seal, limit_bytes=LIMIT)) for n in range(3)]
    frames[number][at % len(frames[number])] ^= 1 << bit
    found, _ = feed_all(
        Decoder(limit_bytes=LIMIT, seal=Seal(KEY)), b"".join(frames), [len(frames[0]), 2 * len(frames[0])]
    )
    assert found == [{"kind": "x", "n": n} for n in range(number)]


@pytest.mark.parametrize("order", [[1], [0, 0], [0, 2], [1, 0]], ids=["dropped", "repeated", "left out", "swapped"])
def test_a_sealed_message_that_is_not_the_next_one_ends_it(order):
    seal = Seal(KEY)
    frames = [encode({"kind": "x", "n": n}, seal=seal, limit_bytes=LIMIT) for n in range(3)]
    decoder = Decoder(limit_bytes=LIMIT, seal=Seal(KEY))
    with pytest.raises(WireError):
        for number in order:
            decoder.feed(frames[number])


@pytest.mark.parametrize(
    "data",
    [
        b"GET / HTTP/1.0\r\n\r\n",
        bytes.fromhex("1603010200010001fc0303"),
        b"\0\0\x03\xe8" + b"[" * 1000,
        b'\0\0\0\x0b{"kind": 1}',
        b"\0\0\0\x02[]",
        b"\0\0\0\x00",
    ],
    ids=["http", "tls", "brackets", "kind", "list", "empty"],
)
def test_other_languages_are_refused_at_once(data):
    with pytest.raises(WireError):
        Decoder(limit_bytes=LIMIT).feed(data)


def test_a_hundred_megabytes_without_an_end_are_never_kept():
    decoder = Decoder(limit_bytes=1 << 20)
    piece = b"a" * (1 << 16)
    tracemalloc.start()
    with pytest.raises(WireError):
        for _ in range(1600):
            decoder.feed(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 2 << 20


@dataclass(frozen=True, kw_only=True)
class Part:
    number: int
    name: str | None = None


@dataclass(frozen=True, kw_only=True)
class Other:
    flag: bool


@dataclass(frozen=True, kw_only=True)
class Whole:
    how: Literal["a", "b"]
    parts: tuple[Part, ...]
    by_name: Mapping[str, Part | None]
    pair: tuple[str, float]
    either: Part | Other
    anything: object


VOCABULARY = Vocabulary(Whole, Other)
WHOLE = Whole(
    how="a",
    parts=(Part(number=1), Part(number=2, name="n")),
    by_name={"x": None, "y": Part(number=3)},
    pair=("s", 1.0),
    either=Other(flag=True),
    anything={"a": [1, None]},
)


def carry(message):
    return Decoder(limit_bytes=LIMIT).feed(encode(to_header(message), seal=None, limit_bytes=LIMIT))[0]


def test_a_message_arrives_as_what_it_was():
    assert VOCABULARY.parse(carry(WHOLE)) == WHOLE
    assert VOCABULARY.parse(carry(Other(flag=False))) == Other(flag=False)


@pytest.mark.parametrize(
    "changes",
    [
        {"how": "c"},
        {"how": ["a"]},
        {"parts": {}},
        {"parts": [1]},
        {"parts": [{"kind": "Part"}]},
        {"parts": [{"kind": "Part", "number": True}]},
        {"parts": [{"kind": "Part", "number": 1, "more": 2}]},
        {"parts": [{"kind": "Other", "flag": True}]},
        {"by_name": []},
        {"pair": ["s"]},
        {"pair": ["s", "1"]},
        {"pair": ["s", 10**400]},
        {"either": {"kind": "Whole"}},
        {"either": {"kind": []}},
        {"either": None},
        {"more": 1},
        {"kind": "Part"},
        {"kind": "__class__"},
    ],
    ids=str,
)
def test_a_message_of_another_form_is_refused(changes):
    header = {**carry(WHOLE), **json.loads(json.dumps(changes))}
    with pytest.raises(WireError):
        VOCABULARY.parse(header)
    del header["how"]
    with pytest.raises(WireError):
        VOCABULARY.parse({**carry(WHOLE), "how": None})


@given(changes=st.dictionaries(st.sampled_from([*vars(WHOLE), "x"]), JSON, min_size=1))
def test_no_message_raises_anything_but_its_refusal(changes):
    with contextlib.suppress(WireError):
        assert isinstance(VOCABULARY.parse({**carry(WHOLE), **changes}), Whole)


def test_what_the_peer_would_refuse_is_not_sent():
    with pytest.raises(ValueError, match="a Other of 1029 bytes"):
        encode({"kind": "Other", "x": "x" * 1006}, seal=None, limit_bytes=LIMIT)
