"""One run, described by frozen dataclasses (`config_load` reads them from YAML and `key=value` overrides).

No torch here, so that every command can check a configuration before anything slow or paid starts.
What a value alone must be is said at its key; rules over several keys of a section are in its `__post_init__`, those
over several sections in `RunConfig`. What a model's section holds is its family's to say (`model_config.py`).
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Annotated, Any, Literal

from elastic import plugins
from elastic.constraints import NOT_NEGATIVE, POSITIVE, Constraint, check_fields
from elastic.errors import ConfigError
from elastic.model_config import ModelConfig, build_model_config
from elastic.tuning import LoraConfig, Tune, find_in_4_bits, get_adapter_shapes

Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "fp8_rowwise"]
Recompute = Literal["none", "selective", "budget", "full", "offload"]
Attention = Literal["auto", "cudnn", "flash", "fa4"]


_MEAN_WEIGHT = Constraint(
    holds=lambda value: 0 <= value < 1,
    must="be at least 0 and below 1",
    why="it weights a running mean",
    fix="Try {key}={default}.",
)
_LR_SHARE = Constraint(
    holds=lambda value: 0 <= value <= 1,
    must="be between 0 and 1",
    why="it is a share of optim.lr",
    fix="Try {key}={default}.",
)
_MEMORY_SHARE = Constraint(
    holds=lambda value: 0 < value <= 1,
    must="be more than 0 and at most 1",
    why="it is a share of the memory that recompute=none uses",
    fix="Try {key}={default}.",
)
_BUDGET_SHARE = Constraint(
    holds=lambda value: 0 < value <= 1,
    must="be more than 0 and at most 1",
    why="it is a share of the budget",
    fix="Try {key}={default}.",
)
_ONE_GPU = Constraint(
    holds=lambda value: value in (0, 1),
    must="be 0 (CPU) or 1",
    why="every GPU has a trainer of its own",
    fix="Raise cluster.max_workers to use more GPUs.",
)
_ZERO_STAGE = Constraint(
    holds=lambda value: value in (1, 2, 3),
    must="be 1, 2 or 3",
    why="ZeRO has no other that spreads something",
    fix="Set {key}={default}, or strategy=ddp instead of stage 0.",
)
_PATH_ON_EACH_NODE = Constraint(
    holds=lambda value: not value or value.startswith("/"),
    must="be an absolute path, the same on every node",
    why="it is a folder on a disk of the node's own",
    fix="What all nodes share belongs into storage.",
)
_RUN_NAME = Constraint(
    holds=lambda value: re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", value) is not None,
    must="consist of letters, digits, dots, dashes and underscores, with no leading dot or dash",
    why="it names a directory, an object-store prefix and a W&B run",
    fix="Try {key}=my-run.",
)
_NOT_EMPTY = Constraint(
    holds=bool,
    must="not be empty",
    why="it leaves no place for the run's directory",
    fix="Set {key}={default}.",
)


@dataclass(frozen=True, kw_only=True)
class SourceConfig:
    """One of several prepared folders that a run takes its samples from."""

    path: str = ""
    """As `data.path` of a configuration with one source."""
    weight: float = 1.0
    """Its share of the samples, relative to those of the others. 0: none, until a phase gives it some."""


@dataclass(frozen=True, kw_only=True)
class PhaseConfig:
    """Weights that replace those of the sources from a point of the run on, until the next phase."""

    from_tokens: int = 0
    """The target tokens of the run before it, those of bad steps and of padding included."""
    from_step: int = 0
    """The first step of it, instead of `from_tokens`."""
    weights: dict[str, float] = field(default_factory=dict[str, float])
    """By source; those left out get none."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Token shards made by `solvent prepare`."""

    path: str = ""
    """The folder that `solvent prepare --out` wrote, or the URL of a copy in an object store (s3://, gs://, az://)."""
    cache: Annotated[str, _PATH_ON_EACH_NODE] = ""
    """Where a node keeps what it has read from an object store, for all its trainers and runs: a folder on a disk of
    its own. Empty: one in its folder for temporary files."""
    cache_gib: Annotated[float, NOT_NEGATIVE] = 16.0
    """The cache's size; it never grows beyond. 0: there is none."""
    sources: dict[str, SourceConfig] = field(default_factory=dict[str, SourceConfig])
    """Several of them by name, instead of `path`: `web: {path: ..., weight: 0.7}`."""
    phases: dict[str, PhaseConfig] = field(default_factory=dict[str, PhaseConfig])
    """Changes of the weights by name: `anneal: {from_tokens: 9_000_000_000, weights: {web: 0.2, code: 0.8}}`."""
    replace: str = ""
    """Lets a run go on with other data or another tokenizer than it began with: the 16 digits that its refusal names.
    Any further change is refused again."""
    seq_len: Annotated[int, POSITIVE] = 256
    """Target tokens per sample."""
    packing: Literal["stream", "documents"] = "stream"
    """What a sample is: `seq_len` tokens of the stream, where documents run into each other; or whole documents (and
    parts of longer ones) that do not see each other, filled up with padding."""
    record_samples: bool = False
    """Write the ids that each rank consumed to `samples-<attempt>-<rank>.jsonl`."""
    prefetch_steps: Annotated[int, POSITIVE] = 2

    def __post_init__(self) -> None:
        check_fields(self, prefix="data.", error=ConfigError)
        check_sources(self)


def check_sources(data: DataConfig) -> None:
    """Refuse sources and phases that cannot be meant.

    Raises:
        ConfigError: they cannot.
    """
    if data.sources and data.path:
        raise ConfigError(
            f"data.path={data.path!r} and data.sources ({', '.join(data.sources)}) both say what to train on. Give one "
            "of them; the folder of data.path may be one of the sources."
        )
    if data.phases and not data.sources:
        raise ConfigError("data.phases changes the weights of data.sources, and there are none. Name them, or drop it.")
    weights = {"data.sources": {name: source.weight for name, source in data.sources.items()}}
    for name, phase in data.phases.items():
        weights[f"data.phases.{name}.weights"] = phase.weights
        if (phase.from_tokens > 0) == (phase.from_step > 0) or min(phase.from_tokens, phase.from_step) < 0:
            raise ConfigError(
                f"data.phases.{name} begins at from_tokens={phase.from_tokens}, from_step={phase.from_step}: one of "
                "them must be more than 0. What holds from the start is the weight of each source."
            )
        if unknown := phase.weights.keys() - data.sources.keys():
            raise ConfigError(
                f"data.phases.{name}.weights names {', '.join(sorted(unknown))}, which data.sources does not. Use "
                f"{', '.join(data.sources)}."
            )
    for key, values in weights.items():
        if values and not all(0 <= weight < math.inf for weight in values.values()):
            raise ConfigError(f"{key}: a weight of {values} is negative or not finite. Use 0 or more.")
        if (values or key != "data.sources") and not sum(values.values()):
            raise ConfigError(f"{key}: no source has a weight ({values}), so there is nothing to train on. Give one.")


@dataclass(frozen=True, kw_only=True)
class DeepSpeedConfig:
    """DeepSpeed's ZeRO, for strategy=deepspeed."""

    stage: Annotated[int, _ZERO_STAGE] = 3
    """What is spread over the ranks: the optimizer's state (1), gradients as well (2), weights as well (3)."""

    def __post_init__(self) -> None:
        check_fields(self, prefix="deepspeed.", error=ConfigError)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at once, and how often we look."""

    steps: Annotated[int, POSITIVE] = 100
    """Optimizer updates in all; a resumed run counts those already done."""
    global_batch: Annotated[int, POSITIVE] = 32
    """Samples per optimizer update, over all ranks, whatever their number."""
    micro_batch: Annotated[int, POSITIVE] = 8
    """Samples per forward and backward on one rank; lower it when memory is short."""
    seed: Annotated[int, NOT_NEGATIVE] = 0
    eval_every_steps: Annotated[int, NOT_NEGATIVE] = 0
    """0: only after the last step."""
    eval_samples: Annotated[int, POSITIVE] = 256
    max_grad_norm: Annotated[float, POSITIVE] = 1.0

    def __post_init__(self) -> None:
        check_fields(self, prefix="train.", error=ConfigError)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, and its learning rate as a function of the tokens seen."""

    lr: Annotated[float, POSITIVE] = 1e-3
    min_lr_ratio: Annotated[float, _LR_SHARE] = 0.1
    """The last learning rate as a share of `lr`."""
    beta1: Annotated[float, _MEAN_WEIGHT] = 0.9
    beta2: Annotated[float, _MEAN_WEIGHT] = 0.95
    eps: Annotated[float, POSITIVE] = 1e-8
    weight_decay: Annotated[float, NOT_NEGATIVE] = 0.1
    """On matrices only; norms are not decayed."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_tokens: Annotated[int, NOT_NEGATIVE] = 0
    """A run that is shorter ends while it still warms up."""
    decay_tokens: Annotated[int, NOT_NEGATIVE] = 0
    """wsd only: length of the final decay. 0: a fifth of the run."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """wsd only: straight down, or 1 - sqrt(x)."""

    def __post_init__(self) -> None:
        check_fields(self, prefix="optim.", error=ConfigError)
        if self.decay_tokens and self.schedule != "wsd":
            raise ConfigError(
                f"optim.decay_tokens={self.decay_tokens} is not read by optim.schedule={self.schedule}, which decays "
                "over the whole run. Set optim.schedule=wsd, or optim.decay_tokens=0."
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When state is put where a loss does not reach it, and how much of it is kept."""

    every_steps: Annotated[int, NOT_NEGATIVE] = 50
    """Optimizer steps between two durable checkpoints. 0: planned from what a save was measured to cost and from the
    losses so far (Young, Daly)."""
    longest_s: Annotated[float, POSITIVE] = 1800.0
    """A planned interval is never longer."""
    keep_last: Annotated[int, POSITIVE] = 3
    memory: Literal["peer", "node", "off"] = "peer"
    """Under `solvent train`, snapshots are also kept in host memory, where they outlive the trainer: on its node, and
    as a copy on another one (peer). Each node then holds at most five shards of a worker per worker, or
    fewer where it has less room."""
    memory_every_steps: Annotated[int, NOT_NEGATIVE] = 0
    """Optimizer steps between two snapshots. 0: planned, as above; at every step if they cost nothing."""
    node_disk: Annotated[str, _PATH_ON_EACH_NODE] = ""
    """Under `solvent train`, a folder on a disk of each node's own: now and then a snapshot goes there too, for the day
    on which the memories of all nodes are lost at once. Empty: none does."""
    node_disk_every_s: Annotated[float, NOT_NEGATIVE] = 60.0
    """Seconds between two of them, at least."""
    max_failed_saves: Annotated[int, POSITIVE] = 5
    """Training goes on without a save that failed; after so many in a row the run ends, resumable."""

    def __post_init__(self) -> None:
        check_fields(self, prefix="checkpoint.", error=ConfigError)
        if self.node_disk and self.memory == "off":
            raise ConfigError(
                f"checkpoint.node_disk={self.node_disk!r} needs snapshots, and checkpoint.memory=off makes none. Set "
                "checkpoint.memory=node or peer, or leave node_disk out."
            )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The workers we want; each is one GPU (or, without GPUs, `cpus_per_worker` cores)."""

    min_workers: Annotated[int, POSITIVE] = 1
    max_workers: int = 1
    gpus_per_worker: Annotated[int, _ONE_GPU] = 0
    cpus_per_worker: Annotated[int, POSITIVE] = 1
    threads_per_worker: Annotated[int, POSITIVE] = 1
    """Intra-op threads of a trainer; on a GPU node 1 is enough."""
    spare_trainers: bool = True
    """Where code is compiled, keep a second process per GPU that is ready when the one that trains dies; takes some
    0.7 GiB of the GPU's memory."""
    notices: str = "auto"
    """Whose notices of preemption the nodes read: auto (whatever they find they are), off, or a provider (`solvent
    doctor` lists them)."""

    def __post_init__(self) -> None:
        check_fields(self, prefix="cluster.", error=ConfigError)
        if self.min_workers > self.max_workers:
            raise ConfigError(
                f"cluster.min_workers={self.min_workers} is more than cluster.max_workers={self.max_workers}: no world "
                "could be both. Lower the first or raise the second."
            )


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """How long we wait before calling a peer dead, and when we stop trying."""

    collective_timeout_s: Annotated[float, POSITIVE] = 120.0
    """A collective slower than this means a peer is gone."""
    lease_s: Annotated[float, POSITIVE] = 120.0
    """A trainer that a whole group of Ray Train's has left out ends after this, and so does what the end of its cluster
    has left on a node; another driver or coordinator is waited for half as long. Forming a group may take longer."""
    max_failures_without_progress: Annotated[int, POSITIVE] = 3
    """The run ends as failed once the same step has failed in so many attempts in a row, over all submissions."""
    max_node_failures: Annotated[int, POSITIVE] = 3
    """A node is left out for the rest of the run once so many attempts in a row fell to trainers of its own."""
    mean_hours_between_losses: Annotated[float, POSITIVE] = 1.0
    """How often a run of all nodes is taken to lose one without notice, until more is known; planned intervals of
    snapshots and checkpoints follow from it."""
    save_margin: Annotated[float, POSITIVE] = 2.0
    """With notice we leave at once, without a save, when less than this times the usual save is left."""
    term_grace_s: Annotated[float, NOT_NEGATIVE] = 0.0
    """Seconds from SIGTERM, or from a notice that names no time, to the end of the machine. 0: what its provider
    usually grants; `python -m elastic` is then in no hurry."""
    leave_before_s: Annotated[float, POSITIVE] = 600.0
    """A notice makes a node leave when this is left of it; until then it trains on (maintenance is told days ahead)."""
    hang_factor: Annotated[float, NOT_NEGATIVE] = 5.0
    """A phase of training is hung once it has taken longer than its limit below and than this times its usual duration.
    0: nothing is ever called hung."""
    hang_step_s: Annotated[float, POSITIVE] = 10.0
    """Forward, backward and update."""
    hang_first_step_s: Annotated[float, POSITIVE] = 900.0
    """The first step of an attempt, which may compile."""
    hang_data_s: Annotated[float, POSITIVE] = 30.0
    """Waiting for the next batch, and telling the last step. `python -m elastic` also grants it to a rank that waits in
    a collective: its peers may be at this."""
    hang_eval_s: Annotated[float, POSITIVE] = 300.0
    hang_save_s: Annotated[float, POSITIVE] = 600.0
    """The part of a save that training waits for."""
    hang_load_s: Annotated[float, POSITIVE] = 900.0
    """From the start of an attempt to its first batch."""
    silent_s: Annotated[float, POSITIVE] = 10.0
    """A trainer that has not given a sign of life (one a second) for so long is frozen, and is killed."""
    spike_threshold: Annotated[float, NOT_NEGATIVE] = 20.0
    """A step whose loss lies so many robust standard deviations, and 3 nats, above the recent median is not applied.
    0: off."""
    max_bad_steps: Annotated[int, POSITIVE] = 5
    """So many steps not applied among the last 100 (loss not finite, or a spike) end the run as failed."""

    def __post_init__(self) -> None:
        check_fields(self, prefix="fault.", error=ConfigError)


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """What a paid second costs."""

    usd_per_gpu_hour: Annotated[float, NOT_NEGATIVE] = 0.0
    """Price of one worker's GPU (on CPU runs: of one worker). 0: unknown."""
    price_file: str = ""
    """YAML that maps a node's `solvent-offer` Ray label to USD per GPU-hour; it wins over `usd_per_gpu_hour`."""

    def __post_init__(self) -> None:
        check_fields(self, prefix="cost.", error=ConfigError)


@dataclass(frozen=True, kw_only=True)
class BudgetConfig:
    """What a run may cost and how long it may take. `solvent plan` keeps to it, and under `solvent train` the run."""

    max_usd: Annotated[float, NOT_NEGATIVE] = 0.0
    """The run saves and leaves, resumable, before it has cost more over all its attempts, by the prices of `cost`.
    0: no limit."""
    max_hours: Annotated[float, NOT_NEGATIVE] = 0.0
    """The same for the hours since its first attempt began. 0: no limit."""
    warn_at: Annotated[float, _BUDGET_SHARE] = 0.8
    """The share of either at which it warns."""

    def __post_init__(self) -> None:
        check_fields(self, prefix="budget.", error=ConfigError)


@dataclass(frozen=True, kw_only=True)
class WandbConfig:
    """Weights & Biases. What is not set here is W&B's own environment's to say (WANDB_PROJECT, WANDB_NAME, ...)."""

    mode: Literal["auto", "offline", "online", "disabled"] = "auto"
    """auto: as WANDB_MODE or WANDB_DISABLED say, else offline, which needs no account."""
    project: str = ""
    """Empty: as WANDB_PROJECT says, else solvent."""
    entity: str = ""
    """Empty: as WANDB_ENTITY says, else the account's own."""


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """Everything that decides what a run computes, where it runs and what it leaves behind."""

    run: Annotated[str, _RUN_NAME] = "run"
    """Name of the run; training again under the same name resumes it."""
    storage: Annotated[str, _NOT_EMPTY] = "runs"
    """Parent of the run's directory: a path that all nodes see, or an object store's URL (s3://, gs://, az://)."""
    precision: Precision = "fp32"
    """Of products and activations; weights and optimizer state are fp32. fp8 (scaled per tensor) and fp8_rowwise need
    the extra `gpu`, an Ada, Hopper or newer GPU and compile=true; look at the loss: small models lose some."""
    recompute: Recompute = "none"
    """Activation checkpointing: `full` keeps only block inputs, `selective` also the costly products, `budget` what is
    worth most within `recompute_budget`. offload: as full, with the block inputs in host memory until the backward: for
    long sequences on a small GPU."""
    recompute_budget: Annotated[float, _MEMORY_SHARE] = 0.5
    """recompute=budget only: the share of the activations' memory that blocks may use. Needs compile=true."""
    strategy: str = "auto"
    """How the model is spread over the ranks: the name of a file in `elastic/strategies`. auto: whole on one rank,
    FSDP2 on more."""
    shard_size: Annotated[int, NOT_NEGATIVE] = 0
    """hsdp only: ranks that share one copy of the state; the cluster then trains on multiples of it. 0: those of one
    node, on any number of ranks."""
    deepspeed: DeepSpeedConfig = field(default_factory=DeepSpeedConfig)
    attention: Attention = "auto"
    """Back end of attention on a GPU: cuDNN, FlashAttention-2 or FlashAttention-4 (the extra `gpu`). auto: what is
    fastest for the run's shape, measured once per run and kind of GPU; name one to have it the same in all runs."""
    compile: bool = False
    """torch.compile, block by block."""
    cuda_graph: Literal["auto", "off"] = "auto"
    """auto: a model so small that launches take longer than kernels is recorded and replayed (one rank, bf16)."""
    profile_at_step: Annotated[int, NOT_NEGATIVE] = 0
    """Record `profile_steps` steps from this one on: `profile-<attempt>-<rank>.json.gz` for ui.perfetto.dev, and a .txt
    of where their time went. 0: never. Take one well after the first: it compiles."""
    profile_steps: Annotated[int, POSITIVE] = 3
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tune: Tune = "full"
    """full: all weights are trained. lora: adapters beside the frozen weights of an imported model (`solvent checkpoint
    import`), which are held in what `precision` computes with; only the adapters are saved. qlora: the same, and the
    frozen matrices of the blocks are held in 4 bits (NF4)."""
    lora: LoraConfig = field(default_factory=LoraConfig)
    model: ModelConfig = field(default_factory=build_model_config)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        plugins.check_name("elastic.strategies", self.strategy, key="strategy")
        check_fields(self, prefix="", error=ConfigError)
        most = self._ask_strategy("MAX_WORLD_SIZE")
        if most is not None and self.cluster.max_workers > most:
            raise ConfigError(
                f"strategy={self.strategy} trains on {most} rank(s) at most, but "
                f"cluster.max_workers={self.cluster.max_workers}. Set strategy=fsdp2 (or ddp), or "
                f"cluster.max_workers={most}."
            )
        if self.train.global_batch < self.cluster.max_workers:
            raise ConfigError(
                f"train.global_batch={self.train.global_batch} is smaller than "
                f"cluster.max_workers={self.cluster.max_workers}: some ranks would have no sample. "
                f"Set train.global_batch to at least {self.cluster.max_workers}, or lower cluster.max_workers."
            )
        if 0 < self.model.max_positions < self.data.seq_len:
            raise ConfigError(
                f"data.seq_len={self.data.seq_len} is longer than the model.max_positions={self.model.max_positions} "
                f"that the weights were made for. Set data.seq_len to at most {self.model.max_positions}, or "
                "model.max_positions=0 to train on longer ones on purpose."
            )
        if self.data.packing == "documents" and not self.model.separates_documents:
            raise ConfigError(
                f"data.packing=documents needs a model that keeps documents apart, and model.kind={self.model.kind} "
                "does not. Set data.packing=stream."
            )
        if self.data.packing == "documents" and self.attention not in ("auto", "flash"):
            raise ConfigError(
                f"attention={self.attention} does not keep documents apart, as data.packing=documents asks for. Set "
                "attention=auto, or data.packing=stream."
            )
        self._check_tuning()
        self._check_strategy()
        if self.shard_size and self._ask_strategy("WORLD_SIZE_MULTIPLE_OF") != "shard_size":
            raise ConfigError(
                f"shard_size={self.shard_size} is read by strategy=hsdp only, as a number of ranks, but "
                f"strategy={self.strategy}. Set strategy=hsdp with a positive shard_size, or shard_size=0."
            )
        needs_compile = (
            ("recompute", self.recompute, ("budget",)),
            ("precision", self.precision, ("fp8", "fp8_rowwise")),
        )
        for key, value, values in needs_compile:
            if value in values and not self.compile:
                raise ConfigError(
                    f"{key}={value} is the compiler's work, but compile=false. Set compile=true, or another {key}."
                )
        if self.device == "cpu" and self.cluster.gpus_per_worker:
            raise ConfigError(
                f"device=cpu would leave the GPUs of cluster.gpus_per_worker={self.cluster.gpus_per_worker} idle while "
                "they are paid for. Set device=auto, or cluster.gpus_per_worker=0."
            )

    @property
    def total_tokens(self) -> int:
        """Target tokens of the whole run; the schedule's length."""
        return self.train.steps * self.train.global_batch * self.data.seq_len

    @property
    def num_trained_params(self) -> int:
        """Parameters that updates change, and checkpoints hold with their moments."""
        if self.tune == "full":
            return self.model.num_params
        return sum(rows * columns for rows, columns in get_adapter_shapes(self.model, self.lora).values())

    @property
    def flops_per_token(self) -> float:
        """Model FLOPs of forward and backward per target token: frozen weights need no gradients of their own."""
        flops = self.model.flops_per_token(self.data.seq_len)
        if self.tune == "full":
            return flops
        return flops - 2.0 * self.model.num_matrix_params + 6.0 * self.num_trained_params

    def _check_strategy(self) -> None:
        """Refuse what the strategy's file says that it cannot do, and keys that no other strategy reads."""
        refused: Mapping[str, tuple[Any, ...]] = self._ask_strategy("CANNOT") or {}
        for key, values in refused.items():
            if getattr(self, key) in values:
                raise ConfigError(
                    f"strategy={self.strategy} cannot do {key}={getattr(self, key)}. Set strategy=fsdp2, or another "
                    f"{key}."
                )
        if self.strategy != "deepspeed" and self.deepspeed != DeepSpeedConfig():
            raise ConfigError(
                f"deepspeed.stage={self.deepspeed.stage} is read by strategy=deepspeed only, but "
                f"strategy={self.strategy}. Set strategy=deepspeed, or leave the key out."
            )

    def _check_tuning(self) -> None:
        if self.tune == "full":
            if self.lora != LoraConfig():
                raise ConfigError(
                    "lora.* is read by tune=lora and qlora only, but tune=full trains all weights. Set tune=lora, or "
                    "leave the keys of lora out."
                )
            return
        self.lora.find_targets(self.model)
        find_in_4_bits(self.model, self.tune)
        if self.tune == "lora" and self.lora.nf4_scales != LoraConfig().nf4_scales:
            raise ConfigError(
                f"lora.nf4_scales={self.lora.nf4_scales} is read by tune=qlora only. Set tune=qlora, or leave it out."
            )
        if self.precision in ("fp8", "fp8_rowwise"):
            raise ConfigError(
                f"precision={self.precision} is for training all weights; tune={self.tune} holds the frozen ones in "
                f"{'4' if self.tune == 'qlora' else '16 or 32'} bits. Set precision=bf16."
            )

    def get_world_sizes(self) -> tuple[int, ...]:
        """Return the numbers of workers that this run may train with, ascending: the strategy's file may limit them.

        Raises:
            ConfigError: the strategy can use none between `cluster.min_workers` and `cluster.max_workers`.
        """
        least, most = self.cluster.min_workers, self.cluster.max_workers
        key = self._ask_strategy("WORLD_SIZE_MULTIPLE_OF")
        unit = getattr(self, key) or 1 if key else 1
        sizes = tuple(size for size in range(least, most + 1) if size % unit == 0)
        if not sizes:
            raise ConfigError(
                f"{key}={unit} lets strategy={self.strategy} train on multiples of {unit} workers only, and none is "
                f"between cluster.min_workers={least} and cluster.max_workers={most}. "
                f"Set cluster.max_workers={math.ceil(most / unit) * unit}, or {key}=0."
            )
        return sizes

    def _ask_strategy(self, constant: str) -> Any:
        return plugins.read_constant("elastic.strategies", self.strategy, constant)


def from_dict(fields: Mapping[str, Any]) -> RunConfig:
    """Build a configuration from what `dataclasses.asdict` made of one, on this or another machine."""
    parts = {f.name: f.default_factory for f in dataclasses.fields(RunConfig) if f.default_factory is not MISSING}
    data = dict(fields.get("data", {}))
    for name, kind in (("sources", SourceConfig), ("phases", PhaseConfig)):
        data[name] = {key: kind(**value) for key, value in data.get(name, {}).items()}
    fields = {**fields, "data": data}
    return RunConfig(**{name: parts[name](**value) if name in parts else value for name, value in fields.items()})
