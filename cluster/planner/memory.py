"""GiB of a GPU that a configuration takes, by what takes them and at which moment of a step. Pure.

A step has four moments at which most is held: when the loss is computed (all activations and the logits), when the
backward enters the last block and the first one (fewer activations, more gradients), and when it ends (all gradients,
and what is still being reduced). Peaks are what `torch.cuda.max_memory_allocated` says; `GpuSpec.usable_gib` leaves
room for the rest.

Calibrated with peaks of 28 configurations, most of them on an H200 (torch 2.11; `tests/gpu/bench_memory.py` prints
both): within 3 % of each.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from cluster.planner.shape import BlockShape, get_block_shape
from elastic import plugins
from elastic.config import RunConfig
from elastic.tuning import count_frozen_bytes

GIB = 2**30
_MAX_LOGITS_BYTES = 2**32
"""As `elastic/nn/loss.py`: positions are taken in chunks whose logits fit."""
_MAX_GRAPHED_FLOPS = 3e13
"""As `elastic/nn/graphs.py`: what is smaller is recorded as a CUDA graph."""


@dataclass(frozen=True, kw_only=True)
class Fitted:
    """What no tensor's shape says: chosen so that the rows of `tests/unit/test_planner_memory.py` come out.

    `python -m tests.cross_check_plans` fits them anew without a row, and says how far off that row then is.
    """

    workspace_gib: float = 0.1
    """cuBLAS's, batches and sums."""
    hidden_copies: float = 3.0
    """Of what the output layer reads, while the loss is computed."""
    temporaries: float = 1.0
    """Of `BlockShape.temporary_bytes`, while the backward is in a block."""
    saved_gradients: float = 1.5
    """Of the output layer's gradient, where the loss goes by chunks."""


FITTED = Fitted()

Moment = Literal["the loss is computed", "the backward begins", "the backward ends", "weights are updated"]


@dataclass(frozen=True, kw_only=True)
class Memory:
    """What one GPU holds at the worst moment."""

    gib: Mapping[str, float]
    """By what it is for; the sum is the peak."""
    moment: Moment
    shown_gib: float
    """What `max_memory_allocated` shows after the first steps: less, where a CUDA graph holds its memory for itself."""

    @property
    def peak_gib(self) -> float:
        """All of it."""
        return sum(self.gib.values())


@dataclass(frozen=True, kw_only=True)
class _Held:
    """How a strategy spreads the state; bytes."""

    state: float
    """Weights, moments, and copies that stay."""
    grads: float
    """All gradients at the end of a step's last backward."""
    carried: float
    """Gradients that are there when the last backward begins."""
    gathered_root: float
    gathered_blocks: float
    reducing_block: float
    reducing_root: float
    waits_for_block: bool
    """The sum of the last block is still under way when that of the root begins."""
    joins: bool
    """Layers that read one input are joined (`elastic/strategies/_copies.py`)."""
    grad_bytes_per_param: float
    """Of the gradients as they are computed."""


def estimate_memory(config: RunConfig, *, world_size: int, gpus_per_node: int = 1, fitted: Fitted = FITTED) -> Memory:
    """Return what the fullest GPU of a world holds.

    Args:
        gpus_per_node: over how many `strategy=hsdp` without a shard_size spreads the state.
    """
    shape = get_block_shape(config.model)
    micro_batch, num_microbatches = split_batch(config, world_size)
    held = _spread(config, shape, world_size=world_size, gpus_per_node=gpus_per_node, accumulates=num_microbatches > 1)
    tokens = micro_batch * config.data.seq_len
    element = get_element_bytes(config)
    kept, whole = _count_activations(config, shape, joins=held.joins)
    layers, is_frozen = shape.num_layers, config.tune != "full"
    loss = _Loss.of(shape, tokens=tokens, element=element, is_frozen=is_frozen, fitted=fitted)
    scale = tokens * element / 2
    head_grad = 0.0 if is_frozen else float(element * shape.head_params)
    block_work = scale * (max(0.0, whole - kept) + fitted.temporaries * shape.temporary_bytes)
    block_grads = held.grads * shape.matrix_params / shape.num_params
    moments: dict[Moment, dict[str, float]] = {
        "the loss is computed": {
            "activations": scale * kept * layers + fitted.hidden_copies * loss.hidden,
            "logits": loss.peak,
            "gradients": held.carried + (0 if loss.is_chunked else head_grad),
            "gathered": held.gathered_root + held.gathered_blocks,
        },
        "the backward begins": {
            "activations": scale * kept * layers + block_work,
            "gradients": held.carried + max(head_grad, loss.saved),
            "gathered": held.gathered_root + held.gathered_blocks,
        },
        "the backward ends": {
            "activations": scale * kept + block_work,
            "gradients": max(held.carried, held.grads - block_grads - held.grads * shape.root_params / shape.num_params)
            + max(head_grad, loss.saved),
            "gathered": held.gathered_root + held.gathered_blocks + held.reducing_block,
        },
        "weights are updated": {
            "activations": 0.0,
            "gradients": held.grads * (1 - shape.root_params / shape.num_params) + held.reducing_root
            if held.reducing_root
            else held.grads,
            "gathered": held.reducing_block if held.waits_for_block else 0.0,
        },
    }
    workspace = fitted.workspace_gib * GIB
    fixed = {"state": held.state, "buffers": workspace}
    worst = max(moments, key=lambda moment: sum(moments[moment].values()))
    parts = {name: size / GIB for name, size in (fixed | moments[worst]).items() if size}
    shown = sum(parts.values())
    if _is_graphed(config, world_size=world_size, tokens=tokens):
        shown = (held.state + held.grads + workspace) / GIB
    return Memory(gib=parts, moment=worst, shown_gib=shown)


def split_batch(config: RunConfig, world_size: int) -> tuple[int, int]:
    """Return the samples of a microbatch on the fullest rank, and how many microbatches a step has there."""
    samples = math.ceil(config.train.global_batch / world_size)
    num_microbatches = math.ceil(samples / config.train.micro_batch)
    return math.ceil(samples / num_microbatches), num_microbatches


def get_element_bytes(config: RunConfig) -> int:
    """Return the size of an activation."""
    return 4 if config.precision in ("fp32", "tf32") else 2


def get_shard_ways(config: RunConfig, *, world_size: int, gpus_per_node: int) -> int:
    """Return over how many ranks the state is cut."""
    match plugins.read_constant("elastic.strategies", config.strategy, "SHARDED_OVER"):
        case "world":
            return world_size
        case "group":
            wanted = min(config.shard_size or gpus_per_node, world_size)
            return next(size for size in range(wanted, 0, -1) if world_size % size == 0)
        case _:
            return 1


def is_whole(config: RunConfig, world_size: int) -> bool:
    """Tell whether a rank holds all of the model, without a wrapper: strategy=single, or auto on one rank."""
    return config.strategy == "single" or (config.strategy == "auto" and world_size == 1)


def uses_autocast(config: RunConfig, *, joins: bool) -> bool:
    """Tell whether a model in fp32 computes in low precision operation by operation (ddp, and fp16 on one rank)."""
    may_cast = config.tune == "full" and get_element_bytes(config) == 2
    return may_cast and not joins and config.strategy in ("ddp", "single", "auto")


def _is_graphed(config: RunConfig, *, world_size: int, tokens: int) -> bool:
    flops = 6.0 * config.model.num_matrix_params * tokens
    has_copy = config.tune == "full" and config.precision in ("bf16", "fp8", "fp8_rowwise")
    is_copy = has_copy and is_whole(config, world_size) and config.recompute != "offload"
    return config.cuda_graph == "auto" and is_copy and flops < _MAX_GRAPHED_FLOPS


def _spread(config: RunConfig, shape: BlockShape, *, world_size: int, gpus_per_node: int, accumulates: bool) -> _Held:
    params, element = shape.num_params, get_element_bytes(config)
    if config.tune != "full":
        return _spread_frozen(config, shape, world_size=world_size, gpus_per_node=gpus_per_node)
    if is_whole(config, world_size) and config.precision in ("bf16", "fp8", "fp8_rowwise"):
        # fp32 weights and moments, a copy that computes; its gradients are used as they are, or summed in fp32
        return _Held(
            state=14.0 * params,
            grads=(4.0 if accumulates else 2.0) * params,
            carried=4.0 * params if accumulates else 0.0,
            gathered_root=0.0,
            gathered_blocks=0.0,
            reducing_block=0.0,
            reducing_root=0.0,
            waits_for_block=False,
            joins=True,
            grad_bytes_per_param=2.0,
        )
    if is_whole(config, world_size) or config.strategy == "ddp":
        has_buckets = config.strategy == "ddp"
        autocast = 2.0 * config.model.num_matrix_params if element == 2 else 0.0
        return _Held(
            state=12.0 * params,
            grads=4.0 * params,
            carried=4.0 * params if accumulates or has_buckets else 0.0,
            gathered_root=2.0 * shape.head_params if element == 2 else 0.0,  # cast for autocast, as all matrices are
            gathered_blocks=autocast - 2.0 * shape.head_params if autocast else 0.0,
            reducing_block=0.0,
            reducing_root=0.0,
            waits_for_block=False,
            joins=False,
            grad_bytes_per_param=4.0,
        )
    ways = get_shard_ways(config, world_size=world_size, gpus_per_node=gpus_per_node)
    block, root = shape.matrix_params, shape.root_params
    return _Held(
        state=12.0 * params / ways,
        grads=4.0 * params / ways,
        carried=4.0 * params / ways if accumulates else 0.0,
        gathered_root=float(element * root),
        gathered_blocks=2.0 * element * block,
        # what is summed over ranks goes through a buffer in fp32 that lives until the next one is full
        reducing_block=4.0 * block + 4.0 * block / ways,
        waits_for_block=ways > 1,
        # alone, a rank still has the gathered weights and their gradients by then
        reducing_root=4.0 * root + 4.0 * root / ways + (2.0 * element * root if ways == 1 else 0.0),
        joins=False,
        grad_bytes_per_param=float(element),
    )


def _spread_frozen(config: RunConfig, shape: BlockShape, *, world_size: int, gpus_per_node: int) -> _Held:
    """Frozen weights in what products read, or in 4 bits, unpacked for each product; adapters in fp32 with moments."""
    adapters, element = config.num_trained_params, get_element_bytes(config)
    is_sharded = not is_whole(config, world_size) and config.strategy != "ddp"
    ways = get_shard_ways(config, world_size=world_size, gpus_per_node=gpus_per_node) if is_sharded else 1
    frozen = count_frozen_bytes(config.model, config.lora, config.tune, item_bytes=element)
    block = (frozen - element * shape.root_params) / shape.num_layers
    unpacked = max(num_out * num_in for num_out, num_in in config.model.block_matrices.values())
    return _Held(
        state=(frozen + 12.0 * adapters) / ways,
        grads=4.0 * adapters / ways,
        carried=4.0 * adapters / ways,
        gathered_root=float(element * shape.root_params) if is_sharded else 0.0,
        gathered_blocks=(2.0 * block if is_sharded else 0.0) + (element * unpacked if config.tune == "qlora" else 0.0),
        reducing_block=0.0,
        reducing_root=0.0,
        waits_for_block=False,
        joins=False,
        grad_bytes_per_param=float(element),
    )


def _count_activations(config: RunConfig, shape: BlockShape, *, joins: bool) -> tuple[float, float]:
    """Return the bytes per token that a block keeps, and those that its backward needs, with elements of 2 bytes."""
    is_fp8 = config.precision in ("fp8", "fp8_rowwise")
    whole: float = shape.joined_bytes if joins or is_fp8 else shape.apart_bytes
    if is_fp8:  # what products read is cast again from what was there before it: norms are not kept
        whole -= 2 * 2 * shape.dim
    if not (config.compile or joins):  # the compiler computes what silu has made of the gate again
        whole += 2 * shape.ffn_dim
    if uses_autocast(config, joins=joins):  # the residual stream is fp32
        whole += 2 * shape.dim
    scores = 0.0
    if get_element_bytes(config) == 4:  # no kernel on GPUs takes fp32: attention keeps its weights. Measured: 32 GiB
        scores = 2.0 * shape.num_heads * config.data.seq_len
    whole += scores
    match config.recompute:
        case "none":
            kept = whole
        case "full":
            kept = shape.input_bytes
        case "budget":
            kept = shape.count_budget_bytes(config.recompute_budget * whole)
        case "selective":
            kept = shape.products_bytes + scores
        case "offload":
            kept = 0.0
    return kept, whole


@dataclass(frozen=True, kw_only=True)
class _Loss:
    """The output layer and its loss; bytes."""

    peak: float
    """While it is computed."""
    saved: float
    """Of gradients that the forward has computed already, if it goes by chunks."""
    hidden: float
    is_chunked: bool

    @classmethod
    def of(cls, shape: BlockShape, *, tokens: int, element: int, is_frozen: bool, fitted: Fitted) -> "_Loss":
        logits, hidden = float(tokens * shape.vocab_size * element), float(tokens * shape.dim * element)
        if logits <= _MAX_LOGITS_BYTES:
            return cls(peak=logits, saved=0.0, hidden=hidden, is_chunked=False)
        weight_grad = 0.0 if is_frozen else 4.0 * shape.head_params
        # a chunk is made while the one before it is still there; a sum of two products is another tensor
        peak = max(min(logits, 2.0 * _MAX_LOGITS_BYTES) + weight_grad, _MAX_LOGITS_BYTES + 2 * weight_grad)
        return cls(peak=peak, saved=fitted.saved_gradients * weight_grad, hidden=hidden, is_chunked=True)
