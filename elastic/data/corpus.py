"""What a run trains on: which samples make up a step, and what is in them. No torch here.

A step of a mixture has of each source what `elastic.mixture` says, the next ones in that source's own order, so that
none is left out or repeated before the source's epoch is over. Within the step they are mixed, so that each rank has
some of each. An id is a number over all samples of all sources, in the order of the configuration.
"""

import hashlib
import json
import os
import tempfile
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import accumulate
from pathlib import Path

import numpy as np
import numpy.typing as npt

from elastic.config import RunConfig
from elastic.data.order import derive_seed, ids_between, sample_ids
from elastic.data.packing import PackedSamples
from elastic.data.prepared.block_cache import BlockCache
from elastic.data.prepared.format import BLOCK_BYTES, SPLITS, DatasetInfo, Split, SplitInfo
from elastic.data.prepared.shards import Dataset, check_not_empty, check_vocab, open_dataset
from elastic.data.samples import Sample, Samples, StreamSamples
from elastic.errors import DataError
from elastic.mixture import build_mixture, get_paths, share_out
from elastic.ports import DataIdentity
from elastic.storage import is_url

_ONE_SOURCE = ""


@dataclass(frozen=True, kw_only=True)
class Epochs:
    """How often a run reads a source."""

    name: str
    share: float
    """Of all samples of the run."""
    num_samples: int
    """That the source has."""
    num_taken: int
    padding_share: float
    """Of these samples."""

    @property
    def epochs(self) -> float:
        """How often each sample is taken, on average."""
        return self.num_taken / self.num_samples if self.num_samples else 0.0


class Corpus:
    """Prepared data as a run's configuration uses it; made by `open_corpus`.

    Args:
        sources: by name; the one of `data.path` has none.
    """

    def __init__(self, sources: Mapping[str, Dataset], config: RunConfig) -> None:
        self.sources = dict(sources)
        self.config = config
        self.mixture = build_mixture(config)

    @cached_property
    def info(self) -> DatasetInfo:
        """Tokenizer and totals; of a mixture without its shards."""
        infos = [dataset.info for dataset in self.sources.values()]
        if not self.mixture:
            return infos[0]
        largest = [info.largest_id for info in infos if info.largest_id is not None]
        train, val = (_add_up([info.get_split(split) for info in infos]) for split in SPLITS)
        return replace(
            infos[0],
            train=train,
            val=val,
            vocab_size=max(info.vocab_size for info in infos),
            largest_id=max(largest) if len(largest) == len(infos) else None,
        )

    @cached_property
    def identity(self) -> DataIdentity:
        """What tells this data from any other."""
        identities = {name: dataset.info.identity for name, dataset in self.sources.items()}
        if not self.mixture:
            return identities[_ONE_SOURCE]
        return DataIdentity(
            tokenizer_sha256=self.info.tokenizer_sha256,
            train_sha256=_hash({name: one.train_sha256 for name, one in identities.items()}),
            val_sha256=_hash({name: one.val_sha256 for name, one in identities.items()}),
            train_tokens=self.info.train.num_tokens,
            val_tokens=self.info.val.num_tokens,
            sources={name: one.name for name, one in identities.items()},
        )

    @cached_property
    def train(self) -> "Joined":
        """The samples to train on."""
        return self._join("train")

    @cached_property
    def val(self) -> "Joined":
        """The samples that are held out."""
        return self._join("val")

    def _join(self, split: Split) -> "Joined":
        data = self.config.data
        kind = PackedSamples if data.packing == "documents" else StreamSamples
        return Joined({name: kind(dataset, split, data.seq_len) for name, dataset in self.sources.items()})

    def get_samples(self, split: Split) -> "Joined":
        """Return the samples of a split."""
        return self.train if split == "train" else self.val

    def get_ids(self, step: int) -> npt.NDArray[np.int64]:
        """Return the ids of the samples of one step (counted from 0), over all ranks."""
        batch, seed = self.config.train.global_batch, self.config.train.seed
        if not self.mixture:
            return sample_ids(seed=seed, step=step, global_batch=batch, num_samples=len(self.train))
        before, after = (self.mixture.count(num_steps * batch) for num_steps in (step, step + 1))
        parts = [
            first + ids_between(start, end, seed=derive_seed(seed, name), num_samples=size)
            for name, first, size, start, end in zip(
                self.mixture.names, self.train.firsts, self.train.sizes, before, after, strict=True
            )
        ]
        mixed = sample_ids(seed=derive_seed(seed, "/mixed"), step=step, global_batch=batch, num_samples=batch)
        return np.concatenate(parts)[mixed]

    def get_eval_ids(self) -> npt.NDArray[np.int64]:
        """Return the ids of the validation samples of an evaluation: the first of each source, or all it has.

        Sources share `train.eval_samples` by the weights that hold from the start, so that losses stay comparable.
        """
        wanted = [self.config.train.eval_samples]
        if self.mixture:
            wanted = share_out(wanted[0], self.mixture.phases[0].weights)
        parts = zip(self.val.firsts, self.val.sizes, wanted, strict=True)
        return np.concatenate([first + np.arange(min(size, num)) for first, size, num in parts])

    def plan_epochs(self) -> list[Epochs]:
        """Return what the whole run takes from each source."""
        total = self.config.train.steps * self.config.train.global_batch
        taken = self.mixture.count(total) if self.mixture else (total,)
        plan: list[Epochs] = []
        for name, samples, num in zip(self.sources, self.train.sources, taken, strict=True):
            padding = samples.padding_share
            size = len(samples)
            plan.append(Epochs(name=name, share=num / total, num_samples=size, num_taken=num, padding_share=padding))
        return plan

    @cached_property
    def target_share(self) -> float:
        """How much of the labels of the whole run is no padding."""
        return 1 - sum(one.share * one.padding_share for one in self.plan_epochs())

    @property
    def is_remote(self) -> bool:
        """Whether samples come from an object store, so that reading them ahead pays."""
        return any(is_url(path) for path in get_paths(self.config.data).values())

    def stop_reading_ahead(self) -> None:
        """End the threads that read ahead."""
        for dataset in self.sources.values():
            dataset.folder.stop_reading_ahead()

    @property
    def has_validation(self) -> bool:
        """Whether an evaluation has samples; data may be prepared without."""
        return bool(self.get_wanted("val"))

    def get_wanted(self, split: Split) -> Mapping[str, Dataset]:
        """Return the sources that a split must have a sample of."""
        weights: Sequence[int] = [1]
        if self.mixture:
            phases = self.mixture.phases if split == "train" else self.mixture.phases[:1]
            weights = [sum(of_source) for of_source in zip(*(phase.weights for phase in phases), strict=True)]
        return {
            name: dataset
            for (name, dataset), weight in zip(self.sources.items(), weights, strict=True)
            if weight and (split == "train" or dataset.info.val.num_tokens)
        }

    def check_not_empty(self, split: Split) -> None:
        """Refuse a split without a full sample.

        Raises:
            DataError: it has none.
        """
        for dataset in self.get_wanted(split).values():
            check_not_empty(dataset, split, self.config.data.seq_len)

    def check_fits(self) -> None:
        """Refuse data and a configuration that cannot go together, before a GPU is rented.

        Raises:
            DataError: a token id has no row in the embedding, a split that is not left out holds not even one sample,
                or sources are not of one tokenizer.
        """
        first_key, first = next(iter(self.sources.items()))
        for name, dataset in self.sources.items():
            check_vocab(dataset.info, self.config, key=get_key(name), path=str(dataset.folder))
            for what in ("tokenizer_sha256", "eot_id", "bos_id"):
                if getattr(dataset.info, what) != getattr(first.info, what):
                    raise DataError(
                        f"{get_key(name)}={str(dataset.folder)!r} has another {what} "
                        f"({getattr(dataset.info, what)}) than {get_key(first_key)}={str(first.folder)!r} "
                        f"({getattr(first.info, what)}), so that ids mean other text. Prepare both with one tokenizer: "
                        f"solvent prepare INPUT --tokenizer {first.folder}/tokenizer.json --out DIR"
                    )
        for split in sorted(SPLITS, key=lambda split: self.info.get_split(split).num_tokens):  # the shortest decides
            self.check_not_empty(split)


class Joined:
    """The samples of one split of all sources, numbered on."""

    def __init__(self, sources: Mapping[str, Samples]) -> None:
        self.names = tuple(sources)
        self.sizes = [len(samples) for samples in sources.values()]
        self.firsts = list(accumulate(self.sizes, initial=0))[:-1]
        self.sources = list(sources.values())

    def __len__(self) -> int:
        return sum(self.sizes)

    def find(self, sample_id: int) -> tuple[str, int]:
        """Return the source of a sample, and its number there."""
        index = bisect_right(self.firsts, sample_id) - 1
        while not self.sizes[index]:  # an empty one begins where the next does
            index -= 1
        return self.names[index], sample_id - self.firsts[index]

    def read(self, sample_id: int) -> Sample:
        """Return a sample."""
        name, index = self.find(sample_id)
        return self.sources[self.names.index(name)].read(index)

    def read_ahead(self, sample_ids: Iterable[int]) -> None:
        """Take note that these samples will be read soon, in this order."""
        for name, index in map(self.find, sample_ids):
            self.sources[self.names.index(name)].read_ahead(index)


def get_key(name: str) -> str:
    """Return the key of the configuration that says where a source lies."""
    return f"data.sources.{name}.path" if name else "data.path"


def describe_epochs(plan: Sequence[Epochs]) -> str:
    """Return the epochs of each source in a line."""
    lines: list[str] = []
    for one in plan:
        name = f"{one.name}: " if one.name else ""
        padding = f", {one.padding_share:.2%} of it padding" if one.padding_share else ""
        taken = f"{one.num_taken:,} of {one.num_samples:,}, {one.epochs:.2f} epochs"
        lines.append(f"{name}{one.share:.1%} of the samples, {taken}{padding}")
    return "; ".join(lines)


def _add_up(splits: Sequence[SplitInfo]) -> SplitInfo:
    return SplitInfo(
        num_documents=sum(split.num_documents for split in splits),
        num_tokens=sum(split.num_tokens for split in splits),
        shards=(),
    )


def _hash(content: Mapping[str, str]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_corpus(config: RunConfig) -> Corpus:
    """Open what a configuration trains on.

    Raises:
        DataError: not there, not prepared, torn, corrupt, or of another tokenizer.
    """
    names = list(config.data.sources) or [_ONE_SOURCE]
    paths = get_paths(config.data).items()
    cache = None
    if any(is_url(path) for _, path in paths):
        folder = config.data.cache or str(Path(tempfile.gettempdir()) / f"solvent-data-{os.getuid()}")
        cache = BlockCache(Path(folder), max_bytes=int(config.data.cache_gib * 2**30), block_bytes=BLOCK_BYTES)
    opened = {name: open_dataset(path, key=key, cache=cache) for name, (key, path) in zip(names, paths, strict=True)}
    return Corpus(opened, config)
