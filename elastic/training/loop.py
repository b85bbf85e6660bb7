"""The training loop: batch, step, count, maybe evaluate, maybe save, maybe leave. Plain code, top to bottom."""

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal, Protocol

from elastic.checkpoint.checkpointer import Checkpointer
from elastic.config import RunConfig
from elastic.data.loader import Loader
from elastic.errors import StepError
from elastic.nn.loss import Microbatch
from elastic.optim.lr_schedule import learning_rate
from elastic.ports import Finished, Interrupted, MetricSink, Notice, NoticeSource, Observer, Outcome, Progress, Source
from elastic.records.rundir import format_utc
from elastic.training import interrupt, metrics, spikes
from elastic.training.profile import Profiler
from elastic.training.step import Abandoned, StepResult, Trainable, eval_loss, train_step
from elastic.training.timeline import Timeline
from elastic.world import World

log = logging.getLogger(__name__)

Due = Literal["memory", "storage", "hand_over", "now", "last"]
"""A save: in the background, to memory or to the storage; for the next world; now; or until it is committed."""


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
    eval_microbatches: Sequence[Microbatch]
    checkpointer: Checkpointer
    restored_from: Source
    target_share: float
    """How much of all labels is no padding."""
    flops_per_token: float
    peak_flops_per_gpu: float | None
    sinks: Sequence[MetricSink]
    """Of rank 0; the other ranks have none."""
    notices: NoticeSource
    observer: Observer
    record_samples: SampleRecorder
    profiler: Profiler
    record_bad_step: Callable[[Mapping[str, object]], None]
    """Takes the row of `bad_steps.jsonl`; called on rank 0."""


def run_loop(parts: Parts, progress: Progress, recent: spikes.Recent, timeline: Timeline) -> Outcome:
    """Train from `progress` to the last step, or until all ranks agree to leave.

    Args:
        recent: what the first step is judged by.

    Raises:
        StepError: too many steps were bad; all ranks raise it.
        StorageError, CheckpointError: no more checkpoints can be made; all ranks raise it.
    """
    config, checkpointer, restored = parts.config, parts.checkpointer, progress
    timeline.begin("data")
    for step, batch in parts.loader:
        wait_s = timeline.begin("train")
        parts.profiler.advance(step + 1)
        step_tokens = parts.target_share * config.train.global_batch * config.data.seq_len
        total_tokens = parts.target_share * config.total_tokens
        lr = learning_rate(config.optim, progress.tokens + step_tokens, total_tokens)
        result = train_step(
            parts.trainable,
            batch.microbatches,
            lr=lr,
            max_grad_norm=config.train.max_grad_norm,
            world=parts.world,
            get_wish=partial(get_wish, parts, timeline),
            judge_step=partial(spikes.judge, recent, threshold=config.fault.spike_threshold),
            before_update=checkpointer.wait_staged,
        )
        if isinstance(result, Abandoned):
            if result.decision == "leave_now":
                return leave(parts, progress, "no time to save")
            if progress != restored or is_only_in_memory(parts.restored_from, result.decision):
                timeline.begin("save")
                save(parts, progress, recent, how=get_way_out(result.decision))
            return leave(parts, progress, "no time to finish a step")

        is_bad = result.verdict in ("not_finite", "spike")
        progress = Progress(step=step + 1, tokens=progress.tokens + (0 if is_bad else result.target_tokens))
        is_last, is_leaving = progress.step == config.train.steps, result.decision not in interrupt.STAY
        is_eval_due = is_last or (is_due(progress.step, config.train.eval_every_steps) and not is_leaving)
        is_eval_due = is_eval_due and bool(parts.eval_microbatches)  # of all ranks or none
        step_s = wait_s + timeline.begin("eval" if is_eval_due else "data")
        val_loss = eval_loss(parts.trainable, parts.eval_microbatches, parts.world) if is_eval_due else None
        report(parts, progress, result, lr=lr, step_s=step_s, val_loss=val_loss)
        if is_bad:
            report_bad_step(parts, progress, recent, result)
        else:
            parts.record_samples(step=progress.step, sample_ids=batch.sample_ids)
        recent = spikes.remember(recent, step=progress.step, loss=result.loss, verdict=result.verdict)
        raise_if_too_many_are_bad(recent, config.fault.max_bad_steps)

        if result.decision == "leave_now":
            return leave(parts, progress, "no time to save")
        due = "last" if is_last else get_due(parts, progress, result.decision)
        if due:
            timeline.begin("save")
            is_saved = save(parts, progress, recent, how=due)
            timeline.begin("data")
        else:
            is_saved = False
            checkpointer.poll()
        if is_leaving and not is_last:
            return leave(parts, progress, "" if is_saved else "its save failed")
    return Finished(progress=progress)


def is_due(step: int, every_steps: int) -> bool:
    """Tell whether something that happens every so many steps (0: never) happens after this step."""
    return every_steps > 0 and step % every_steps == 0


def report(
    parts: Parts, progress: Progress, result: StepResult, *, lr: float, step_s: float, val_loss: float | None
) -> None:
    """Tell a finished step to sinks and observer."""
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
        bad_step=None if result.verdict in ("good", "overflow") else result.verdict,
        val_loss=val_loss,
        unkept_steps=parts.checkpointer.forecast.get_unkept_steps(progress.step),
    )
    for sink in parts.sinks:
        sink.write(row)
    parts.observer.stepped(progress, row)


def report_bad_step(parts: Parts, progress: Progress, recent: spikes.Recent, result: StepResult) -> None:
    """Write down a step that was not applied, with the samples of all ranks in it."""
    if parts.world.rank != 0:
        return
    limit = spikes.get_limit(recent.losses, threshold=parts.config.fault.spike_threshold)
    log.warning(
        "step %d is %s (loss=%g, gradient norm=%g, limit %g) and was not applied; bad_steps.jsonl has its samples",
        *(progress.step, result.verdict.replace("_", " "), result.loss, result.grad_norm, limit),
    )
    parts.record_bad_step(
        {
            "step": progress.step,
            "attempt": parts.world.attempt,
            "reason": result.verdict,
            "loss": result.loss,
            "grad_norm": result.grad_norm,
            "limit": limit,
            "sample_ids": parts.loader.get_sample_ids(progress.step - 1),
            "time_utc": format_utc(time.time()),
        }
    )


def raise_if_too_many_are_bad(recent: spikes.Recent, max_bad_steps: int) -> None:
    """End a run that only wastes money.

    Raises:
        StepError: the limit is reached.
    """
    if recent.bad_steps and len(recent.bad_steps) >= max_bad_steps:
        raise StepError(
            f"steps {', '.join(map(str, recent.bad_steps))} of the last {spikes.WINDOW_STEPS} had a loss or gradient "
            "norm that is not finite, or a loss far above the recent ones, and none was applied "
            f"(fault.max_bad_steps={max_bad_steps}). bad_steps.jsonl has the values and samples. Look at these "
            "samples, lower optim.lr (with precision=fp16 try bf16), or start again from an older checkpoint; "
            "fault.spike_threshold=0 applies spikes."
        )


def get_wish(parts: Parts, timeline: Timeline, when: Literal["start", "end"]) -> interrupt.Decision:
    """Return what this rank's notice, if it has one, wants all ranks to do at the start or end of a step."""
    notice = parts.notices.get_notice()
    if notice is None:
        return "continue"
    usual_step_s, forecast = timeline.get_usual_s("train"), parts.checkpointer.forecast
    return interrupt.decide(
        seconds_left=get_seconds_left(notice),
        rest_of_step_s=0.0 if when == "end" else float("inf") if usual_step_s is None else usual_step_s,
        save_s=estimate_save_s(parts, notice.keep_in),
        margin=parts.config.fault.save_margin,
        copy_s=forecast.estimate_copy_s(),
        keep_in=notice.keep_in,
        is_snapshotting=forecast.is_snapshotting,
    )


def get_seconds_left(notice: Notice) -> float:
    """Return how long this node will be there; infinite for a planned change."""
    return float("inf") if notice.deadline_s is None else notice.deadline_s - time.time()


def needs_copies(parts: Parts) -> bool:
    """Tell whether this rank's part of a state that is handed over must be copied to another node as well."""
    notice = parts.notices.get_notice()
    return notice is not None and interrupt.needs_copies(
        seconds_left=get_seconds_left(notice),
        save_s=parts.checkpointer.forecast.estimate_hand_over_s(),
        copy_s=parts.checkpointer.forecast.estimate_copy_s(),
    )


def estimate_save_s(parts: Parts, keep_in: Literal["memory", "storage"]) -> float | None:
    """Return how long it takes to bring the state to where it must be safe; None if no save there was measured yet."""
    checkpointer = parts.checkpointer
    return (
        checkpointer.forecast.estimate_hand_over_s()
        if keep_in == "memory"
        else checkpointer.forecast.get_usual_s("storage")
    )


def get_due(parts: Parts, progress: Progress, decision: interrupt.Decision) -> Due | None:
    """Return how the state after this step is saved, if it is."""
    if decision == "settle":
        return None
    return parts.checkpointer.get_due(progress.step) if decision == "continue" else get_way_out(decision)


def get_way_out(decision: interrupt.Decision) -> Due:
    """Return how the state is saved when all ranks leave."""
    return "hand_over" if decision in ("finish_and_hand_over", "hand_over_now") else "now"


def is_only_in_memory(source: Source, decision: interrupt.Decision) -> bool:
    """Tell whether a state as it was restored is not yet where a decision wants it."""
    return source in ("memory", "peer") and get_way_out(decision) == "now"


def leave(parts: Parts, progress: Progress, how: str = "") -> Interrupted:
    """Say why this rank leaves with all others."""
    notice = parts.notices.get_notice()
    cause = notice.source if notice else "a peer leaves"
    return Interrupted(progress=progress, reason=f"{cause}: {how}" if how else cause)


def save(
    parts: Parts,
    progress: Progress,
    recent: spikes.Recent,
    *,
    how: Due,
) -> bool:
    """Save the state as it is now.

    Returns:
        Whether a save was started (in the background) or the state is safe.
    """
    extra = {"scaler": parts.trainable.scaler.state_dict(), "recent": asdict(recent)}
    checkpointer = parts.checkpointer
    parts.trainable.optimizer.refresh()
    match how:
        case "memory" | "storage":
            begin = partial(checkpointer.start_save, tier=how)
        case "hand_over":
            notice = parts.notices.get_notice()
            begin = partial(
                checkpointer.hand_over, copies=needs_copies(parts), leaves=notice is not None and notice.leaves
            )
        case "now":
            begin = checkpointer.save_now
        case "last":
            begin = checkpointer.save_last
    return begin(parts.trainable.model, parts.trainable.optimizer, progress=progress, extra=extra)
