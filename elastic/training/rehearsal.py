"""What is slow the first time, done before a world waits for it: imports in the host, device and compiler in trainers.

Compiled code is kept with the run, so that a node that joins later, or a run that starts again on others, finds it.
"""

import hashlib
import importlib
import importlib.util
import json
import logging
import time
from dataclasses import asdict, replace

# torch.distributed re-exports its stores without listing them in __all__:
# pyright: reportPrivateImportUsage=false
import torch
import torch.distributed as dist

from elastic.breaker import Presence
from elastic.checkpoint.train_state import get_live_state
from elastic.config import DataConfig, RunConfig, TrainConfig
from elastic.nn.attention import agree_on_attention
from elastic.nn.loss import IGNORE, Microbatch
from elastic.ports import WorldSpec
from elastic.storage import Storage
from elastic.strategies._base import get_rehearsed
from elastic.training.step import Trainable, build_trainable, eval_loss, train_step
from elastic.world import World, close_world, get_device, open_world

log = logging.getLogger(__name__)

COMPILED = "compiled/"
"""Where the storage of a run has what its compiler made."""

_SMALL_VOCAB = 256
_OTHERS_BYTES = 2**30
"""Memory of the device that a rehearsal beside another process leaves free."""

_TINY = RunConfig(
    model=replace(RunConfig().model, num_layers=1, vocab_size=16),
    data=DataConfig(seq_len=8),
    train=TrainConfig(global_batch=2, micro_batch=1),
)


def warm_up() -> None:
    """Import and use once what a trainer needs, on the CPU with a fake process group, and leave no thread behind.

    A process that was warmed up can be forked: its children start training in a fraction of a second. Where torch knows
    CUDA, no step is made here: autograd would look for GPUs, and no child of a process that did could use one. There
    each trainer rehearses for itself.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore  # noqa: PLC0415 (private; the only fake group)

    if importlib.util.find_spec("triton"):  # where GPUs are: what torch.compile imports when it first runs
        importlib.import_module("torch._inductor.compile_fx")
    torch.set_num_threads(1)
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    device = torch.device("cpu")
    world = World(
        rank=0,
        world_size=2,
        local_rank=0,
        local_world_size=2,
        attempt=0,
        node="",
        device=device,
        presence=Presence(device, num_ranks=2),
    )
    world.build_mesh(shard=2)
    if torch.version.cuda is None:
        trainable, _ = _train_a_step(_TINY, world)
        get_live_state(trainable.model, trainable.optimizer)
    close_world(world)


def rehearse(config: RunConfig, storage: Storage, *, is_beside_others: bool = False) -> None:
    """Train one step, and evaluate, with one block of the model in a world of one rank; nothing of that is kept.

    Without a GPU or a compiler there is nothing that would be slow the first time, and nothing is done. What goes wrong
    is told and costs nothing: training will do it for the first time.

    Args:
        storage: the run's; compiled code is read from there, or put there by whoever is the first. It is code: whoever
            may write there decides what runs here.
        is_beside_others: another process trains on this device. What that leaves free is not used up, and a small
            vocabulary will do, as only blocks are compiled.
    """
    device = get_device(config.device, local_rank=0)
    if device.type == "cpu" and not config.compile:
        return
    start_s = time.monotonic()
    if is_beside_others and device.type == "cuda":
        _spare_memory(device)
    key = f"{COMPILED}{_describe(config, device)}"
    try:
        agree_on_attention(config, device, storage)
        is_known = config.compile and _load_compiled(storage, key)
        for strategy in get_rehearsed(config):
            alone = replace(config.cluster, min_workers=1, max_workers=1)
            vocab_size = min(config.model.vocab_size, _SMALL_VOCAB) if is_beside_others else config.model.vocab_size
            model = replace(config.model, num_layers=1, vocab_size=vocab_size)
            _train_one_block(replace(config, strategy=strategy, shard_size=0, cluster=alone, model=model))
        if config.compile and not is_known:
            _keep_compiled(storage, key)
    except Exception as error:  # whatever it is: training can do without, and says what is really wrong
        log.warning("what would have made the first step fast did not work: %s: %s", type(error).__name__, error)
        return
    finally:
        if device.type == "cuda":
            torch.cuda.set_per_process_memory_fraction(1.0, device)
    how = (
        "with the compiled code of this run" if is_known else "and compiled" if config.compile else "without a compiler"
    )
    log.info("rehearsed in %.1f s, %s", time.monotonic() - start_s, how)


def _spare_memory(device: torch.device) -> None:
    """Let this process run out of memory before another one on its device does."""
    free_bytes, total_bytes = torch.cuda.mem_get_info(device)
    torch.cuda.set_per_process_memory_fraction(max(free_bytes - _OTHERS_BYTES, 0) / total_bytes, device)


def _train_one_block(config: RunConfig) -> None:
    spec = WorldSpec(rank=0, world_size=1, local_rank=0, local_world_size=1, attempt=0, store_host="", store_port=0)
    timeout_s = config.fault.collective_timeout_s
    world = open_world(spec, device=config.device, timeout_s=timeout_s, store=dist.HashStore())
    try:
        trainable, batch = _train_a_step(config, world)
        eval_loss(trainable, [batch], world)
        del trainable
    finally:
        close_world(world)
    if world.device.type == "cuda":
        torch.cuda.empty_cache()


def _train_a_step(config: RunConfig, world: World) -> tuple[Trainable, Microbatch]:
    """Return what has trained, and the micro-batch (B, S) of token ids and labels that it has trained on."""
    trainable = build_trainable(config, world)
    shape = (config.train.micro_batch, config.data.seq_len)
    tokens_BS = torch.zeros(shape, dtype=torch.int64, device=world.device)
    labels_BS = torch.full_like(tokens_BS, IGNORE)
    labels_BS[:, 0] = 0
    batch: Microbatch = (tokens_BS, labels_BS)
    if config.data.packing == "documents":
        borders = torch.arange(0, tokens_BS.numel() + 1, config.data.seq_len, dtype=torch.int32)
        batch = (tokens_BS, labels_BS, borders.to(world.device))
    train_step(trainable, [batch], lr=0.0, max_grad_norm=1.0, world=world)
    return trainable, batch


def _describe(config: RunConfig, device: torch.device) -> str:
    """Name what compiled code depends on that is known beforehand; the compiler itself looks more closely."""
    parts = {
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "model": asdict(config.model),
        "shape": (config.train.micro_batch, config.data.seq_len, config.data.packing),
        "how": [config.precision, config.recompute, config.recompute_budget, config.attention],
        **({"adapters": [config.tune, asdict(config.lora)]} if config.tune != "full" else {}),
        "strategies": get_rehearsed(config),
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
