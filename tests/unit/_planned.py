"""Configurations that were measured, and short ways to write others."""

from elastic.config import CheckpointConfig, ClusterConfig, DataConfig, RunConfig, TrainConfig
from elastic.models.llama import Config as ModelConfig

_LARGE = {"tied_head": False, "vocab_size": 128256, "num_kv_heads": 8, "ffn_dim": 8192}
MODELS = {
    "125M": ModelConfig(
        dim=768, num_layers=12, num_heads=12, num_kv_heads=12, ffn_dim=2048, vocab_size=50304, tied_head=False
    ),
    "1B": ModelConfig(dim=2048, num_layers=16, num_heads=32, num_kv_heads=8, ffn_dim=8192, vocab_size=32768),
    "1.5B": ModelConfig(dim=2048, num_layers=16, num_heads=32, **_LARGE),
    "3B": ModelConfig(dim=3072, num_layers=28, num_heads=24, **_LARGE),
    "8B": ModelConfig(
        dim=4096, num_layers=32, num_heads=32, num_kv_heads=8, ffn_dim=14336, vocab_size=128256, tied_head=False
    ),
}


def plan_config(model="1.5B", *, batch=4, seq_len=4096, world_size=1, microbatches=1, steps=100, cluster=(), **options):
    """Return a bf16 configuration, compiled, whose ranks have `microbatches` of `batch` samples each."""
    return RunConfig(
        model=MODELS[model],
        data=DataConfig(seq_len=seq_len),
        train=TrainConfig(steps=steps, global_batch=batch * microbatches * world_size, micro_batch=batch),
        cluster=ClusterConfig(**{"max_workers": world_size, "gpus_per_worker": 1} | dict(cluster)),
        checkpoint=CheckpointConfig(),
        **{"precision": "bf16", "compile": True} | options,
    )
