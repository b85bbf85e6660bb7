"""What every storage promises, on a directory and on an S3 server."""

import errno
from concurrent.futures import ThreadPoolExecutor

import pytest

from elastic.errors import StorageError
from elastic.storage import open_storage
from elastic.storage.faulty import FAULTS_VARIABLE, Fault, write_fault

LARGE_BYTES = 33 * 2**20  # more than one part of an upload


@pytest.fixture(params=["local", "s3"])
def storage(request, tmp_path):
    return open_storage(tmp_path / "run" if request.param == "local" else request.getfixturevalue("s3_url") + "/run")


def test_what_is_written_is_read_listed_and_deleted(storage):
    assert storage.list() == []
    assert storage.write("a/b/x", [b"one", bytearray(b"two"), memoryview(b"three")]) == 11
    assert storage.write("a/y", []) == 0
    storage.write("ab", [b"old and long"])
    assert storage.write("ab", [b"new"]) == 3
    assert storage.list() == ["a/b/x", "a/y", "ab"]
    assert storage.list("a/") == ["a/b/x", "a/y"]
    assert storage.list("a") == ["a/b/x", "a/y", "ab"]
    assert storage.list("nothing/") == []
    assert [storage.get_size(key) for key in ("a/b/x", "a/y", "ab", "a", "none")] == [11, 0, 3, None, None]
    assert (storage.read("a/b/x"), storage.read("a/y"), storage.read("ab")) == (b"onetwothree", b"", b"new")
    storage.delete(["a/b/x", "a/none", "a/y"])
    storage.delete([])
    assert storage.list() == ["ab"]


def test_any_range_is_read_and_none_beyond_the_end(storage):
    storage.write("x", [b"0123456789"])
    assert storage.read("x", start=3, size=4) == b"3456"
    assert storage.read("x", start=8) == b"89"
    assert storage.read("x", start=8, size=100) == b"89"
    assert storage.read("x", start=100) == b""
    out = bytearray(4)
    storage.read_into("x", 5, memoryview(out))
    storage.read_into("x", 10, memoryview(b""))
    assert out == b"5678"
    for start in (8, 100):
        with pytest.raises(OSError, match="run/x") as caught:
            storage.read_into("x", start, memoryview(out))
        assert caught.value.errno == errno.ENODATA


def test_a_missing_key_is_a_file_that_is_not_found(storage):
    out = memoryview(bytearray(1))
    for read in (storage.read, lambda key: storage.read(key, start=1), lambda key: storage.read_into(key, 0, out)):
        with pytest.raises(FileNotFoundError) as caught:
            read("nothing")
        assert caught.value.errno == errno.ENOENT
        assert str(caught.value.filename).endswith("run/nothing")


def test_a_large_object_is_whole_and_one_that_is_cut_short_does_not_appear(storage):
    piece = memoryview(bytes(range(256)) * 4096)  # 1 MiB

    def cut_short():
        yield piece
        yield from [piece] * 40
        raise RuntimeError("the source broke off")

    with pytest.raises(RuntimeError, match="the source broke off"):
        storage.write("large", cut_short())
    assert storage.list() == []
    assert storage.write("large", [piece] * 33) == LARGE_BYTES == storage.get_size("large")
    assert storage.read("large", start=LARGE_BYTES - 3) == b"\xfd\xfe\xff"
    out = bytearray(LARGE_BYTES)
    storage.read_into("large", 0, memoryview(out))
    assert out == bytes(piece) * 33


def test_one_of_many_writers_creates_a_key(storage):
    with ThreadPoolExecutor(8) as pool:
        won = list(pool.map(lambda i: storage.put_new("epochs/00000001", str(i).encode()), range(8)))
    assert sum(won) == 1
    assert storage.read("epochs/00000001") == str(won.index(True)).encode()
    assert storage.list() == ["epochs/00000001"]


def test_failing_operations_lose_nothing(storage, tmp_path, monkeypatch):
    control = tmp_path / "faults.json"
    monkeypatch.setenv(FAULTS_VARIABLE, str(control))
    monkeypatch.setattr("elastic.storage.retry._FIRST_PAUSE_S", 0.001)
    flaky = open_storage(storage.url)
    write_fault(control, Fault(kind="flaky", rate=0.2, seed=3))
    for i in range(40):
        assert flaky.write(f"w/{i}", [b"data", str(i).encode()])
        assert flaky.put_new(f"n/{i}", str(i).encode())
        assert not flaky.put_new(f"n/{i}", b"another")
    assert [flaky.read(f"w/{i}") for i in range(40)] == [b"data" + str(i).encode() for i in range(40)]
    assert [flaky.read(f"n/{i}") for i in range(40)] == [str(i).encode() for i in range(40)]
    write_fault(control, Fault(kind="flaky", rate=1.0))
    with pytest.raises(OSError, match="failed on demand"):
        flaky.read("w/0")
    control.unlink()
    assert flaky.read("w/0") == b"data0"


def test_a_place_that_cannot_be_opened_is_refused():
    for url in ("ftp://host/x", "s3://"):
        with pytest.raises(StorageError, match="s3://bucket/folder"):
            open_storage(url)


def test_a_bucket_that_is_not_there_is_named(s3_environment):
    with pytest.raises(OSError, match="bucket") as caught:
        open_storage("s3://no-such-bucket/run").put_new("x", b"")
    assert caught.value.errno == errno.ENOENT
    assert caught.value.filename == "s3://no-such-bucket/run/x"
