"""A run keeps to the back end of attention that it found fastest first; the back ends themselves need a GPU."""

import logging
from dataclasses import replace

import pytest
import torch

from elastic.config import RunConfig
from elastic.errors import ConfigError
from elastic.nn import attention
from elastic.nn.attention import CHOICES, agree_on_attention, choose_attention
from elastic.storage import open_storage

CUDA = torch.device("cuda", 0)
CONFIG = RunConfig(precision="bf16")


class Process:
    """A process that finds its own times on a kind of GPU; None: that back end does not run."""

    def __init__(self, monkeypatch, *, gpu="H200", **times_ms):
        self.monkeypatch = monkeypatch
        self.gpu = gpu
        self.times_ms = {"auto": 9.0, **times_ms}
        self.chosen = {}
        self.num_measured = 0

    def run(self, function, *args):
        def measure(kind, case, device, *, repeats):
            self.num_measured += repeats
            if self.times_ms.get(kind) is None:
                raise ConfigError(f"attention={kind} does not run")
            return self.times_ms[kind]

        self.monkeypatch.setattr(attention, "_CHOSEN", self.chosen)
        self.monkeypatch.setattr(attention, "_measure", measure)
        self.monkeypatch.setattr(attention.importlib.util, "find_spec", lambda name: name)
        self.monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: self.gpu)
        return function(*args)

    def agree(self, storage, config=CONFIG):
        self.run(agree_on_attention, config, CUDA, storage)
        return self.run(choose_attention, config, CUDA)


def test_a_process_that_finds_other_times_uses_what_the_first_one_has_found(tmp_path, monkeypatch):
    storage = open_storage(tmp_path)
    assert Process(monkeypatch, cudnn=1.0, flash=2.0, fa4=2.0).agree(storage) == "cudnn"
    beside_others = Process(monkeypatch, cudnn=2.0, flash=1.0, fa4=2.0)
    assert beside_others.agree(storage) == "cudnn"
    assert beside_others.num_measured == 1, "that it runs is all that need be known"
    assert Process(monkeypatch, cudnn=2.0, flash=1.0).run(choose_attention, CONFIG, CUDA) == "flash", "by itself"


def test_each_kind_of_gpu_and_each_shape_has_its_own(tmp_path, monkeypatch):
    storage = open_storage(tmp_path)
    longer = replace(CONFIG, data=replace(CONFIG.data, seq_len=2 * CONFIG.data.seq_len))
    assert Process(monkeypatch, cudnn=1.0, flash=2.0).agree(storage) == "cudnn"
    assert Process(monkeypatch, cudnn=2.0, flash=1.0, gpu="4090").agree(storage) == "flash"
    assert Process(monkeypatch, cudnn=2.0, flash=2.0, fa4=1.0).agree(storage, longer) == "fa4"
    assert len(storage.list(CHOICES)) == 3


def test_what_was_rehearsed_with_fewer_layers_and_words_holds_for_all_of_it(tmp_path, monkeypatch):
    process = Process(monkeypatch, cudnn=1.0, flash=2.0)
    part = replace(CONFIG, model=replace(CONFIG.model, num_layers=1, vocab_size=256))
    assert process.agree(open_storage(tmp_path), part) == "cudnn"
    process.times_ms |= {"cudnn": 3.0}
    assert process.agree(open_storage(tmp_path / "other")) == "cudnn"
    assert process.run(choose_attention, CONFIG, CUDA) == "cudnn"


def test_of_two_that_are_first_both_use_what_one_has_written(tmp_path, monkeypatch):
    storage = open_storage(tmp_path)
    one, other = Process(monkeypatch, cudnn=1.0, flash=2.0), Process(monkeypatch, cudnn=2.0, flash=1.0)

    class Late:
        """The storage as the slower one sees it: nothing is there when it looks."""

        def get_size(self, key):
            return None

        def put_new(self, key, data):
            assert one.agree(storage) == "cudnn"
            one.monkeypatch.setattr(attention, "_CHOSEN", other.chosen)
            return storage.put_new(key, data)

        def read(self, key):
            return storage.read(key)

    assert other.agree(Late()) == "cudnn"


@pytest.mark.parametrize("kept", [b"", b"\xff\xfe", b"flash3"])
def test_what_is_damaged_is_passed_over(tmp_path, monkeypatch, caplog, kept):
    storage = open_storage(tmp_path)
    Process(monkeypatch, cudnn=1.0, flash=2.0).agree(storage)
    (key,) = storage.list(CHOICES)
    storage.write(key, [kept])
    with caplog.at_level(logging.WARNING):
        assert Process(monkeypatch, cudnn=2.0, flash=1.0).agree(storage) == "flash"
    assert "is not possible here" in caplog.text


def test_a_node_without_it_goes_by_what_it_finds(tmp_path, monkeypatch, caplog):
    storage = open_storage(tmp_path)
    assert Process(monkeypatch, cudnn=2.0, flash=2.0, fa4=1.0).agree(storage) == "fa4"
    assert Process(monkeypatch, cudnn=1.0, flash=2.0).agree(storage) == "cudnn"
    assert "attention=fa4, which this run uses, is not possible here" in caplog.text


def test_a_storage_that_does_not_work_costs_a_warning(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    assert Process(monkeypatch, cudnn=2.0, flash=1.0).agree(open_storage(tmp_path / "file" / "run")) == "flash"
    assert "cannot be read or kept" in caplog.text


def test_where_there_is_no_choice_nothing_is_kept(tmp_path, monkeypatch):
    storage = open_storage(tmp_path)
    process = Process(monkeypatch, cudnn=2.0, flash=1.0)
    assert process.agree(storage, replace(CONFIG, attention="cudnn")) == "cudnn"
    assert process.agree(storage, replace(CONFIG, precision="fp32")) == "auto"
    process.run(agree_on_attention, CONFIG, torch.device("cpu"), storage)
    assert list(tmp_path.iterdir()) == []
