"""What a run has computed, step by step, to hold it against another run's."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.checkpoint.hf_storage import HuggingFaceStorageReader
from torch.distributed.checkpoint.state_dict_loader import load

from elastic.checkpoint.format.manifest import list_committed, read_manifest
from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, read_rows
from elastic.storage import open_storage


def read_losses(run_dir: RunDir) -> list[float]:
    """The loss of each step that counts."""
    return [row["loss"] for row in final_rows(read_rows(run_dir.metrics))]


def read_samples(run_dir: RunDir) -> dict[int, list[int]]:
    """The samples of each step, as the attempt whose row counts consumed them."""
    attempts = {row["step"]: row["attempt"] for row in final_rows(read_rows(run_dir.metrics))}
    samples: dict[int, list[int]] = {step: [] for step in attempts}
    for path in run_dir.root.glob("samples-*.jsonl"):
        attempt = int(path.stem.split("-")[1])
        for row in read_rows(path):
            if attempts.get(row["step"]) == attempt:
                samples[row["step"]] += row["ids"]
    return {step: sorted(ids) for step, ids in samples.items()}


def read_state(run_dir: RunDir) -> tuple[int, dict[str, Tensor]]:
    """The step of the newest checkpoint and all its tensors, whole, as torch's own reader sees them."""
    storage = open_storage(run_dir.root)
    checkpoint = list_committed(storage)[-1]
    tensors = read_manifest(storage, checkpoint).tensors
    state = {name: torch.full(record.shape, torch.nan) for name, record in tensors.items()}
    load(state, storage_reader=HuggingFaceStorageReader(str(Path(run_dir.root) / checkpoint.directory)))
    return checkpoint.step, state


COMPARABLE = {
    "optim.min_lr_ratio": 1,  # or the loss of a step would depend on the length of the run
    "optim.eps": 1e-5,  # or Adam makes a whole update of the rounding in the gradient of a token that is never seen
}
"""Settings for runs that shall be held against each other."""
LOSS_TOLERANCE = 1e-4
"""Relative: sums in another order differ by a rounding."""
_STATE_TOLERANCE = 1e-4


@dataclass(frozen=True, kw_only=True)
class Difference:
    """Between two runs of the same configuration."""

    steps: int
    """How many steps only one of them has."""
    samples: int
    """Steps whose samples are not the same."""
    loss: float
    """The largest of all steps, relative."""
    state: float
    """The largest of all tensors of the newest checkpoint, each |ours - theirs| / |theirs|."""
    last_step: int

    @property
    def state_tolerance(self) -> float:
        """What roundings may come to. Each step adds to them: first moments, the furthest, were seen to differ by 1e-4
        after 1000 steps."""
        return _STATE_TOLERANCE * max(1.0, self.last_step / 500)


def compare(run_dir: RunDir, other: RunDir) -> Difference:
    """Hold samples, losses and the final state of two runs against each other; their worlds may differ."""
    samples, losses = (read_samples(run_dir), read_samples(other)), (read_losses(run_dir), read_losses(other))
    (step, state), (other_step, other_state) = read_state(run_dir), read_state(other)
    assert step == other_step, "they ended at different steps"
    shared = [name for name in other_state if name in state]  # each rank has a generator of its own
    return Difference(
        steps=abs(len(losses[0]) - len(losses[1])),
        samples=sum(samples[0].get(step) != samples[1].get(step) for step in samples[0].keys() | samples[1].keys()),
        loss=max(abs(ours / theirs - 1) for ours, theirs in zip(*losses, strict=False)),
        state=max(_get_distance(state[name], other_state[name]) for name in shared),
        last_step=step,
    )


def _get_distance(ours: Tensor, theirs: Tensor) -> float:
    return float((ours.float() - theirs.float()).norm() / (theirs.float().norm() or 1.0))
