"""Seconds of a step: what the work would take at the GPU's peaks, over the share of them that such work was seen to
reach.

Products and attention are bound by arithmetic, all else by the GPU's memory; what ranks exchange hides behind both
for a part. The shares were fitted to steps on H200 (torch 2.11, 2026-11; the table in
`tests/unit/test_planner_throughput.py`) and are taken for all GPUs: of others nothing was measured, which a plan
says. `calibration` brings a measured one in.
"""

from dataclasses import dataclass

from cluster.catalog.gpus import GpuSpec
from cluster.planner.memory import get_element_bytes, get_shard_ways, is_whole, split_batch, uses_autocast
from cluster.planner.shape import BlockShape, get_block_shape
from elastic.config import Precision, RunConfig
from elastic.errors import ConfigError

MEASURED_ON = ("H200", "H100-SXM")
"""Of these the shares are; an H100 computes as an H200 does, and was measured beside it."""

_PRODUCTS: dict[Precision, float] = {
    "fp32": 0.72,
    "tf32": 0.45,
    "fp16": 0.667,
    "bf16": 0.667,
    "fp8": 0.45,
    "fp8_rowwise": 0.36,
}
"""Of the peak of that precision, casts of fp8 included. fp8_rowwise: an estimate."""
_ATTENTION = {64: 0.58, 128: 0.69}
"""Of the 16-bit peak by the size of a head, for endless sequences, causal FLOPs counted (cuDNN, FlashAttention-4)."""
_SCORE_PASSES = 5.0
"""How often attention in fp32, which is products and a softmax, reads or writes its weights of all pairs."""
_HALF_SEQUENCE = 1500
"""At this length attention is half as efficient."""
_ELEMENTWISE, _OPTIMIZER, _COPIES = 0.7, 0.8, 0.75
"""Of the memory's bandwidth."""
_TRAFFIC = 3.0
"""Bytes moved per byte that is kept for the backward: written, read, and its gradient."""
_LAYER_OVERHEAD_S = 75e-6
"""Starts and ends of a layer's kernels, forward and backward."""
_EAGER = 1.13
"""Not compiled and not joined: measured 310.4 against 275.9 ms (1.5 B, FSDP2, H200). Joined, nothing is left to
gain."""
_OPTIMIZER_BYTES_PER_PARAM = 28.0
_GATHER_BYTES_PER_PARAM = 32.0
"""FSDP2 on one rank: casts and copies of weights, forward and backward, and of gradients."""
_CAST_BYTES_PER_PARAM = 16.0
"""Autocast: weights in each microbatch, and their gradients."""
_STEP_OVERHEAD_S = 0.001
_LINK, _NETWORK = 0.8, 0.8
"""Of a link's speed, for large collectives; an estimate."""
_NO_PEER = 0.5
"""Where GPUs cannot read each other's memory all goes twice over PCIe."""
_EXPOSED_LINK, _EXPOSED_NETWORK = 0.7, 0.3
"""Of collectives, what they hold up the kernels beside them. Link: measured on two H200; network: an estimate."""
_ASSUMED_NETWORK_GBITS = 10.0
"""Between rented machines whose offer says nothing."""


@dataclass(frozen=True, kw_only=True)
class StepTime:
    """What a step is made of."""

    products_s: float
    attention_s: float
    memory_s: float
    """Everything that is bound by the GPU's memory, the update among it."""
    exposed_s: float
    """Collectives that nothing hides."""
    overhead_s: float
    num_microbatches: int
    scale: float = 1.0
    """What such steps took here, as a multiple."""

    @property
    def step_s(self) -> float:
        """All of it."""
        parts = self.products_s + self.attention_s + self.memory_s + self.exposed_s + self.overhead_s
        return self.scale * parts


def estimate_step(
    config: RunConfig,
    gpu: GpuSpec,
    *,
    world_size: int,
    gpus_per_node: int = 1,
    network_gbits: float | None = None,
    scale: float = 1.0,
) -> StepTime:
    """Return the seconds of an optimizer step.

    Args:
        network_gbits: of a machine; None: not known, and then little is assumed.
        scale: measured over predicted seconds of this kind of GPU.

    Raises:
        ConfigError: the GPU has no arithmetic of this precision.
    """
    shape = get_block_shape(config.model)
    micro_batch, num_microbatches = split_batch(config, world_size)
    tokens, seq_len, layers = micro_batch * config.data.seq_len, config.data.seq_len, shape.num_layers
    element = get_element_bytes(config)
    again = _get_recomputed(config, shape)
    # products
    peak = gpu.get_peak_flops(config.precision)
    if peak is None:
        raise ConfigError(
            f"precision={config.precision}, but a {gpu.name} has no such arithmetic. Set precision=fp16 on what is "
            "older than Ampere, bf16 on what is older than Ada, or take another GPU."
        )
    head_precision: Precision = "bf16" if config.precision in ("fp8", "fp8_rowwise") else config.precision
    head_peak = gpu.get_peak_flops(head_precision) or peak
    passes = 6.0 if config.tune == "full" else 4.0  # frozen weights need no gradients; adapters are little work
    block_flops = (passes + 2.0 * again) * shape.matrix_params * layers * tokens
    products_s = block_flops / (peak * _PRODUCTS[config.precision])
    products_s += passes * shape.head_params * tokens / (head_peak * _PRODUCTS[head_precision])
    attention_s = _time_attention(config, gpu, shape, tokens=tokens, seq_len=seq_len, again=again)
    # what the memory bounds
    computes_on_copy = config.tune == "full" and config.precision in ("bf16", "fp8", "fp8_rowwise")
    joins = computes_on_copy and is_whole(config, world_size)
    kept = shape.joined_bytes if joins else shape.apart_bytes
    traffic = _TRAFFIC * kept * layers * tokens * (element / 2) * (1 + again / 3)
    logits = 4.0 * tokens * shape.vocab_size * element
    bandwidth = gpu.bandwidth_bytes_per_s
    memory_s = (traffic + logits) / (bandwidth * _ELEMENTWISE)
    is_sharded = not is_whole(config, world_size) and config.strategy != "ddp"
    if is_sharded:
        memory_s += _GATHER_BYTES_PER_PARAM * shape.num_params / (bandwidth * _COPIES)
    elif uses_autocast(config, joins=joins):
        memory_s += _CAST_BYTES_PER_PARAM * shape.num_params / (bandwidth * _COPIES)
    exposed_s = _time_collectives(
        config, gpu, shape, world_size=world_size, gpus_per_node=gpus_per_node, network_gbits=network_gbits
    ).expose(products_s + attention_s + memory_s, num_microbatches=num_microbatches)
    ways = get_shard_ways(config, world_size=world_size, gpus_per_node=gpus_per_node) if is_sharded else 1
    update_s = _OPTIMIZER_BYTES_PER_PARAM * config.num_trained_params / ways / (bandwidth * _OPTIMIZER)
    eager = 1.0 if config.compile or joins else _EAGER
    return StepTime(
        products_s=num_microbatches * products_s,
        attention_s=num_microbatches * attention_s,
        memory_s=num_microbatches * memory_s * eager + update_s + (eager - 1) * num_microbatches * products_s,
        exposed_s=exposed_s,
        overhead_s=num_microbatches * layers * _LAYER_OVERHEAD_S + _STEP_OVERHEAD_S,
        num_microbatches=num_microbatches,
        scale=scale,
    )


def _get_recomputed(config: RunConfig, shape: BlockShape) -> float:
    """Return which share of a block's products is computed twice."""
    match config.recompute:
        case "full" | "offload":
            return 1.0
        case "budget":
            kept = shape.count_budget_bytes(config.recompute_budget * shape.joined_bytes)
            if kept == shape.input_bytes:
                return 1.0
            missing = (shape.input_bytes + shape.keepable_bytes - kept) / (4 * shape.ffn_dim or 1)
            return missing * 2 * shape.dim * shape.ffn_dim / shape.matrix_params
        case _:
            return 0.0


def _time_attention(
    config: RunConfig, gpu: GpuSpec, shape: BlockShape, *, tokens: int, seq_len: int, again: float
) -> float:
    if not shape.query_dim:
        return 0.0
    # causal: half of two products forward, five backward
    flops = (7.0 + 2.0 * again) * tokens * seq_len * shape.query_dim * shape.num_layers
    if get_element_bytes(config) == 4:  # all pairs, and their weights in memory
        peak = gpu.get_peak_flops(config.precision) or gpu.fp32_flops
        scores = _SCORE_PASSES * 4.0 * shape.num_heads * seq_len * tokens * shape.num_layers
        return 2 * flops / (peak * _PRODUCTS[config.precision]) + scores / (gpu.bandwidth_bytes_per_s * _ELEMENTWISE)
    share = _ATTENTION[64] if shape.head_size < 96 else _ATTENTION[128]
    return flops / (gpu.bf16_flops * share * seq_len / (seq_len + _HALF_SEQUENCE))


@dataclass(frozen=True, kw_only=True)
class _Collectives:
    """Seconds that ranks spend on exchanging weights and gradients."""

    link_s: float
    """Of each microbatch, between GPUs of a node."""
    network_s: float
    """Of each microbatch, between nodes."""
    last_s: float
    """Of a step's last microbatch alone, between copies of the state."""

    def expose(self, compute_s: float, *, num_microbatches: int) -> float:
        """Return the seconds that a step takes longer for them."""
        each_s = self.link_s + self.network_s
        held_up = _EXPOSED_LINK * self.link_s + _EXPOSED_NETWORK * self.network_s
        once = max(held_up, each_s - 0.7 * compute_s)
        last = max(_EXPOSED_NETWORK * self.last_s, self.last_s - 0.5 * compute_s)
        return num_microbatches * once + last


def _time_collectives(
    config: RunConfig,
    gpu: GpuSpec,
    shape: BlockShape,
    *,
    world_size: int,
    gpus_per_node: int,
    network_gbits: float | None,
) -> _Collectives:
    if world_size == 1:
        return _Collectives(link_s=0.0, network_s=0.0, last_s=0.0)
    params, element = shape.num_params, get_element_bytes(config)
    link = gpu.link_bytes_per_s * _LINK * (1.0 if gpu.peer_to_peer else _NO_PEER)
    network = (network_gbits or _ASSUMED_NETWORK_GBITS) / 8 * 1e9 * _NETWORK
    is_ddp = config.strategy == "ddp"
    ways = 1 if is_ddp else get_shard_ways(config, world_size=world_size, gpus_per_node=gpus_per_node)
    link_s = network_s = last_s = 0.0
    if ways > 1:
        # weights gathered twice, gradients in fp32 scattered once; a node's share of each crosses its network once
        size = (2 * element * params + 4.0 * config.num_trained_params) * (ways - 1) / ways
        if ways > gpus_per_node:
            network_s = size / network
        else:
            link_s = size / link
    copies = world_size // ways
    if copies > 1:
        size = 2 * 4.0 * config.num_trained_params / ways * (copies - 1) / copies
        crosses = world_size > gpus_per_node
        # every GPU of a node reduces its own part, through the one network of its node
        last_s = size * min(ways, gpus_per_node) / network if crosses else size / link
    return _Collectives(link_s=link_s, network_s=network_s, last_s=last_s)
