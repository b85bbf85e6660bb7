"""The training loop: batch, step, count, maybe evaluate, maybe save, maybe leave. Plain code, top to bottom."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from elastic import interrupt, metrics
from elastic.checkpoint.save import Checkpointer
from elastic.config import RunConfig
from elastic.data.loader import Loader
from elastic.optim import learning_rate
from elastic.ports import (
    Finished,
    Interrupted,
    MetricSink,
    Notice,
    NoticeSource,
    Observer,
    Outcome,
    Phase,
    Progress,
)
from elastic.step import StepResult, Trainable, eval_loss, train_step
from elastic.world import World


class SampleRecorder(Protocol):
    """Notes which samples a rank consumed."""

    def __call__(self, *, step: int, sample_ids: tuple[int, ...]) -> None:
        """Take the samples of one applied step."""
        ...


@dataclass(frozen=True, kw_only=True)
class Parts:
    """What the loop works with; `run.train` puts it together."""

    config: RunConfig
    world: World
    trainable: Trainable
    loader: Loader
    eval_microbatches: Sequence[tuple[Tensor, Tensor]]
    checkpointer: Checkpointer
    flops_per_token: float
    peak_flops_per_gpu: float | None
    sinks: Sequence[MetricSink]
    """Of rank 0; the other ranks have none."""
    notices: NoticeSource
    observer: Observer
    record_samples: SampleRecorder


class Timeline:
    """Cuts this rank's time into phases that follow each other without a gap."""

    def __init__(self, observer: Observer, *, start_s: float) -> None:
        self._observer = observer
        self._last_s = start_s

    def mark(self, phase: Phase) -> float:
        """Book the time since the last mark; return it in seconds."""
        now_s = time.time()
        start_s, self._last_s = self._last_s, now_s
        self._observer.phase(phase, start_s, now_s)
        return now_s - start_s


def run_loop(parts: Parts, progress: Progress, timeline: Timeline) -> Outcome:
    """Train from `progress` to the last step, or until all ranks agree to leave.

    Raises:
        StepError: a step is not finite; all ranks raise it.
        StorageError, CheckpointError: a checkpoint failed; all ranks raise it.
    """
    config, checkpointer = parts.config, parts.checkpointer
    timeline.mark("load")
    for step, batch in parts.loader:
        wait_s = timeline.mark("data")
        notice = parts.notices.get_notice()
        step_tokens = config.train.global_batch * config.data.seq_len
        lr = learning_rate(config.optim, progress.tokens + step_tokens, config.total_tokens)
        result = train_step(
            parts.trainable,
            batch.microbatches,
            lr=lr,
            max_grad_norm=config.train.max_grad_norm,
            world=parts.world,
            notice=notice is not None,
            before_update=checkpointer.wait_staged,
        )
        progress = Progress(step=step + 1, tokens=progress.tokens + result.target_tokens)
        parts.record_samples(step=progress.step, sample_ids=batch.sample_ids)
        step_s = wait_s + timeline.mark("train")

        val_loss = None
        if is_due(progress.step, config.train.eval_every_steps) or progress.step == config.train.steps:
            val_loss = eval_loss(parts.trainable, parts.eval_microbatches, parts.world)
            timeline.mark("eval")
        report(parts, progress, result, lr=lr, step_s=step_s, val_loss=val_loss)

        decision = decide_for_all(parts, notice, result)
        if decision == "leave_now":
            return Interrupted(progress=progress, reason="no time to save")
        if decision == "save_and_leave" or progress.step == config.train.steps:
            save(parts, progress, wait=True)
            timeline.mark("save")
        elif is_due(progress.step, config.checkpoint.every_steps):
            save(parts, progress, wait=False)
            timeline.mark("save")
        else:
            checkpointer.poll()
        if decision == "save_and_leave" and progress.step < config.train.steps:
            return Interrupted(progress=progress, reason=notice.source if notice else "a peer leaves")
    return Finished(progress=progress)


def is_due(step: int, every_steps: int) -> bool:
    """Tell whether something that happens every so many steps (0: never) happens after this step."""
    return every_steps > 0 and step % every_steps == 0


def report(
    parts: Parts, progress: Progress, result: StepResult, *, lr: float, step_s: float, val_loss: float | None
) -> None:
    """Tell a finished step to whoever watches."""
    row = metrics.build_row(
        progress,
        loss=result.loss,
        grad_norm=result.grad_norm,
        lr=lr,
        step_s=step_s,
        step_tokens=result.target_tokens,
        flops_per_token=parts.flops_per_token,
        peak_flops_per_gpu=parts.peak_flops_per_gpu,
        world_size=parts.world.world_size,
        attempt=parts.world.attempt,
        memory_gib=metrics.get_memory_gib(parts.world.device),
        now_s=time.time(),
        val_loss=val_loss,
    )
    for sink in parts.sinks:
        sink.write(row)
    parts.observer.stepped(progress, row)


def decide_for_all(parts: Parts, notice: Notice | None, result: StepResult) -> interrupt.Decision:
    """Weigh the notices of all ranks; without any, which `result.notice` tells for free, nothing is exchanged."""
    if not result.notice:
        return "continue"
    deadline_s = notice.deadline_s if notice and notice.deadline_s is not None else float("inf")
    nearest = torch.tensor(deadline_s - time.time(), dtype=torch.float64, device=parts.world.device)
    return interrupt.decide(
        has_notice=True,
        seconds_left=parts.world.min_(nearest).item(),
        usual_save_s=parts.checkpointer.usual_save_s or 0.0,
        margin=parts.config.fault.save_margin,
    )


def save(parts: Parts, progress: Progress, *, wait: bool) -> None:
    """Begin a checkpoint of the state as it is now; with `wait`, return when it is committed."""
    extra = {"scaler": parts.trainable.scaler.state_dict()}
    start = parts.checkpointer.save_now if wait else parts.checkpointer.start_save
    start(parts.trainable.model, parts.trainable.optimizer, progress=progress, extra=extra)
