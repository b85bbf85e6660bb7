"""What a trainer has rehearsed is compiled: for its own worlds, and for nodes that come later."""

import json
import os
import subprocess
import sys
from dataclasses import replace

import pytest

from elastic.config import ClusterConfig, DataConfig, RunConfig, TrainConfig
from elastic.models.llama import Config as ModelConfig
from elastic.storage import open_storage
from elastic.strategies._base import get_rehearsed
from elastic.training.rehearsal import COMPILED, rehearse

CONFIG = RunConfig(
    device="cpu",
    model=ModelConfig(dim=32, num_layers=3, num_heads=2, num_kv_heads=2, ffn_dim=64, vocab_size=64),
    data=DataConfig(seq_len=16),
    train=TrainConfig(global_batch=4, micro_batch=2),
    cluster=ClusterConfig(min_workers=1, max_workers=2),
    compile=True,
)
NODE = """
import json, sys
import torch
import torch.distributed as dist
from torch._dynamo.utils import counters
from elastic.ports import WorldSpec
from elastic.training.rehearsal import rehearse
from elastic.training.step import build_trainable, train_step
from elastic.storage import open_storage
from elastic.world import close_world, open_world
from tests.distributed.test_rehearsal import CONFIG
from dataclasses import replace

CONFIG = replace(CONFIG, model=replace(CONFIG.model, vocab_size=int(sys.argv[2])))
kinds = sys.argv[4:]
if len(kinds) == 1:
    CONFIG = replace(CONFIG, strategy=kinds[0])
rehearse(CONFIG, open_storage(sys.argv[1]), is_beside_others=sys.argv[3] == "sparingly")
found = {"compiled": counters["stats"]["unique_graphs"], "cached": counters["inductor"]["fxgraph_cache_hit"]}
tokens_BS = torch.zeros(2, 16, dtype=torch.int64)
for attempt, strategy in enumerate(kinds, start=1):
    spec = WorldSpec(
        rank=0, world_size=1, local_rank=0, local_world_size=1, attempt=attempt, store_host="", store_port=0
    )
    world = open_world(spec, device="cpu", timeout_s=60, store=dist.HashStore())
    alone = replace(CONFIG.cluster, max_workers=1)
    trainable = build_trainable(replace(CONFIG, strategy=strategy, cluster=alone), world)
    train_step(trainable, [(tokens_BS, tokens_BS)], lr=0.0, max_grad_norm=1.0, world=world)
    del trainable
    close_world(world)
found["compiled_later"] = counters["stats"]["unique_graphs"] - found["compiled"]
print(json.dumps(found))
"""


def run_node(folder, name, *kinds, vocab_size=64, how="fully"):
    """Rehearse and then train a step in a world of each kind, of one rank; of several, the configuration finds them."""
    env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": str(folder / name), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", NODE, folder / "run", str(vocab_size), how, *kinds]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=env).stdout)


def test_what_was_rehearsed_is_not_compiled_again_and_a_node_that_comes_later_finds_it(tmp_path):
    first = run_node(tmp_path, "first", "fsdp2")
    assert first["compiled"] > 0
    assert first["compiled_later"] == 0
    (kept,) = (tmp_path / "run" / COMPILED).iterdir()
    written_ns = kept.stat().st_mtime_ns
    second = run_node(tmp_path, "second", "fsdp2")
    print(first, second, f"{kept.stat().st_size} bytes kept")
    assert second["compiled_later"] == 0
    assert second["cached"] > first["cached"]
    assert kept.stat().st_mtime_ns == written_ns


def test_a_run_whose_worlds_may_be_of_one_rank_rehearses_these_too():
    assert set(get_rehearsed(CONFIG)) == {"fsdp2", "single"}


@pytest.mark.long
@pytest.mark.parametrize(("vocab_size", "how"), [(64, "fully"), (1000, "sparingly")])
def test_what_was_rehearsed_is_not_compiled_again_in_a_world_of_any_size(tmp_path, vocab_size, how):
    found = run_node(tmp_path, "first", "fsdp2", "single", vocab_size=vocab_size, how=how)
    assert found["compiled"] > 0
    assert found["compiled_later"] == 0


@pytest.mark.filterwarnings("ignore")  # an error while it compiles would end that
@pytest.mark.parametrize("damage", [b"", b"no compiled code"])
def test_what_was_kept_and_is_damaged_is_made_anew(tmp_path, monkeypatch, damage):
    storage = open_storage(tmp_path)
    monkeypatch.setattr("elastic.training.rehearsal._describe", lambda *_: "it")
    storage.write(f"{COMPILED}it", [damage])
    alone = replace(CONFIG, cluster=ClusterConfig(max_workers=1), model=replace(CONFIG.model, dim=48))
    rehearse(alone, storage)
    assert len(storage.read(f"{COMPILED}it")) > 1000


def test_what_goes_wrong_costs_a_warning(tmp_path, caplog):
    rehearse(replace(CONFIG, attention="flash"), open_storage(tmp_path))  # there is none on a CPU
    assert "did not work: ConfigError: attention=flash" in caplog.text


@pytest.mark.filterwarnings("ignore")  # as above
def test_hsdp_is_rehearsed_whatever_the_size_of_its_groups(tmp_path, caplog):
    cluster = ClusterConfig(min_workers=2, max_workers=4)
    hsdp = replace(CONFIG, strategy="hsdp", shard_size=2, cluster=cluster, model=replace(CONFIG.model, dim=48))
    rehearse(hsdp, open_storage(tmp_path))
    assert "did not work" not in caplog.text
    assert list((tmp_path / COMPILED).iterdir())


def test_without_a_gpu_or_a_compiler_nothing_is_done(tmp_path):
    rehearse(replace(CONFIG, compile=False), open_storage(tmp_path))
    assert list(tmp_path.iterdir()) == []
