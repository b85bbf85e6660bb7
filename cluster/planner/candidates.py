"""One offer, so many machines of it: does the run fit, how long does it take, what does it cost. Pure."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.catalog.gpus import GpuSpec, find_spec
from cluster.catalog.offers import Offer
from cluster.planner.goodput import Goodput, estimate_goodput
from cluster.planner.host_memory import estimate_host_gib, estimate_shard_bytes
from cluster.planner.memory import Memory, estimate_memory
from cluster.planner.throughput import MEASURED_ON, StepTime, estimate_step
from elastic.checkpoint.durable.storage_errors import estimate_checkpoint_bytes
from elastic.config import RunConfig
from elastic.errors import ConfigError

_MOST_SIZES = 8
_HOURS_PER_MONTH = 730


@dataclass(frozen=True, kw_only=True)
class Known:
    """What was measured of this run or of such GPUs, and wins over estimates."""

    tokens_done: int = 0
    scales: Mapping[str, float] = field(default_factory=dict[str, float])
    """Measured over estimated seconds of a step, by GPU."""
    losses_per_node_hour: float | None = None
    """Of spot machines, where this run has seen them go."""
    outage_s: float | None = None
    """From the last step of a world to the first of the next, as this run has seen it."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A way to run it."""

    offer: Offer
    nodes: int
    gpu: GpuSpec | None
    fits: bool
    reason: str
    """Why it cannot be, or what its numbers stand on."""
    memory: Memory | None = None
    host_gib: float = 0.0
    step: StepTime | None = None
    tokens_per_s: float = 0.0
    """While steps are made."""
    goodput: Goodput | None = None
    hours: float = float("inf")
    usd: float = float("inf")
    usd_per_mtoken: float = float("inf")

    @property
    def gpus(self) -> int:
        """All of them."""
        return self.nodes * self.offer.gpus

    def to_row(self) -> dict[str, object]:
        """Return what `plan --json` says of it."""
        known = self.step is not None and self.goodput is not None
        return {
            "provider": self.offer.provider,
            "offer": self.offer.id,
            "region": self.offer.region,
            "instance": self.offer.instance,
            "gpu": self.offer.gpu,
            "gpus": self.gpus,
            "nodes": self.nodes,
            "kind": self.offer.kind,
            "fits": self.fits,
            "memory_gib_per_gpu": round(self.memory.peak_gib, 2) if self.memory else None,
            "memory_gib_by_part": {k: round(v, 2) for k, v in self.memory.gib.items()} if self.memory else None,
            "host_gib_per_node": round(self.host_gib, 1) if self.memory else None,
            "step_s": round(self.step.step_s, 4) if self.step else None,
            "tokens_per_s": round(self.tokens_per_s, 1) if known else None,
            "hours": round(self.hours, 3) if known else None,
            "usd": round(self.usd, 2) if known else None,
            "usd_per_mtoken": round(self.usd_per_mtoken, 5) if known else None,
            "usd_per_gpu_hour": round(self.offer.usd_per_gpu_hour, 4),
            "goodput": round(self.goodput.share, 4) if self.goodput else None,
            "losses_per_hour": round(self.goodput.losses_per_hour, 5) if self.goodput else None,
            "checkpoint_interval_s": round(self.goodput.interval_s, 1) if self.goodput else None,
            "source": self.offer.source,
            "date": str(self.offer.date),
            "reason": self.reason,
        }


def get_node_counts(config: RunConfig, offer: Offer) -> tuple[int, ...]:
    """Return how many machines of an offer the run may use: the most, the fewest, and some between, descending."""
    least, most = config.cluster.min_workers, config.cluster.max_workers
    sizes = set(config.get_world_sizes())
    counts = [n for n in range(max(1, -(-least // offer.gpus)), most // offer.gpus + 1) if n * offer.gpus in sizes]
    counts = [n for n in counts if offer.max_nodes is None or n <= offer.max_nodes]
    if len(counts) <= _MOST_SIZES:
        return tuple(reversed(counts))
    wanted, n = {counts[0], counts[-1]}, counts[-1]
    while n > counts[0] and len(wanted) < _MOST_SIZES:
        n //= 2
        wanted.add(min(counts, key=lambda count: abs(count - n)))
    return tuple(sorted(wanted, reverse=True))


class Evaluator:
    """Works out candidates of one configuration; what depends on the GPU alone is worked out once."""

    def __init__(self, config: RunConfig, known: Known | None = None) -> None:
        self._config, self._known = config, known or Known()
        self._memories: dict[tuple[int, int], Memory] = {}
        self._steps: dict[tuple[str, int, int, float | None], StepTime | str] = {}

    def evaluate(self, offer: Offer, nodes: int) -> Candidate:
        """Return what becomes of the run on so many machines of an offer."""
        config, spec, world_size = self._config, find_spec(offer.gpu), nodes * offer.gpus
        if spec is None:
            reason = f"nothing is known of {offer.gpu}: its speed and memory would be guesses"
            return Candidate(offer=offer, nodes=nodes, gpu=None, fits=False, reason=reason)
        if config.strategy == "single" and world_size > 1:
            reason = "strategy=single trains on one GPU"
            return Candidate(offer=offer, nodes=nodes, gpu=spec, fits=False, reason=reason)
        memory = self._get_memory(world_size, offer.gpus)
        step = self._get_step(spec, offer, world_size)
        if isinstance(step, str):
            return Candidate(offer=offer, nodes=nodes, gpu=spec, fits=False, reason=step, memory=memory)
        goodput = estimate_goodput(
            config,
            offer,
            nodes=nodes,
            step_s=step.step_s,
            shard_bytes=estimate_shard_bytes(config, world_size),
            losses_per_hour=self._known.losses_per_node_hour if offer.kind in ("spot", "bid") else None,
            measured_outage_s=self._known.outage_s,
        )
        fits = memory.peak_gib <= spec.usable_gib
        tokens_per_s = config.train.global_batch * config.data.seq_len / step.step_s
        effective = tokens_per_s * goodput.share * goodput.availability
        left = max(0, config.total_tokens - self._known.tokens_done)
        hours = left / effective / 3600 if effective else float("inf")
        usd = hours * nodes * offer.usd_per_hour * goodput.availability + self._price_storage(offer, hours)
        return Candidate(
            offer=offer,
            nodes=nodes,
            gpu=spec,
            fits=fits and goodput.share > 0,
            reason=self._explain(spec, memory, goodput, offer, world_size),
            memory=memory,
            host_gib=estimate_host_gib(config, world_size=world_size, gpus_per_node=offer.gpus),
            step=step,
            tokens_per_s=tokens_per_s,
            goodput=goodput,
            hours=hours,
            usd=usd,
            usd_per_mtoken=usd / left * 1e6 if left else 0.0,
        )

    def _get_memory(self, world_size: int, gpus_per_node: int) -> Memory:
        key = (world_size, gpus_per_node)
        if key not in self._memories:
            self._memories[key] = estimate_memory(self._config, world_size=world_size, gpus_per_node=gpus_per_node)
        return self._memories[key]

    def _get_step(self, spec: GpuSpec, offer: Offer, world_size: int) -> StepTime | str:
        key = (spec.name, world_size, offer.gpus, offer.network_gbits)
        if key not in self._steps:
            try:
                self._steps[key] = estimate_step(
                    self._config,
                    spec,
                    world_size=world_size,
                    gpus_per_node=offer.gpus,
                    network_gbits=offer.network_gbits,
                    scale=self._known.scales.get(spec.name, 1.0),
                )
            except ConfigError as error:
                self._steps[key] = str(error)
        return self._steps[key]

    def _price_storage(self, offer: Offer, hours: float) -> float:
        """Return what the checkpoints that are kept cost, where the price of storage is known."""
        if offer.storage_usd_per_gib_month is None or hours == float("inf"):
            return 0.0
        gib = self._config.checkpoint.keep_last * estimate_checkpoint_bytes(self._config.num_trained_params) / 2**30
        return gib * offer.storage_usd_per_gib_month * hours / _HOURS_PER_MONTH

    def _explain(self, spec: GpuSpec, memory: Memory, goodput: Goodput, offer: Offer, world_size: int) -> str:
        if memory.peak_gib > spec.usable_gib:
            most = max(memory.gib, key=lambda part: memory.gib[part])
            return (
                f"needs {memory.peak_gib:.1f} GiB of each GPU and {spec.usable_gib:.1f} can be used; most of it is "
                f"{most}, {memory.gib[most]:.1f} GiB"
            )
        if not goodput.share:
            return f"{goodput.losses_per_hour:.2g} losses an hour leave no time to train between them"
        said: list[str] = []
        if spec.name in self._known.scales:
            said.append(f"speed as measured on {spec.name}")
        elif spec.name not in MEASURED_ON:
            said.append(f"speed not measured on {spec.name}: as much of its peak as an H200 reaches")
        if world_size > offer.gpus and offer.network_gbits is None:
            said.append("network between machines not known: 10 Gbit/s assumed")
        return "; ".join(said) or f"speed as measured on {spec.name}"
