"""Training data in an object store: read by range, verified, kept on disk within bounds, whatever the store does."""

import errno
import json
import os
import shutil
import threading
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from cluster.cli import main
from elastic.config import DataConfig, PhaseConfig, RunConfig, SourceConfig, TrainConfig
from elastic.data.corpus import Corpus, open_corpus
from elastic.data.loader import Loader
from elastic.data.preparation.prepare import prepare
from elastic.data.prepared import remote_folder
from elastic.data.prepared.block_cache import BlockCache
from elastic.data.prepared.format import (
    BLOCK_BYTES,
    BLOCK_SUMS_FILE,
    read_info,
    write_block_sums,
    write_info,
    write_shard,
)
from elastic.data.prepared.shards import open_dataset
from elastic.errors import DataError
from elastic.nn.loss import IGNORE
from elastic.storage import open_storage
from tests.flaky_proxy import open_proxy

CPU = torch.device("cpu")
MIB = 2**20


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """Three shards of 2 MiB and a smaller one, as `prepare` would make them of a large text."""
    folder = tmp_path_factory.mktemp("made")
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"{n} sheep " * 90}) + "\n" for n in range(400)))
    prepare([folder / "a.jsonl"], folder / "data", vocab_size=300)
    data, random = folder / "data", np.random.default_rng(0)
    info = read_info(data)
    shards, num_documents = [], 0
    for index, num_tokens in enumerate((MIB, MIB, MIB, 70_000)):
        tokens = random.integers(1, 300, num_tokens).astype(np.uint16)
        ends = np.unique(np.append(random.integers(2, num_tokens, num_tokens // 700), num_tokens))
        tokens[ends - 1] = info.eot_id
        num_documents += len(ends)
        shards.append(write_shard(data / f"train-{index:05d}.arrow", tokens, np.array([0, *ends], np.int32)))
    train = replace(info.train, num_tokens=3 * MIB + 70_000, num_documents=num_documents, shards=tuple(shards))
    info = replace(info, train=train, largest_id=299)
    write_block_sums(data, info)
    write_info(data, info)
    return data


def upload(folder, url):
    storage = open_storage(url)
    for path in folder.iterdir():
        if not path.name.startswith("."):
            storage.write(path.name, [path.read_bytes()])
    return storage


@pytest.fixture
def url(made, s3_url):
    upload(made, s3_url)
    return s3_url


def make_config(path, cache, *, packing="stream", cache_gib=1.0, **train):
    data = DataConfig(path=str(path), seq_len=500, packing=packing, cache=str(cache), cache_gib=cache_gib)
    return RunConfig(data=data, train=TrainConfig(**{"steps": 8, "global_batch": 12, "micro_batch": 4, **train}))


def read_steps(config, *, world_size=1, start_step=0):
    """Return what ranks get, by step."""
    steps = Counter()
    for rank in range(world_size):
        with Loader(open_corpus(config), rank=rank, world_size=world_size, device=CPU, start_step=start_step) as loader:
            for step, batch in loader:
                parts = [tensor.tolist() for microbatch in batch.microbatches for tensor in microbatch]
                steps[step, rank] = (batch.sample_ids, parts)
    return dict(steps)


@pytest.mark.parametrize("packing", ["stream", "documents"])
def test_batches_are_those_of_the_local_folder(made, url, tmp_path, packing):
    local = read_steps(make_config(made, tmp_path / "none", packing=packing))
    assert read_steps(make_config(url, tmp_path / "cache", packing=packing)) == local
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("read-ahead", "loader"))]


def test_data_of_older_versions_is_found_in_its_shards(made, s3_url, tmp_path):
    old = shutil.copytree(made, tmp_path / "old")
    content = json.loads((old / "dataset.json").read_text())
    del content["has_block_sums"]
    for split in ("train", "val"):
        for shard in content[split]["shards"]:
            del shard["layout"]
    (old / "dataset.json").write_text(json.dumps(content))
    (old / BLOCK_SUMS_FILE).unlink()
    upload(old, s3_url)
    config = make_config(s3_url, tmp_path / "cache", packing="documents")
    assert read_steps(config) == read_steps(make_config(made, tmp_path, packing="documents"))


def test_a_token_by_token_mask_is_read_by_range(s3_url, tmp_path):
    data, random = tmp_path / "data", np.random.default_rng(1)
    (tmp_path / "a.txt").write_text("text " * 99)
    prepare([tmp_path / "a.txt"], data, vocab_size=300, val_fraction=0)
    tokens, counted = random.integers(0, 300, MIB).astype(np.uint16), random.random(MIB) < 0.3
    shard = write_shard(data / "train-00000.arrow", tokens, np.array([0, MIB], np.int32), counted)
    info = replace(read_info(data), has_counted=True)
    info = replace(info, train=replace(info.train, num_tokens=MIB, num_documents=1, shards=(shard,)))
    write_block_sums(data, info)
    write_info(data, info)
    upload(data, s3_url)
    for dataset in (open_dataset(data), open_dataset(s3_url)):
        for start, count in ((0, 9), (77_777, 1001), (MIB - 3, 3)):
            np.testing.assert_array_equal(dataset.read_counted("train", start, count), counted[start : start + count])
            np.testing.assert_array_equal(dataset.read_tokens("train", start, count), tokens[start : start + count])


def test_a_step_fetches_the_blocks_of_its_samples_and_not_the_shards(url, tmp_path):
    corpus = open_corpus(make_config(url, tmp_path / "cache", steps=1))
    with Loader(corpus, rank=0, world_size=1, device=CPU, start_step=0) as loader:
        next(loader)
    # 12 samples of 1000 bytes, each in one block of 64 KiB, or two; sums of 4 shards beside them
    assert corpus.sources[""].folder.num_bytes_fetched < 14 * BLOCK_BYTES


def test_what_a_node_has_read_is_read_from_its_disk_by_the_next_process(url, tmp_path):
    config = make_config(url, tmp_path / "cache")
    seen, fetched = [], []
    for _ in range(2):
        corpus = open_corpus(config)
        with Loader(corpus, rank=0, world_size=1, device=CPU, start_step=0) as loader:
            seen.append([batch.sample_ids for _, batch in loader])
        fetched.append(corpus.sources[""].folder.num_bytes_fetched)
    assert seen[0] == seen[1]
    # the checksums of blocks, and what the first had not read ahead when it ended
    assert fetched[1] < fetched[0] / 4, fetched


def test_a_block_that_was_damaged_on_the_disk_is_fetched_again(made, url, tmp_path):
    config = make_config(url, tmp_path / "cache")
    first = read_steps(config)
    (file,) = (tmp_path / "cache").iterdir()
    with file.open("r+b") as blocks:
        begin = 16 * 8 * (file.stat().st_size // (8 * (16 + BLOCK_BYTES)))
        for at in range(begin, file.stat().st_size, 3 * BLOCK_BYTES):  # every third
            blocks.seek(at + 1000)
            byte = blocks.read(1)
            blocks.seek(at + 1000)
            blocks.write(bytes([byte[0] ^ 1]))
    assert read_steps(config) == first == read_steps(make_config(made, tmp_path))


@pytest.mark.parametrize("cache_gib", [0.0, 8 * BLOCK_BYTES / 2**30, 32 * BLOCK_BYTES / 2**30])
def test_the_cache_never_grows_beyond_what_was_configured(made, url, tmp_path, cache_gib):
    config = make_config(url, tmp_path / "cache", cache_gib=cache_gib, steps=12)
    assert read_steps(config) == read_steps(make_config(made, tmp_path, steps=12))
    used = sum(path.stat().st_blocks * 512 for path in tmp_path.glob("cache/*"))
    assert used <= cache_gib * 2**30 * 1.01 + 4096


def test_a_full_disk_costs_the_cache_and_no_sample(made, url, tmp_path, monkeypatch, caplog):
    real = os.pwrite

    def write(file, data, at):
        if at > 10 * BLOCK_BYTES and len(data) > 100:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(file, data, at)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", write)
        config = make_config(url, tmp_path / "cache", cache_gib=0.01)
        assert read_steps(config) == read_steps(make_config(made, tmp_path))
    assert "data.cache cannot be used" in caplog.text
    (tmp_path / "file").write_text("in the way")
    assert read_steps(make_config(url, tmp_path / "file" / "cache")) == read_steps(make_config(made, tmp_path))


def test_a_store_that_fails_and_dawdles_costs_no_sample(made, url, tmp_path, s3_environment, monkeypatch):
    rates = {"throttled": 0.1, "answer lost": 0.05, "hung up": 0.05, "slow": 0.1}
    with open_proxy(s3_environment, rates=rates, slow_s=0.1) as (proxy, done):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        found = read_steps(make_config(url, tmp_path / "cache", packing="documents"), world_size=2)
    assert found == read_steps(make_config(made, tmp_path, packing="documents"), world_size=2)
    assert sum(done[fate] for fate in rates) > 10 and done["slow"] and done["throttled"] + done["answer lost"]


def test_bytes_that_are_not_those_that_were_prepared_are_never_trained_on(made, url, tmp_path):
    storage = open_storage(url)
    name = read_info(made).train.shards[1].file
    content = bytearray((made / name).read_bytes())
    for at in range(500, len(content), BLOCK_BYTES):
        content[at] ^= 1
    storage.write(name, [bytes(content)])
    with pytest.raises(DataError, match=rf"{name} is corrupt at byte .*Copy the folder to the store again"):
        read_steps(make_config(url, tmp_path / "cache"))
    storage.write(name, [bytes(content[: len(content) // 2])])
    with pytest.raises(DataError, match=rf"{name} (ends too early|is corrupt)"):
        read_steps(make_config(url, tmp_path / "cache2"))


def test_an_outage_is_waited_for(made, url, tmp_path, s3_environment, monkeypatch):
    dataset = open_dataset(url)
    failures = iter([errno.EIO] * 3)
    real = dataset.folder._storage.read_into

    def read_into(key, start, out):
        if code := next(failures, None):
            raise OSError(code, os.strerror(code), key)
        real(key, start, out)

    monkeypatch.setattr(dataset.folder._storage, "read_into", read_into)
    np.testing.assert_array_equal(dataset.read("train", 7, 500), open_dataset(made).read("train", 7, 500))
    monkeypatch.setattr(remote_folder, "_PATIENCE_S", -1.0)
    failures = iter([errno.EIO])
    with pytest.raises(DataError, match="cannot be read"):
        dataset.read("train", 3000, 500)


@pytest.mark.parametrize(
    ("gone", "told"),
    [
        ("dataset.json", "is not a prepared folder: it has no dataset.json"),
        ("tokenizer.json", "is not a prepared folder: it has no tokenizer.json"),
        ("train-00002.arrow", "train-00002.arrow is missing, dataset.json lists it (as 1 of 6 files)"),
        ("blocks.crc32", "blocks.crc32 is missing"),
    ],
)
def test_what_was_not_copied_is_named_before_a_step_is_paid_for(url, tmp_path, gone, told):
    open_storage(url).delete([gone])
    with pytest.raises(DataError) as caught:
        open_corpus(make_config(url, tmp_path / "cache"))
    assert told in str(caught.value)


@pytest.mark.parametrize("place", ["s3://no-such-bucket/data", "ftp://host/data"])
def test_a_place_that_cannot_be_read_is_the_users_to_mend(s3_environment, tmp_path, place):
    with pytest.raises(DataError, match=r"data\.path="):
        open_corpus(make_config(place, tmp_path / "cache"))


def test_data_in_a_store_can_be_looked_at_and_verified(made, url, capsys, tmp_path):
    assert main(["data", "ls", url]) == 0
    assert main(["data", "show", url, "--sample", "3"]) == 0
    assert main(["data", "verify", url]) == 0
    assert f"{url} is whole" in capsys.readouterr().out
    name = read_info(made).val.shards[0].file
    open_storage(url).write(name, [(made / name).read_bytes()[:-1]])
    assert main(["data", "verify", url]) == 1
    assert f"{url}/{name} ends too early" in capsys.readouterr().out
    assert main(["data", "ls", f"{url}-none"]) == 2


def test_sources_may_lie_in_different_places(made, url, tmp_path):
    sources = {"here": SourceConfig(path=str(made), weight=0.6), "there": SourceConfig(path=url, weight=0.4)}
    config = make_config("", tmp_path / "cache")
    mixed = replace(config, data=replace(config.data, sources=sources))
    both_here = {name: SourceConfig(path=str(made), weight=one.weight) for name, one in sources.items()}
    local = replace(config, data=replace(config.data, sources=both_here))
    assert read_steps(mixed) == read_steps(local)


def test_twelve_worlds_by_lot_from_a_bad_store_see_what_one_sees_from_a_disk(s3_url, tmp_path, monkeypatch):
    """A mixture of three sources, documents packed; 1 % of the requests fail and 5 % are slow."""
    names = {"web": 0.6, "code": 0.3, "math": 0.1}
    for name in names:
        (tmp_path / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": f"{n} {name} " * (n * n % 400 + 1)}) + "\n" for n in range(300))
        )
        own = {} if name == "web" else {"tokenizer": tmp_path / "web" / "tokenizer.json"}
        prepare([tmp_path / f"{name}.jsonl"], tmp_path / name, vocab_size=300, shard_tokens=150_000, **own)
        upload(tmp_path / name, f"{s3_url}/{name}")

    def mix(place, cache):
        sources = {name: SourceConfig(path=f"{place}/{name}", weight=weight) for name, weight in names.items()}
        config = make_config("", cache, packing="documents", steps=36, global_batch=10, micro_batch=3)
        phases = {"late": PhaseConfig(from_step=23, weights={"code": 0.5, "math": 0.5})}
        return replace(config, data=replace(config.data, seq_len=200, sources=sources, phases=phases))

    unbroken = read_steps(mix(tmp_path, tmp_path / "none"))
    rates = {"throttled": 0.005, "hung up": 0.005, "slow": 0.05}
    with open_proxy(os.environ["AWS_ENDPOINT_URL"], rates=rates, slow_s=0.2) as (proxy, done):
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        for change, world_size in enumerate(np.random.default_rng().integers(1, 6, 12).tolist()):
            steps = range(3 * change, 3 * change + 3)
            found = {step: ([], []) for step in steps}
            corpus = open_corpus(mix(s3_url, tmp_path / f"node-{change % 3}"))
            for rank in range(world_size):
                place = {"rank": rank, "world_size": world_size, "device": CPU}
                with Loader(corpus, **place, start_step=steps[0]) as loader:
                    for (step, batch), _ in zip(loader, steps, strict=False):
                        found[step][0].extend(batch.sample_ids)
                        found[step][1].extend(list_rows(batch.microbatches))
            for step in steps:
                ids, parts = unbroken[step, 0]
                assert found[step][0] == list(ids)
                assert found[step][1] == list_rows(map(torch.tensor, parts[at : at + 3]) for at in range(0, 12, 3))
    assert done["slow"], done


def list_rows(microbatches):
    """Return tokens, labels and starts of documents of the rows that are no padding."""
    rows = []
    for tokens_BS, labels_BS, borders_N in microbatches:
        for row, (tokens, labels) in enumerate(zip(tokens_BS.tolist(), labels_BS.tolist(), strict=True)):
            starts = borders_N - row * len(tokens)
            if any(label != IGNORE for label in labels):
                rows.append((tokens, labels, starts[(starts >= 0) & (starts < len(tokens))].tolist()))
    return rows


def test_slots_are_shared_by_all_that_open_the_file(tmp_path):
    caches = [BlockCache(tmp_path, max_bytes=64 * BLOCK_BYTES, block_bytes=BLOCK_BYTES) for _ in range(2)]
    blocks = {key: bytes([key % 251]) * (key % BLOCK_BYTES + 1) for key in range(1, 400)}
    for key, data in blocks.items():
        caches[key % 2].put(key, data)
    found = {key: caches[(key + 1) % 2].get(key) for key in blocks}
    assert all(data in (None, blocks[key]) for key, data in found.items())
    assert 40 <= sum(data is not None for data in found.values()) <= 64
    assert Path(tmp_path / "blocks-8x65536").stat().st_size == 64 * (BLOCK_BYTES + 16)


def test_a_rank_reads_ahead_in_the_order_of_its_steps(url, tmp_path):
    corpus = open_corpus(make_config(url, tmp_path / "cache", steps=30))
    taken = []

    class Watched(type(corpus.train)):
        def read_ahead(self, sample_ids):
            taken.append(tuple(sample_ids))
            super().read_ahead(sample_ids)

    corpus = Corpus(corpus.sources, corpus.config)
    corpus.train.__class__ = Watched
    with Loader(corpus, rank=1, world_size=3, device=CPU, start_step=5) as loader:
        own = [batch.sample_ids for _, batch in loader]
    assert taken == own
