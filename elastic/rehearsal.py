"""What a trainer does for the first time, done before any world waits for it: compile, and warm the device up.

Compiled code is kept with the run, so that a node that joins later, or a run that starts again on others, finds it.
"""

import hashlib
import json
import logging
import time
from dataclasses import asdict, replace

# torch.distributed re-exports its stores without listing them in __all__:
# pyright: reportPrivateImportUsage=false
import torch
import torch.distributed as dist

from elastic.config import RunConfig
from elastic.loss import IGNORE
from elastic.ports import WorldSpec
from elastic.step import build_trainable, eval_loss, train_step
from elastic.storage import Storage
from elastic.world import close_world, get_device, open_world

log = logging.getLogger(__name__)

COMPILED = "compiled/"
"""Where the storage of a run has what its compiler made."""


def rehearse(config: RunConfig, storage: Storage) -> None:
    """Train one step, and evaluate, with one block of the model in a world of one rank; nothing of that is kept.

    Without a GPU or a compiler there is nothing that would be slow the first time, and nothing is done. What goes wrong
    is told and costs nothing: training will do it for the first time.

    Args:
        storage: the run's; compiled code is read from there, or put there by whoever is the first. It is code: whoever
            may write there decides what runs here.
    """
    device = get_device(config.device, local_rank=0)
    if device.type == "cpu" and not config.compile:
        return
    start_s = time.monotonic()
    key = f"{COMPILED}{_describe(config, device)}"
    try:
        is_known = config.compile and _load_compiled(storage, key)
        for strategy in _get_strategies(config):
            alone = replace(config.cluster, min_workers=1, max_workers=1)
            model = replace(config.model, num_layers=1)
            _train_one_block(replace(config, strategy=strategy, cluster=alone, model=model))
        if config.compile and not is_known:
            _keep_compiled(storage, key)
    except Exception as error:  # whatever it is: training can do without, and says what is really wrong
        log.warning("what would have made the first step fast did not work: %s: %s", type(error).__name__, error)
        return
    how = (
        "with the compiled code of this run" if is_known else "and compiled" if config.compile else "without a compiler"
    )
    log.info("rehearsed in %.1f s, %s", time.monotonic() - start_s, how)


def _train_one_block(config: RunConfig) -> None:
    spec = WorldSpec(rank=0, world_size=1, local_rank=0, local_world_size=1, attempt=0, store_host="", store_port=0)
    timeout_s = config.fault.collective_timeout_s
    world = open_world(spec, device=config.device, timeout_s=timeout_s, store=dist.HashStore())
    try:
        trainable = build_trainable(config, world)
        shape = (config.train.micro_batch, config.data.seq_len)
        tokens_BS = torch.zeros(shape, dtype=torch.int64, device=world.device)
        labels_BS = torch.full_like(tokens_BS, IGNORE)
        labels_BS[:, 0] = 0
        train_step(trainable, [(tokens_BS, labels_BS)], lr=0.0, max_grad_norm=1.0, world=world)
        eval_loss(trainable, [(tokens_BS, labels_BS)], world)
        del trainable
    finally:
        close_world(world)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def _get_strategies(config: RunConfig) -> list[str]:
    """Return what blocks run under in the worlds that this trainer may join.

    One rank does for them all: a block that FSDP2 has gathered is the same on any number.
    """
    may_be_alone, may_have_peers = config.cluster.min_workers == 1, config.cluster.max_workers > 1
    match config.strategy:
        case "auto":
            return [*(["fsdp2"] if may_have_peers else []), *(["single"] if may_be_alone else [])]
        case "hsdp":
            return ["fsdp2"]
        case strategy:
            return [strategy]


def _describe(config: RunConfig, device: torch.device) -> str:
    """Name what compiled code depends on that is known beforehand; the compiler itself looks more closely."""
    parts = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "model": asdict(config.model),
        "shape": (config.train.micro_batch, config.data.seq_len),
        "how": [config.precision, config.recompute, config.recompute_budget, config.strategy, config.attention],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()[:16]


def _load_compiled(storage: Storage, key: str) -> bool:
    """Tell whether it was there, and whole: torch has a checksum in it."""
    try:
        data = storage.read(key)
    except FileNotFoundError:
        return False
    return torch.compiler.load_cache_artifacts(data) is not None


def _keep_compiled(storage: Storage, key: str) -> None:
    artifacts = torch.compiler.save_cache_artifacts()
    if artifacts is not None:
        storage.write(key, [artifacts[0]])
