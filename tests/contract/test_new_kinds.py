"""A family of models, a strategy and a sink, each one new file in a copy of the project, without another edit."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from elastic.data.preparation.prepare import prepare
from tests.contract import test_kinds

ROOT = Path(__file__).parents[2]

FAMILY = '''
"""Decoder whose feed-forward squares what a leaky ReLU lets through, without a gate (Primer, arXiv:2109.08668)."""

from dataclasses import dataclass
from functools import cache
from typing import Annotated

from elastic.constraints import NOT_NEGATIVE, POSITIVE
from elastic.errors import ConfigError
from elastic.model_config import SHAPE, AttentionShape, ModelConfig, Rope


@dataclass(frozen=True, kw_only=True)
class Config(ModelConfig):
    """As many key/value heads as heads; the width of the feed-forward follows from that of the model."""

    kind: str = "squared"
    dim: Annotated[int, POSITIVE, SHAPE] = 96
    num_heads: Annotated[int, POSITIVE, SHAPE] = 3
    ffn_ratio: Annotated[int, POSITIVE, SHAPE] = 2
    leak: Annotated[float, NOT_NEGATIVE] = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dim % (2 * self.num_heads):
            raise ConfigError(f"model.dim={self.dim} must be a multiple of {2 * self.num_heads}. Round it up.")

    @property
    def attention(self) -> AttentionShape:
        return AttentionShape(
            num_heads=self.num_heads, num_kv_heads=self.num_heads, head_size=self.dim // self.num_heads
        )

    @property
    def num_matrix_params(self) -> int:
        return self.num_layers * (4 + 2 * self.ffn_ratio) * self.dim**2 + self.vocab_size * self.dim

    @property
    def num_params(self) -> int:
        return self.num_matrix_params + (2 * self.num_layers + 1) * self.dim


@cache
def define_feed_forward():
    import torch.nn.functional as F
    from torch import nn

    from elastic.nn.layers import ResidualLinear

    class FeedForward(nn.Module):
        def __init__(self, config):
            super().__init__()
            self.leak = config.leak
            self.up = nn.Linear(config.dim, config.ffn_ratio * config.dim, bias=False)
            self.down = ResidualLinear(config.ffn_ratio * config.dim, config.dim, bias=False)

        def forward(self, x_BSD):
            return self.down(F.leaky_relu(self.up(x_BSD), self.leak).square())

    return FeedForward


def build_block(config):
    from elastic.nn.decoder import Attention, Block

    attention = Attention(config.dim, config.attention)
    return Block(config.dim, attention=attention, ffn=define_feed_forward()(config), norm_eps=1e-5)


def build(config):
    from elastic.nn.decoder import Decoder

    return Decoder(
        (build_block(config) for _ in range(config.num_layers)),
        dim=config.dim,
        vocab_size=config.vocab_size,
        rope=Rope(head_size=config.attention.head_size),
        norm_eps=1e-5,
        tied_head=True,
    )
'''

STRATEGY = '''
"""One rank that goes by signs alone: an optimizer of its own, which clips nothing."""

from contextlib import nullcontext
from functools import partial

import torch
from torch import nn

from elastic.optim.adamw import AdamW
from elastic.strategies._base import Spread

MAX_WORLD_SIZE = 1
calls = []


class Signs(AdamW):
    def clip(self, max_norm):
        calls.append("clip")
        return nn.utils.get_total_norm([param.grad for param in self._in_model_order])

    @torch.no_grad()
    def step(self, closure=None):
        calls.append("step")
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad.sign(), alpha=group["lr"])


def spread(model, *, world, config):
    calls.append("wrap")
    return Spread(
        module=model.to_empty(device=world.device),
        computing=model,
        cast=nullcontext,
        set_last_microbatch=lambda _is_last: None,
        build_optimizer=partial(Signs, model),
        release=lambda: calls.append("release"),
    )
'''

SINK = '''
"""The losses alone."""

OPENED_BY = ("rank0", "driver")


class Losses:
    def __init__(self, path):
        self.path = path

    def write(self, row):
        with self.path.open("a") as file:
            print(row["loss"], file=file)

    def close(self):
        pass


def build(config, run_dir):
    return Losses(run_dir.root / "losses.txt")
'''

CONFIG = """
run: mine
device: cpu
model: {kind: squared, num_layers: 2, dim: 48, vocab_size: 300}
data: {seq_len: 16}
train: {global_batch: 4, micro_batch: 2, eval_samples: 4}
optim: {lr: 1.0e-2, min_lr_ratio: 1.0}
checkpoint: {every_steps: 2}
cluster: {max_workers: 2}
wandb: {mode: disabled}
"""


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The whole project with three more files, and data."""
    folder = tmp_path_factory.mktemp("project")
    for name in ("elastic", "cluster"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "tests" / "contract").mkdir(parents=True)
    shutil.copy(Path(__file__).with_name("test_kinds.py"), folder / "tests" / "contract")
    shutil.copy(ROOT / "pyproject.toml", folder)
    (folder / "elastic" / "models" / "squared.py").write_text(FAMILY.lstrip())
    (folder / "elastic" / "strategies" / "signs.py").write_text(STRATEGY.lstrip())
    (folder / "elastic" / "sinks" / "losses.py").write_text(SINK.lstrip())
    (folder / "config.yaml").write_text(CONFIG)
    lines = [json.dumps({"text": f"In the beginning was the word {n}. " * 4}) for n in range(200)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    prepare([folder / "a.jsonl"], folder / "data", vocab_size=300, val_fraction=0.3)
    return folder


def run(project, *command):
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    env |= {"PYTHONPATH": str(project), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *map(str, command)]
    options = {"cwd": project, "env": env, "text": True, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.run(command, check=False, **options)


def train(project, storage, *overrides, num_ranks=1):
    start = ["-m", "torch.distributed.run", "--nproc-per-node", num_ranks] if num_ranks > 1 else []
    arguments = ["config.yaml", f"storage={storage}", f"data.path={project / 'data'}", *overrides]
    trained = run(project, *start, "-m", "elastic", *arguments)
    assert trained.returncode == 0, trained.stdout
    rows = [json.loads(line) for line in (project / storage / "mine" / "metrics.jsonl").read_text().splitlines()]
    return {row["step"]: row["loss"] for row in rows}


def list_tests_of(known):
    """Return the contract tests that have this kind among the values of a parameter."""
    tests = {name: test for name, test in vars(test_kinds).items() if name.startswith("test_")}
    values = {name: [value for mark in test.pytestmark for value in mark.args[1]] for name, test in tests.items()}
    return {name for name in values if any(known in (value, value[0]) for value in values[name])}


def test_every_contract_test_of_its_kind_finds_it_and_passes(project):
    choice = "(squared or signs) and not hsdp and not auto and not ddp"  # on one rank these are fsdp2 or single
    tested = run(project, "-m", "pytest", "-v", "tests/contract/test_kinds.py", "-k", choice)
    assert tested.returncode == 0, tested.stdout
    for known, new in (("llama", "squared"), ("ddp", "signs")):
        found = set(re.findall(rf"::(\w+)\[[^\]]*\b{new}\b[^\]]*\] PASSED", tested.stdout))
        assert found == list_tests_of(known)
        assert len(found) >= 2


@pytest.fixture(scope="module")
def trained(project):
    """The losses of a run that has come to its fourth step."""
    return train(project, "runs", "train.steps=4")


def test_a_run_of_a_new_family_resumes_on_another_number_of_ranks(project, trained):
    unbroken = train(project, "unbroken", "train.steps=8")
    assert unbroken.keys() == set(range(1, 9))
    assert unbroken[8] < unbroken[1] - 0.5
    assert trained.keys() == {1, 2, 3, 4}
    resumed = train(project, "runs", "train.steps=8", num_ranks=2)
    assert resumed == pytest.approx(unbroken, rel=1e-4)
    config = (project / "runs" / "mine" / "config.yaml").read_text()
    assert "kind: squared" in config and "ffn_ratio: 2" in config


def test_a_new_sink_is_opened_and_gets_every_row(project, trained):
    losses = (project / "runs" / "mine" / "losses.txt").read_text().split()
    assert list(map(float, losses[:4])) == list(trained.values())


REFUSALS = [
    (["model.ffn_dim=64"], "there is no such key with model.kind=squared"),
    (["model.ffn_ratio=0"], "model.ffn_ratio=0 must be finite and more than 0"),
    (["model.ffn_ratio=two"], "model.ffn_ratio='two' (on the command line) cannot be used"),
    (["model.dim=40"], "model.dim=40 must be a multiple of 6"),
    (["model.kind=squarred"], 'Did you mean "squared"?'),
    (["model.ffn_ratio=3"], "model.ffn_ratio=3, but this run was trained with model.ffn_ratio=2"),
    (["model.kind=llama"], "model.kind=llama, but this run was trained with model.kind=squared"),
]


def test_a_new_family_is_checked_and_counted_without_torch(project, trained):
    code = f"""
import sys
from cluster.kube.sizing import estimate_memory_gib
from elastic.checkpoint.format.compat import check_config
from elastic.checkpoint.format.manifest import list_committed, read_manifest
from elastic.config_load import dump, load
from elastic.errors import ConfigError
from elastic.storage import open_storage

storage = open_storage("runs/mine")
manifest = read_manifest(storage, list_committed(storage)[0])
def refuse(overrides):
    try:
        check_config(load("config.yaml", overrides), manifest)
    except ConfigError as error:
        return str(error)

for overrides, part in {REFUSALS!r}:
    assert part in str(refuse(overrides)), (overrides, refuse(overrides))
config = load("config.yaml", ["model.leak=0.25"])
assert check_config(config, manifest)["model.leak"] == (0.0, 0.25)
open("again.yaml", "w").write(dump(config))
assert load("again.yaml") == config
large = load("config.yaml", ["model.dim=6144", "model.num_layers=96"])
assert estimate_memory_gib(large, 1) > estimate_memory_gib(config, 1) + 100
print("torch" in sys.modules)
"""
    checked = run(project, "-c", code)
    assert checked.stdout == "False\n"


def test_a_profile_renders_a_new_family_with_its_own_keys(project):
    overrides = ["storage=s3://bucket/runs", "data.path=/mnt/solvent/data", "model.leak=0.25"]
    settings = ["--profile", "generic", "--set", "image=registry.example.com/solvent:0.1.0", "--set", "claim=data"]
    code = "import sys; from cluster.cli import main; sys.exit(main(sys.argv[1:]))"
    rendered = run(project, "-c", code, "render", "config.yaml", *overrides, *settings)
    assert rendered.returncode == 0, rendered.stdout
    assert {"kind: squared", "dim: 48", "leak: 0.25"} <= set(map(str.strip, rendered.stdout.splitlines()))


def test_a_new_strategy_wraps_clips_updates_and_releases(project):
    code = """
import torch
from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.model_config import build_model_config
from elastic.ports import WorldSpec
from elastic.training.step import build_trainable, eval_loss, train_step
from elastic.strategies.signs import calls
from elastic.world import close_world, open_store, open_world

store = open_store("127.0.0.1", timeout_s=10)
at = {"store_host": store.host, "store_port": store.port}
spec = WorldSpec(rank=0, world_size=1, local_rank=0, local_world_size=1, attempt=1, **at)
world = open_world(spec, device="cpu", timeout_s=10, store=store)
model = build_model_config(kind="squared", num_layers=1, vocab_size=32)
config = RunConfig(
    strategy="signs", device="cpu", model=model, data=DataConfig(seq_len=8), train=TrainConfig(global_batch=4)
)
trainable = build_trainable(config, world)
tokens_BS = torch.arange(32).reshape(4, 8)
train_step(trainable, [(tokens_BS, tokens_BS)], lr=0.01, max_grad_norm=1.0, world=world)
assert calls == ["wrap", "clip", "step"], calls
eval_loss(trainable, [(tokens_BS, tokens_BS)], world)
assert calls[3:] == ["release"], calls
wish = lambda when: "leave_now"
train_step(trainable, [(tokens_BS, tokens_BS)], lr=0.01, max_grad_norm=1.0, world=world, get_wish=wish)
assert calls[4:] == ["release"], calls
close_world(world)
"""
    done = run(project, "-c", code)
    assert done.returncode == 0, done.stdout
