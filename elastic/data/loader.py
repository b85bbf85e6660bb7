"""From a step to this rank's tensors.

Letters: B samples of one microbatch, S target tokens of one sample.

Every rank gets the same number of microbatches of the same shape, whatever its share of the global batch: collectives
stay in step, and a compiled model sees one shape. What is missing is filled with rows whose labels are all IGNORE.
"""

import math
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from elastic.config import RunConfig
from elastic.data.corpus import Corpus
from elastic.data.order import rank_slice
from elastic.data.prepared.format import Split
from elastic.nn.loss import IGNORE, Microbatch

_MAX_STEPS_AHEAD = 32
_ROWS_AHEAD = 512
"""From an object store, samples of so many steps, and about so many rows, are on their way before they are needed."""


@dataclass(frozen=True)
class Batch:
    """One rank's share of one global batch."""

    microbatches: list[Microbatch]
    """On the device."""
    sample_ids: tuple[int, ...]
    """The samples in it; padding has none."""


class Loader:
    """Yields (step, Batch) from `start_step` to the last step, read ahead by one background thread.

    Use it in a `with` block: leaving it ends the thread. An error in the thread is raised at the step it belongs to.
    """

    def __init__(self, corpus: Corpus, *, rank: int, world_size: int, device: torch.device, start_step: int) -> None:
        self._corpus = corpus
        self._config = corpus.config
        self._rank = rank
        self._world_size = world_size
        self._device = device
        self._next_step = self._ahead_step = start_step
        self._pending: deque[tuple[int, Future[_HostBatch]]] = deque()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="loader", initializer=_enter_device, initargs=(device,))

    def __enter__(self) -> Self:
        self._corpus.check_not_empty("train")
        for _ in range(self._config.data.prefetch_steps):
            self._read_ahead()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)
        self._corpus.stop_reading_ahead()
        self._thread.shutdown()
        self._corpus.stop_reading_ahead()  # it may just have begun to

    def __iter__(self) -> Iterator[tuple[int, Batch]]:
        return self

    def __next__(self) -> tuple[int, Batch]:
        if not self._pending:
            raise StopIteration
        step, future = self._pending.popleft()
        batch = future.result()
        self._read_ahead()
        return step, batch.to(self._device)

    def _read_ahead(self) -> None:
        if self._corpus.is_remote:
            rows = math.ceil(self._config.train.global_batch / self._world_size)
            end = self._next_step + max(self._config.data.prefetch_steps, min(_MAX_STEPS_AHEAD, _ROWS_AHEAD // rows))
            while self._ahead_step < min(end, self._config.train.steps):
                self._thread.submit(self._announce, self._ahead_step)
                self._ahead_step += 1
        if self._next_step < self._config.train.steps:
            self._pending.append((self._next_step, self._thread.submit(self._build, self._next_step)))
            self._next_step += 1

    def get_sample_ids(self, step: int) -> list[int]:
        """Return the samples of one step, over all ranks."""
        return self._corpus.get_ids(step).tolist()

    def _announce(self, step: int) -> None:
        ids = rank_slice(self._corpus.get_ids(step), rank=self._rank, world_size=self._world_size)
        self._corpus.train.read_ahead(ids.tolist())

    def _build(self, step: int) -> "_HostBatch":
        train, ids = self._config.train, self._corpus.get_ids(step)
        micro_batch = get_micro_batch(self._config, self._world_size)
        num_microbatches = math.ceil(math.ceil(train.global_batch / self._world_size) / micro_batch)
        return _build_batch(
            self._corpus,
            "train",
            rank_slice(ids, rank=self._rank, world_size=self._world_size),
            shape=(num_microbatches, micro_batch, self._config.data.seq_len),
            pin=self._device.type == "cuda",
        )


def _enter_device(device: torch.device) -> None:
    """A new thread is on GPU 0; pinning memory from there would open a context on another rank's GPU."""
    if device.type == "cuda":
        torch.cuda.set_device(device)


def get_micro_batch(config: RunConfig, world_size: int) -> int:
    """Return the samples per microbatch: as configured, or less if no rank has that many."""
    return min(config.train.micro_batch, math.ceil(config.train.global_batch / world_size))


def eval_batches(corpus: Corpus, *, rank: int, world_size: int, device: torch.device) -> Iterator[Batch]:
    """Return the first `train.eval_samples` validation samples (or all), one microbatch per batch.

    None if the data was prepared without validation.

    Raises:
        DataError: validation holds no full sample.
    """
    if not corpus.has_validation:
        return iter(())
    corpus.check_not_empty("val")
    config = corpus.config
    micro_batch = get_micro_batch(config, world_size)
    ids = corpus.get_eval_ids()
    starts = range(0, len(ids), micro_batch * world_size)
    if corpus.is_remote:
        for start in starts:
            part = rank_slice(ids[start : start + micro_batch * world_size], rank=rank, world_size=world_size)
            corpus.val.read_ahead(part.tolist())

    def build(start: int) -> Batch:
        part = rank_slice(ids[start : start + micro_batch * world_size], rank=rank, world_size=world_size)
        shape = (1, micro_batch, config.data.seq_len)
        return _build_batch(corpus, "val", part, shape=shape, pin=device.type == "cuda").to(device)

    return map(build, starts)


@dataclass(frozen=True)
class _HostBatch:
    """All microbatches in one tensor, so that they cross to the device in one copy."""

    data_2MBS: Tensor  # noqa: N815  # shape letters: tokens and labels, microbatches, rows, target tokens
    sample_ids: tuple[int, ...]
    borders_MN: Tensor | None  # noqa: N815  # where documents begin in each microbatch; None: no row has several

    def to(self, device: torch.device) -> Batch:
        parts = list(self.data_2MBS.to(device, non_blocking=True).unbind())
        if self.borders_MN is not None:
            parts.append(self.borders_MN.to(device, non_blocking=True))
        return Batch(list(zip(*(part.unbind() for part in parts), strict=True)), self.sample_ids)


def _build_batch(
    corpus: Corpus, split: Split, ids: npt.NDArray[np.int64], *, shape: tuple[int, int, int], pin: bool
) -> _HostBatch:
    """Read samples into microbatches of `shape` (M, B, S) and pad the rest."""
    num_microbatches, micro_batch, seq_len = shape
    num_rows = num_microbatches * micro_batch
    data = torch.empty((2, num_rows, seq_len), dtype=torch.int64, pin_memory=pin)
    tokens_RS, labels_RS = data.numpy()
    tokens_RS[len(ids) :] = 0
    labels_RS[len(ids) :] = IGNORE
    samples, starts = corpus.get_samples(split), [np.zeros(1, np.int32)] * num_rows
    for row, sample_id in enumerate(ids.tolist()):
        sample = samples.read(sample_id)
        tokens_RS[row] = sample.tokens
        labels_RS[row] = sample.labels if sample.counted is None else np.where(sample.counted, sample.labels, IGNORE)
        starts[row] = starts[row] if sample.starts is None else sample.starts
    borders_MN = None
    if corpus.config.data.packing == "documents":
        borders_MN = torch.from_numpy(join_borders(starts, micro_batch, seq_len))
        borders_MN = borders_MN.pin_memory() if pin else borders_MN
    return _HostBatch(data.view(2, *shape), tuple(ids.tolist()), borders_MN)


def join_borders(starts: list[npt.NDArray[np.int32]], micro_batch: int, seq_len: int) -> npt.NDArray[np.int32]:
    """Return borders_MN of rows whose documents begin at `starts`: in each microbatch counted over all its rows.

    The end is repeated until there are as many as in the microbatch with most, and a power of two: few different
    numbers of them, for what is compiled or launched for each.
    """
    parts = [
        np.concatenate([start + row * seq_len for row, start in enumerate(starts[first : first + micro_batch])])
        for first in range(0, len(starts), micro_batch)
    ]
    size = 1 << max(len(part) for part in parts).bit_length()  # the end is one more
    borders = np.full((len(parts), size), micro_batch * seq_len, np.int32)
    for row, part in zip(borders, parts, strict=True):
        row[: len(part)] = part
    return borders
