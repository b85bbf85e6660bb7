"""Contradictions that are found before anything is rented."""

import subprocess
import sys

import pytest

from elastic.config import (
    CheckpointConfig,
    ClusterConfig,
    CostConfig,
    DataConfig,
    DeepSpeedConfig,
    FaultConfig,
    OptimConfig,
    RunConfig,
    TrainConfig,
)
from elastic.errors import ConfigError
from elastic.models.llama import Config as ModelConfig

ONE_SECTION = [
    (ModelConfig, {"num_layers": 0}, "model.num_layers=0"),
    (ModelConfig, {"norm_eps": 0.0}, "model.norm_eps=0.0"),
    (ModelConfig, {"dim": 100, "num_heads": 8}, "multiple of 16"),
    (ModelConfig, {"dim": 12, "num_heads": 4}, "multiple of 8"),
    (ModelConfig, {"num_heads": 4, "num_kv_heads": 3}, "divisor"),
    (ModelConfig, {"head_dim": -2}, "model.head_dim=-2"),
    (ModelConfig, {"head_dim": 33}, "Add 1 to it"),
    (ModelConfig, {"rope_scaling_factor": 0.5}, "model.rope_scaling_factor=0.5"),
    (ModelConfig, {"rope_low_freq_factor": 4.0}, "model.rope_high_freq_factor=4.0"),
    (ModelConfig, {"kind": "lama"}, 'Did you mean "llama"?'),
    (DataConfig, {"seq_len": 0}, "data.seq_len=0"),
    (DeepSpeedConfig, {"stage": 0}, "strategy=ddp instead of stage 0"),
    (TrainConfig, {"steps": 0}, "train.steps=0"),
    (TrainConfig, {"seed": -1}, "train.seed=-1"),
    (TrainConfig, {"eval_every_steps": -1}, "train.eval_every_steps=-1"),
    (TrainConfig, {"max_grad_norm": float("nan")}, "train.max_grad_norm=nan"),
    (OptimConfig, {"lr": -0.1}, "optim.lr=-0.1"),
    (OptimConfig, {"beta2": 1.0}, "Try optim.beta2=0.95"),
    (OptimConfig, {"min_lr_ratio": 1.5}, "optim.min_lr_ratio=1.5"),
    (OptimConfig, {"warmup_tokens": -1}, "optim.warmup_tokens=-1"),
    (OptimConfig, {"decay_tokens": 5}, "optim.schedule=wsd"),
    (CheckpointConfig, {"keep_last": 0}, "checkpoint.keep_last=0"),
    (CheckpointConfig, {"every_steps": -1}, "checkpoint.every_steps=-1"),
    (CheckpointConfig, {"node_disk": "scratch"}, "checkpoint.node_disk='scratch' must be an absolute path"),
    (CheckpointConfig, {"node_disk": "s3://bucket"}, "checkpoint.node_disk='s3://bucket' must be an absolute path"),
    (CheckpointConfig, {"node_disk": "/disk", "memory": "off"}, "checkpoint.memory=off makes none"),
    (CheckpointConfig, {"node_disk_every_s": -1.0}, "checkpoint.node_disk_every_s=-1"),
    (ClusterConfig, {"min_workers": 3, "max_workers": 2}, "cluster.min_workers=3"),
    (ClusterConfig, {"min_workers": 0}, "cluster.min_workers=0"),
    (ClusterConfig, {"gpus_per_worker": 8}, "Raise cluster.max_workers"),
    (ClusterConfig, {"threads_per_worker": 0}, "cluster.threads_per_worker=0"),
    (FaultConfig, {"lease_s": 0.0}, "fault.lease_s=0.0"),
    (CostConfig, {"usd_per_gpu_hour": -1.0}, "cost.usd_per_gpu_hour=-1.0"),
    (RunConfig, {"run": "a/b"}, "run='a/b'"),
    (RunConfig, {"run": ""}, "run=''"),
    (RunConfig, {"run": "-x"}, "run='-x'"),
    (RunConfig, {"run": ".."}, "run='..'"),
    (RunConfig, {"storage": ""}, "storage=runs"),
    (RunConfig, {"strategy": "fsdp3"}, 'Did you mean "fsdp2"?'),
]


@pytest.mark.parametrize(("section", "values", "part"), ONE_SECTION)
def test_a_value_that_cannot_work_is_refused(section, values, part):
    with pytest.raises(ConfigError) as caught:
        section(**values)
    assert part in str(caught.value)


TINY = {"train": TrainConfig(steps=10, global_batch=2), "data": DataConfig(seq_len=5)}  # 10 * 2 * 5 = 100 tokens

TOGETHER = [
    ({"strategy": "single", "cluster": ClusterConfig(max_workers=2)}, "strategy=single"),
    ({**TINY, "cluster": ClusterConfig(max_workers=3)}, "train.global_batch=2"),
    ({"model": ModelConfig(max_positions=4), **TINY}, "Set data.seq_len to at most 4"),
    ({"strategy": "fsdp2", "shard_size": 4}, "strategy=hsdp"),
    ({"strategy": "fsdp2", "deepspeed": DeepSpeedConfig(stage=2)}, "deepspeed.stage=2 is read by strategy=deepspeed"),
    ({"strategy": "hsdp", "shard_size": -1}, "shard_size=-1"),
    ({"recompute": "budget"}, "recompute=budget is the compiler's work"),
    ({"precision": "fp8_rowwise"}, "precision=fp8_rowwise is the compiler's work"),
    ({"recompute": "budget", "compile": True, "recompute_budget": 1.5}, "recompute_budget=1.5"),
    ({"profile_at_step": -1}, "profile_at_step=-1"),
    ({"profile_steps": 0}, "profile_steps=0"),
    ({"device": "cpu", "cluster": ClusterConfig(gpus_per_worker=1)}, "device=auto"),
]


@pytest.mark.parametrize(("values", "part"), TOGETHER)
def test_values_that_contradict_each_other_are_refused(values, part):
    with pytest.raises(ConfigError) as caught:
        RunConfig(**values)
    assert part in str(caught.value)


def test_a_schedule_may_fill_the_run_to_the_last_token():
    RunConfig(**TINY, optim=OptimConfig(schedule="wsd", warmup_tokens=50, decay_tokens=50))


def test_a_configuration_needs_neither_torch_nor_omegaconf():
    code = "import sys, elastic.config as c; c.RunConfig(); print({'torch', 'omegaconf', 'yaml'} & {*sys.modules})"
    assert subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout == "set()\n"


@pytest.mark.parametrize(
    ("strategy", "shard_size", "workers", "sizes"),
    [
        ("fsdp2", 0, (2, 5), (2, 3, 4, 5)),
        ("hsdp", 0, (1, 3), (1, 2, 3)),
        ("hsdp", 2, (1, 5), (2, 4)),
        ("hsdp", 64, (256, 512), (256, 320, 384, 448, 512)),
        ("single", 0, (1, 1), (1,)),
    ],
)
def test_a_strategy_limits_the_worlds_that_a_run_may_have(strategy, shard_size, workers, sizes):
    cluster = ClusterConfig(min_workers=workers[0], max_workers=workers[1])
    config = RunConfig(
        strategy=strategy, shard_size=shard_size, cluster=cluster, train=TrainConfig(global_batch=workers[1])
    )
    assert config.get_world_sizes() == sizes


def test_a_run_that_no_world_fits_is_refused_with_what_to_type():
    cluster = ClusterConfig(min_workers=3, max_workers=3)
    with pytest.raises(ConfigError, match=r"shard_size=2 .* Set cluster\.max_workers=4, or shard_size=0"):
        RunConfig(strategy="hsdp", shard_size=2, cluster=cluster).get_world_sizes()
