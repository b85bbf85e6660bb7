"""One run, described by frozen dataclasses (`config_load` reads them from YAML and `key=value` overrides).

No torch here, so that every command can check a configuration before anything slow or paid starts.
Each rule that one dataclass can check alone is in its `__post_init__`; rules over several are in `RunConfig`.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from dataclasses import MISSING, dataclass, field
from typing import Any, Literal

from elastic import plugins
from elastic.errors import ConfigError

Precision = Literal["fp32", "tf32", "bf16", "fp16", "fp8", "fp8_rowwise"]
Recompute = Literal["none", "selective", "budget", "full"]
Attention = Literal["auto", "cudnn", "flash", "fa4"]


def _require_positive(prefix: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ConfigError(
                f"{prefix}.{name}={value} must be finite and more than 0. Set {prefix}.{name} to a positive number."
            )


def _require_not_negative(prefix: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ConfigError(
                f"{prefix}.{name}={value} must be finite and not negative. Set {prefix}.{name} to 0 or more."
            )


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of a decoder; `kind` names the file in `elastic/models` that builds it."""

    kind: str = "llama"
    dim: int = 256
    num_layers: int = 4
    num_heads: int = 4
    num_kv_heads: int = 4
    ffn_dim: int = 768
    vocab_size: int = 4096
    tied_head: bool = True
    """The output projection is the embedding, transposed."""
    head_dim: int = 0
    """Size of one attention head. 0: dim / num_heads."""
    qkv_bias: bool = False
    """Queries, keys and values have a bias (Qwen2)."""
    qk_norm: bool = False
    """Each query and key head is normalised before it is turned (Qwen3)."""
    rope_theta: float = 10_000.0
    rope_scaling_factor: float = 1.0
    """Slows down the slow rotations so many times, for contexts longer than trained on (Llama 3.1: 8). 1: none."""
    rope_low_freq_factor: float = 1.0
    """Rotations that turn less than so often over `rope_original_positions` are slowed down in full."""
    rope_high_freq_factor: float = 4.0
    """Those that turn more than so often are left alone; between the two, in part."""
    rope_original_positions: int = 8192
    no_rope_layer_interval: int = 0
    """The last of every so many layers has no positions (SmolLM3: 4). 0: all layers have."""
    max_positions: int = 0
    """The longest sequence the weights were made for. 0: data.seq_len."""
    norm_eps: float = 1e-5
    init_std: float = 0.02

    def __post_init__(self) -> None:
        _require_positive(
            "model",
            dim=self.dim,
            num_layers=self.num_layers,
            num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads,
            ffn_dim=self.ffn_dim,
            vocab_size=self.vocab_size,
            rope_theta=self.rope_theta,
            rope_low_freq_factor=self.rope_low_freq_factor,
            rope_original_positions=self.rope_original_positions,
            norm_eps=self.norm_eps,
            init_std=self.init_std,
        )
        _require_not_negative(
            "model",
            head_dim=self.head_dim,
            no_rope_layer_interval=self.no_rope_layer_interval,
            max_positions=self.max_positions,
        )
        if not self.head_dim and (self.dim % self.num_heads or (self.dim // self.num_heads) % 2):
            raise ConfigError(
                f"model.dim={self.dim} cannot be cut into model.num_heads={self.num_heads} heads of an even size "
                f"(RoPE turns pairs). Set model.dim to a multiple of {2 * self.num_heads}, or set model.head_dim."
            )
        if self.head_dim % 2:
            raise ConfigError(f"model.head_dim={self.head_dim} must be even: RoPE turns pairs. Add 1 to it.")
        if self.num_heads % self.num_kv_heads:
            raise ConfigError(
                f"model.num_kv_heads={self.num_kv_heads} does not divide model.num_heads={self.num_heads}: every "
                "key/value head serves the same number of query heads. Set it to a divisor."
            )
        if not 1 <= self.rope_scaling_factor < math.inf:
            raise ConfigError(
                f"model.rope_scaling_factor={self.rope_scaling_factor} must be finite and at least 1: it "
                "makes contexts longer. Set it to 1 for none."
            )
        if not self.rope_low_freq_factor < self.rope_high_freq_factor < math.inf:
            raise ConfigError(
                f"model.rope_high_freq_factor={self.rope_high_freq_factor} must be more than "
                f"model.rope_low_freq_factor={self.rope_low_freq_factor}: between the two lies the transition. "
                "Llama 3.1 has 4 and 1."
            )
        plugins.check_name("elastic.models", self.kind, key="model.kind")

    @property
    def head_size(self) -> int:
        """Size of one attention head, as given or as it follows from `dim`."""
        return self.head_dim or self.dim // self.num_heads

    @property
    def num_matrix_params(self) -> int:
        """Parameters that take part in a matrix product: every decoder of this shape has them.

        Biases, gains and an embedding that is not tied to the head come on top; the family's file counts those.
        """
        query_dim, kv_dim = self.num_heads * self.head_size, self.num_kv_heads * self.head_size
        attention = 2 * self.dim * (query_dim + kv_dim)
        return self.num_layers * (attention + 3 * self.dim * self.ffn_dim) + self.vocab_size * self.dim


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Token shards made by `solvent prepare`."""

    path: str = ""
    """The folder that `solvent prepare --out` wrote."""
    replace: str = ""
    """Lets a run go on with other data or another tokenizer than it began with: the 16 digits that its refusal names.
    Any further change is refused again."""
    seq_len: int = 256
    """Target tokens per sample."""
    record_samples: bool = False
    """Write the ids that each rank consumed to `samples-<attempt>-<rank>.jsonl`."""
    prefetch_steps: int = 2

    def __post_init__(self) -> None:
        _require_positive("data", seq_len=self.seq_len, prefetch_steps=self.prefetch_steps)


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """How long, how much at once, and how often we look."""

    steps: int = 100
    """Optimizer updates in all; a resumed run counts those already done."""
    global_batch: int = 32
    """Samples per optimizer update, over all ranks, whatever their number."""
    micro_batch: int = 8
    """Samples per forward and backward on one rank; lower it when memory is short."""
    seed: int = 0
    eval_every_steps: int = 0
    """0: only after the last step."""
    eval_samples: int = 256
    max_grad_norm: float = 1.0

    def __post_init__(self) -> None:
        _require_positive(
            "train",
            steps=self.steps,
            global_batch=self.global_batch,
            micro_batch=self.micro_batch,
            eval_samples=self.eval_samples,
            max_grad_norm=self.max_grad_norm,
        )
        _require_not_negative("train", seed=self.seed, eval_every_steps=self.eval_every_steps)


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """AdamW, and its learning rate as a function of the tokens seen."""

    lr: float = 1e-3
    min_lr_ratio: float = 0.1
    """The last learning rate as a share of `lr`."""
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    """On matrices only; norms are not decayed."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    warmup_tokens: int = 0
    """A run that is shorter ends while it still warms up."""
    decay_tokens: int = 0
    """wsd only: length of the final decay. 0: a fifth of the run."""
    decay_shape: Literal["linear", "sqrt"] = "linear"
    """wsd only: straight down, or 1 - sqrt(x)."""

    def __post_init__(self) -> None:
        _require_positive("optim", lr=self.lr, eps=self.eps)
        _require_not_negative(
            "optim",
            weight_decay=self.weight_decay,
            warmup_tokens=self.warmup_tokens,
            decay_tokens=self.decay_tokens,
        )
        for name, value in (("beta1", self.beta1), ("beta2", self.beta2)):
            if not 0 <= value < 1:
                raise ConfigError(
                    f"optim.{name}={value} must be at least 0 and below 1: it weights a running mean. "
                    f"Try optim.{name}={getattr(type(self), name)}."
                )
        if not 0 <= self.min_lr_ratio <= 1:
            raise ConfigError(
                f"optim.min_lr_ratio={self.min_lr_ratio} must be between 0 and 1: it is a share of optim.lr. "
                "Try optim.min_lr_ratio=0.1."
            )
        if self.decay_tokens and self.schedule != "wsd":
            raise ConfigError(
                f"optim.decay_tokens={self.decay_tokens} is not read by optim.schedule={self.schedule}, which decays "
                "over the whole run. Set optim.schedule=wsd, or optim.decay_tokens=0."
            )


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When state is put where a loss does not reach it, and how much of it is kept."""

    every_steps: int = 50
    """Optimizer steps between two durable checkpoints. 0: planned from what a save was measured to cost and from the
    losses so far (Young, Daly)."""
    longest_s: float = 1800.0
    """A planned interval is never longer."""
    keep_last: int = 3
    memory: Literal["peer", "node", "off"] = "peer"
    """Under `solvent train`, snapshots are also kept in host memory, where they outlive the trainer: on its node, and
    as a copy on another one (peer). Each node then holds at most five shards of a worker per worker, or
    fewer where it has less room."""
    memory_every_steps: int = 0
    """Optimizer steps between two snapshots. 0: planned, as above; at every step if they cost nothing."""
    node_disk: str = ""
    """Under `solvent train`, a folder on a disk of each node's own: now and then a snapshot goes there too, for the day
    on which the memories of all nodes are lost at once. Empty: none does."""
    node_disk_every_s: float = 60.0
    """Seconds between two of them, at least."""
    max_failed_saves: int = 5
    """Training goes on without a save that failed; after so many in a row the run ends, resumable."""

    def __post_init__(self) -> None:
        _require_positive(
            "checkpoint", longest_s=self.longest_s, keep_last=self.keep_last, max_failed_saves=self.max_failed_saves
        )
        _require_not_negative(
            "checkpoint",
            every_steps=self.every_steps,
            memory_every_steps=self.memory_every_steps,
            node_disk_every_s=self.node_disk_every_s,
        )
        if self.node_disk and not self.node_disk.startswith("/"):
            raise ConfigError(
                f"checkpoint.node_disk={self.node_disk!r} must be an absolute path, the same on every node: it is a "
                "folder on a disk of the node's own. What all nodes share belongs into storage."
            )
        if self.node_disk and self.memory == "off":
            raise ConfigError(
                f"checkpoint.node_disk={self.node_disk!r} needs snapshots, and checkpoint.memory=off makes none. Set "
                "checkpoint.memory=node or peer, or leave node_disk out."
            )


@dataclass(frozen=True, kw_only=True)
class ClusterConfig:
    """The workers we want; each is one GPU (or, without GPUs, `cpus_per_worker` cores)."""

    min_workers: int = 1
    max_workers: int = 1
    gpus_per_worker: int = 0
    cpus_per_worker: int = 1
    threads_per_worker: int = 1
    """Intra-op threads of a trainer; on a GPU node 1 is enough."""
    spare_trainers: bool = True
    """Where code is compiled, keep a second process per GPU that is ready when the one that trains dies; takes some
    0.7 GiB of the GPU's memory."""
    notices: str = "auto"
    """Whose notices of preemption the nodes read: auto (whatever they find they are), off, or a provider (`solvent
    doctor` lists them)."""

    def __post_init__(self) -> None:
        _require_positive(
            "cluster",
            min_workers=self.min_workers,
            cpus_per_worker=self.cpus_per_worker,
            threads_per_worker=self.threads_per_worker,
        )
        if self.min_workers > self.max_workers:
            raise ConfigError(
                f"cluster.min_workers={self.min_workers} is more than cluster.max_workers={self.max_workers}: no world "
                "could be both. Lower the first or raise the second."
            )
        if self.gpus_per_worker not in (0, 1):
            raise ConfigError(
                f"cluster.gpus_per_worker={self.gpus_per_worker} must be 0 (CPU) or 1: every GPU has a trainer of its "
                "own. Raise cluster.max_workers to use more GPUs."
            )


@dataclass(frozen=True, kw_only=True)
class FaultConfig:
    """How long we wait before calling a peer dead, and when we stop trying."""

    collective_timeout_s: float = 120.0
    """A collective slower than this means a peer is gone."""
    lease_s: float = 120.0
    """A trainer that a whole group of Ray Train's has left out ends after this, and so does what the end of its cluster
    has left on a node; another driver or coordinator is waited for half as long. Forming a group may take longer."""
    max_failures_without_progress: int = 3
    """The run ends as failed once the same step has failed in so many attempts in a row, over all submissions."""
    max_node_failures: int = 3
    """A node is left out for the rest of the run once so many attempts in a row fell to trainers of its own."""
    mean_hours_between_losses: float = 1.0
    """How often a run of all nodes is taken to lose one without notice, until more is known; planned intervals of
    snapshots and checkpoints follow from it."""
    save_margin: float = 2.0
    """With notice we leave at once, without a save, when less than this times the usual save is left."""
    term_grace_s: float = 0.0
    """Seconds from SIGTERM, or from a notice that names no time, to the end of the machine. 0: what its provider
    usually grants; `python -m elastic` is then in no hurry."""
    leave_before_s: float = 600.0
    """A notice makes a node leave when this is left of it; until then it trains on (maintenance is told days ahead)."""
    hang_factor: float = 5.0
    """A phase of training is hung once it has taken longer than its limit below and than this times its usual duration.
    0: nothing is ever called hung."""
    hang_step_s: float = 10.0
    """Forward, backward and update."""
    hang_first_step_s: float = 900.0
    """The first step of an attempt, which may compile."""
    hang_data_s: float = 30.0
    """Waiting for the next batch, and telling the last step. `python -m elastic` also grants it to a rank that waits in
    a collective: its peers may be at this."""
    hang_eval_s: float = 300.0
    hang_save_s: float = 600.0
    """The part of a save that training waits for."""
    hang_load_s: float = 900.0
    """From the start of an attempt to its first batch."""
    silent_s: float = 10.0
    """A trainer that has not given a sign of life (one a second) for so long is frozen, and is killed."""
    spike_threshold: float = 20.0
    """A step whose loss lies so many robust standard deviations, and 3 nats, above the recent median is not applied.
    0: off."""
    max_bad_steps: int = 5
    """So many steps not applied among the last 100 (loss not finite, or a spike) end the run as failed."""

    def __post_init__(self) -> None:
        _require_not_negative(
            "fault",
            term_grace_s=self.term_grace_s,
            hang_factor=self.hang_factor,
            spike_threshold=self.spike_threshold,
        )
        _require_positive(
            "fault",
            hang_step_s=self.hang_step_s,
            hang_first_step_s=self.hang_first_step_s,
            hang_data_s=self.hang_data_s,
            hang_eval_s=self.hang_eval_s,
            hang_save_s=self.hang_save_s,
            hang_load_s=self.hang_load_s,
            silent_s=self.silent_s,
            max_bad_steps=self.max_bad_steps,
            collective_timeout_s=self.collective_timeout_s,
            lease_s=self.lease_s,
            max_failures_without_progress=self.max_failures_without_progress,
            max_node_failures=self.max_node_failures,
            mean_hours_between_losses=self.mean_hours_between_losses,
            save_margin=self.save_margin,
            leave_before_s=self.leave_before_s,
        )


@dataclass(frozen=True, kw_only=True)
class CostConfig:
    """What a paid second costs."""

    usd_per_gpu_hour: float = 0.0
    """Price of one worker's GPU (on CPU runs: of one worker). 0: unknown."""
    price_file: str = ""
    """YAML that maps a node's `solvent-offer` Ray label to USD per GPU-hour; it wins over `usd_per_gpu_hour`."""

    def __post_init__(self) -> None:
        _require_not_negative("cost", usd_per_gpu_hour=self.usd_per_gpu_hour)


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

    run: str = "run"
    """Name of the run; training again under the same name resumes it."""
    storage: str = "runs"
    """Parent of the run's directory: a path that all nodes see, or an object store's URL (s3://, gs://, az://)."""
    precision: Precision = "fp32"
    """Of products and activations; weights and optimizer state are fp32. fp8 (scaled per tensor) and fp8_rowwise need
    the extra `gpu`, an Ada, Hopper or newer GPU and compile=true; look at the loss: small models lose some."""
    recompute: Recompute = "none"
    """Activation checkpointing: `full` keeps only block inputs, `selective` also the costly products, `budget` what is
    worth most within `recompute_budget`."""
    recompute_budget: float = 0.5
    """recompute=budget only: the share of the activations' memory that blocks may use. Needs compile=true."""
    strategy: str = "auto"
    """How the model is spread over the ranks: the name of a file in `elastic/strategies`. auto: whole on one rank,
    FSDP2 on more."""
    shard_size: int = 0
    """hsdp only: ranks that share one copy of the state; the cluster then trains on multiples of it. 0: those of one
    node, on any number of ranks."""
    attention: Attention = "auto"
    """Back end of attention on a GPU: cuDNN, FlashAttention-2 or FlashAttention-4 (the extra `gpu`). auto: what is
    fastest for the run's shape, measured once per run and kind of GPU; name one to have it the same in all runs."""
    compile: bool = False
    """torch.compile, block by block."""
    cuda_graph: Literal["auto", "off"] = "auto"
    """auto: a model so small that launches take longer than kernels is recorded and replayed (one rank, bf16)."""
    profile_at_step: int = 0
    """Record `profile_steps` steps from this one on: `profile-<attempt>-<rank>.json.gz` for ui.perfetto.dev, and a .txt
    of where their time went. 0: never. Take one well after the first: it compiles."""
    profile_steps: int = 3
    device: Literal["auto", "cpu", "cuda"] = "auto"
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    cluster: ClusterConfig = field(default_factory=ClusterConfig)
    fault: FaultConfig = field(default_factory=FaultConfig)
    cost: CostConfig = field(default_factory=CostConfig)
    wandb: WandbConfig = field(default_factory=WandbConfig)

    def __post_init__(self) -> None:
        plugins.check_name("elastic.strategies", self.strategy, key="strategy")
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", self.run):
            raise ConfigError(
                f"run={self.run!r} names a directory, an object-store prefix and a W&B run: letters, digits, dot, dash "
                "and underscore only, and no leading dot or dash. Try run=my-run."
            )
        if not self.storage:
            raise ConfigError("storage='' leaves no place for the run's directory. Set storage=runs.")
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
        if self.shard_size < 0 or (self.shard_size and self._ask_strategy("WORLD_SIZE_MULTIPLE_OF") != "shard_size"):
            raise ConfigError(
                f"shard_size={self.shard_size} is read by strategy=hsdp only, as a number of ranks, but "
                f"strategy={self.strategy}. Set strategy=hsdp with a positive shard_size, or shard_size=0."
            )
        if self.profile_at_step < 0 or self.profile_steps < 1:
            raise ConfigError(
                f"profile_at_step={self.profile_at_step} with profile_steps={self.profile_steps} records nothing. Set "
                "profile_at_step to a step (0: never) and profile_steps to 1 or more."
            )
        if not 0 < self.recompute_budget <= 1:
            raise ConfigError(
                f"recompute_budget={self.recompute_budget} must be more than 0 and at most 1: it is a share of the "
                "memory that recompute=none uses. Try recompute_budget=0.5."
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
    return RunConfig(**{name: parts[name](**value) if name in parts else value for name, value in fields.items()})
