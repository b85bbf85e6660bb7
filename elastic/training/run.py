"""The composition root of a trainer: a configuration and a place in a world become parts, a loop and an outcome."""

import logging
import re
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from time import time
from typing import TypedDict, cast

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from elastic.breaker import Breaker
from elastic.checkpoint.checkpointer import Checkpointer
from elastic.checkpoint.durable.storage_errors import explain
from elastic.checkpoint.restore.base import load_base
from elastic.checkpoint.restore.first_weights import check_first_weights
from elastic.checkpoint.restore.load import restore
from elastic.checkpoint.tiers.memory_budget import agree_on_memory_budget
from elastic.checkpoint.tiers.trainer_memory import Memory
from elastic.config import RunConfig
from elastic.data.corpus import Corpus, describe_epochs, open_corpus
from elastic.data.kept import keep_data, share_indices
from elastic.data.loader import Loader, eval_batches
from elastic.errors import DataError, StaleGenerationError
from elastic.mixture import describe_paths
from elastic.nn.attention import agree_on_attention
from elastic.nn.layers import init_weights
from elastic.ports import DataIdentity, Lost, MetricSink, NoticeSource, Observer, Outcome, Progress, Source, WorldSpec
from elastic.records.fencing import GenerationGuard, check_generation
from elastic.records.spool import OpenRun, open_run
from elastic.stopwatch import Stopwatch
from elastic.storage import Storage
from elastic.training.loop import Parts, SampleRecorder, run_loop
from elastic.training.metrics import get_peak_flops
from elastic.training.profile import Profiler
from elastic.training.shared_storage import StorageCheck
from elastic.training.spikes import Recent
from elastic.training.step import build_trainable
from elastic.training.timeline import Timeline
from elastic.training.watchdog import Watchdog
from elastic.world import World, close_world, get_device, open_world

log = logging.getLogger(__name__)


def train(
    config: RunConfig,
    spec: WorldSpec,
    *,
    notices: NoticeSource,
    observer: Observer,
    open_sinks: Callable[[], Sequence[MetricSink]],
    store: Store | None = None,
    run: OpenRun | None = None,
    memory: Memory | None = None,
    breaker: Breaker | None = None,
) -> Outcome:
    """Train one rank of one world: from the newest state there is until finished, interrupted or lost.

    Args:
        open_sinks: where rank 0's rows go; called there once data, storage and checkpoints were found good. The
            caller closes what it opened.
        store: the rendezvous store, if this process holds it; else that of `spec` is used.
        run: the run's storage and directory, if the caller has opened them.
        memory: where snapshots are kept beyond the life of this process.
        breaker: with it another thread may end the world; that is `Lost`, like the loss of a peer. So is the end of
            the generation, then: the caller that holds the breaker decides what comes next.

    Raises:
        UserError: configuration, data or storage cannot work; all ranks raise it or are ended by the one that does.
        StepError, CheckpointError: training cannot go on; all ranks raise it.
    """
    timeline, stopwatch = Timeline(observer, phase="load", start_s=time()), Stopwatch()
    progress, is_led, breaker = Progress(), breaker is not None, breaker or Breaker()
    with (
        nullcontext(run) if run else open_run(config.storage, config.run) as opened,
        Watchdog(timeline, observer, fault=config.fault),
    ):
        world = None
        try:
            if memory:
                memory.finish_trailing()
                stopwatch.lap("snapshot")
            presence = breaker.arm(get_device(config.device, local_rank=spec.local_rank))
            timeout_s = config.fault.collective_timeout_s
            world = open_world(spec, device=config.device, timeout_s=timeout_s, store=store, presence=presence)
            stopwatch.lap("the world")
            sinks_of_rank = open_sinks if world.rank == 0 else list[MetricSink]
            watchers = _Watchers(notices=notices, observer=observer, open_sinks=sinks_of_rank)
            built = _build_parts(config, opened, world, watchers, memory=memory, spec=spec, stopwatch=stopwatch)
            with built as (parts, progress, recent):
                if world.rank == 0:
                    log.info("world of %d ready: %s", world.world_size, stopwatch)
                try:
                    outcome = run_loop(parts, progress, recent, timeline)
                finally:
                    stopwatch.start()
        except StaleGenerationError as error:
            if not is_led:
                raise
            outcome = Lost(progress=progress, reason=str(error))
        except Exception as error:
            if not breaker.is_broken and not (isinstance(error, RuntimeError) and is_peer_loss(error)):
                raise
            outcome = Lost(progress=progress, reason=explain_peer_loss(error))
        finally:
            stopwatch.lap("model")
            breaker.disarm()
            stopwatch.lap("breaker")
        if world is not None:
            close_world(world, peers="lost" if isinstance(outcome, Lost) else "alive")
            stopwatch.lap("the world")
            log.info("world of %d left: %s", world.world_size, stopwatch)
    return outcome


@dataclass(frozen=True, kw_only=True)
class _Watchers:
    notices: NoticeSource
    observer: Observer
    open_sinks: Callable[[], Sequence[MetricSink]]


class _Place(TypedDict):
    """A rank's share of the data."""

    rank: int
    world_size: int
    device: torch.device


@contextmanager
def _build_parts(
    config: RunConfig,
    run: OpenRun,
    world: World,
    watchers: _Watchers,
    *,
    memory: Memory | None,
    spec: WorldSpec,
    stopwatch: Stopwatch,
) -> Generator[tuple[Parts, Progress, Recent]]:
    """Build data, model and checkpointer, restore the newest state, and take it all down again."""
    corpus = open_corpus(config)
    corpus.check_fits()
    data = corpus.identity
    _check_same_data(data, config, world)
    stopwatch.lap("data")
    with StorageCheck(run.storage, config, world) as check:
        agree_on_attention(config, world.device, run.storage)
        trainable = build_trainable(config, world, first_weights="undefined")
        stopwatch.lap("model")
        check.agree()
    _share_indices(run.storage, corpus, world)
    stopwatch.lap("storage")
    if config.tune != "full":
        load_base(run.storage, trainable.model, device=world.device)
        stopwatch.lap("frozen weights")
    restored = restore(
        run.storage,
        trainable.model,
        trainable.optimizer,
        config=config,
        device=world.device,
        data=data,
        memory=memory,
        replica_servers=spec.replica_servers,
    )
    if world.rank == 0:
        _keep_data(run.storage, corpus)
        _tell_data(config, corpus)
    progress, recent, source = Progress(), Recent(), cast(Source, "scratch")
    if restored is None:
        check_first_weights(run.storage)
        init_weights(trainable.model, seed=config.train.seed, std=config.model.init_std)
    else:
        progress, recent = restored.progress, Recent(**restored.extra.get("recent", {}))
        if scaler_state := restored.extra.get("scaler"):  # without one: imported, or not in fp16 until now
            trainable.scaler.load_state_dict(scaler_state)
        source = restored.source
    restored_index = None
    if memory and restored:
        memory.retire(before_generation=world.attempt, keep_step=progress.step)
        restored_index = memory.find_index(generation=restored.generation, step=progress.step)
    watchers.observer.restored(progress, source)
    stopwatch.lap(f"state ({source})")

    place = _Place(rank=world.rank, world_size=world.world_size, device=world.device)
    guard = GenerationGuard(partial(check_generation, run.storage, world.attempt))
    checkpointer = Checkpointer(
        run.storage,
        config,
        device=world.device,
        generation=world.attempt,
        start=progress,
        check_generation=guard.check,
        before_commit=run.push,
        on_committed=watchers.observer.committed,
        on_kept=watchers.observer.kept,
        memory=agree_on_memory_budget(memory, config, world, begins=restored is None),
        peer=spec.peer,
        restored_index=restored_index,
        mean_s_between_losses=spec.mean_s_between_losses,
        data=data,
    )
    if restored:
        checkpointer.plan_ahead(restored.live, trainable.optimizer)
    with ExitStack() as stack:
        stack.callback(stopwatch.lap, "saves")
        stack.callback(checkpointer.close)
        profiler = Profiler(
            at_step=config.profile_at_step,
            num_steps=config.profile_steps,
            device=world.device,
            path=run.dir.profile(attempt=world.attempt, rank=world.rank),
        )
        stack.callback(profiler.close)
        stack.callback(stopwatch.lap, "data")
        loader = stack.enter_context(Loader(corpus, start_step=progress.step, **place))
        stopwatch.lap("saves and data")
        yield (
            Parts(
                config=config,
                world=world,
                trainable=trainable,
                loader=loader,
                eval_microbatches=[m for b in eval_batches(corpus, **place) for m in b.microbatches],
                checkpointer=checkpointer,
                restored_from=source,
                target_share=corpus.target_share,
                flops_per_token=config.flops_per_token,
                peak_flops_per_gpu=_get_peak_flops(world.device),
                sinks=[run.fence(sink, guard) for sink in watchers.open_sinks()],
                notices=watchers.notices,
                observer=watchers.observer,
                record_samples=_build_recorder(run, config, world),
                profiler=profiler,
                record_bad_step=partial(run.append, run.dir.bad_steps),
            ),
            progress,
            recent,
        )


def _check_same_data(data: DataIdentity, config: RunConfig, world: World) -> None:
    """Make sure that `data.path` leads all ranks to the same data.

    Raises:
        DataError: it does not; on all ranks.
    """
    seen = torch.zeros(world.world_size, dtype=torch.int64, device=world.device)
    seen[world.rank] = int(data.name[:15], 16)
    names: list[int] = world.sum_(seen).tolist()
    other = next((rank for rank, name in enumerate(names) if name != names[0]), None)
    if other is not None:
        raise DataError(
            f"{describe_paths(config.data)} holds other data on the node of rank {other} than on that of rank 0 (this "
            f"is rank {world.rank}, with {data.train_tokens:,} training tokens on node {world.node}). Copy the same "
            "prepared folder to all nodes, or put it where all see it."
        )


def _share_indices(storage: Storage, corpus: Corpus, world: World) -> None:
    try:
        share_indices(storage, corpus, role="keeps" if world.rank == 0 else "reads")
    except OSError as error:
        raise explain(error, storage.url) from error


def _tell_data(config: RunConfig, corpus: Corpus) -> None:
    log.info("data: %s", describe_epochs(corpus.plan_epochs()))
    if config.train.eval_every_steps and not corpus.has_validation:
        log.warning(
            "train.eval_every_steps=%d has no effect: %s was prepared without validation",
            *(config.train.eval_every_steps, describe_paths(config.data)),
        )


def _keep_data(storage: Storage, corpus: Corpus) -> None:
    try:
        keep_data(storage, corpus)
    except OSError as error:
        raise explain(error, storage.url) from error


def _get_peak_flops(device: torch.device) -> float | None:
    return get_peak_flops(torch.cuda.get_device_name(device)) if device.type == "cuda" else None


def _build_recorder(run: OpenRun, config: RunConfig, world: World) -> SampleRecorder:
    path = run.dir.samples(attempt=world.attempt, rank=world.rank)

    def record(*, step: int, sample_ids: tuple[int, ...]) -> None:
        if config.data.record_samples:
            run.append(path, {"step": step, "ids": sample_ids})

    return record


_LOST_PEER = re.compile(r"gloo|NCCL|connection (was )?(closed|reset)|broken pipe", re.IGNORECASE)
_SOURCE_LINE = re.compile(r"^(\[[^\]]*:\d+\] *)+")


def is_peer_loss(error: RuntimeError) -> bool:
    """Tell whether a collective failed because another rank is gone; gloo says so in plain RuntimeErrors."""
    return isinstance(error, dist.DistError) or bool(_LOST_PEER.search(str(error)))


def explain_peer_loss(error: Exception) -> str:
    """Return one line for people: what it means, then the library's words without its own source lines."""
    words = _SOURCE_LINE.sub("", (str(error).splitlines() or [type(error).__name__])[0])
    what = "a peer did not answer" if "timed out" in words.lower() else "a peer went away"
    return f"{what} ({words[:200]})"
