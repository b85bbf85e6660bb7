"""What a run trains on: which samples make up a step, and what is in them. No torch here."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from elastic.config import RunConfig
from elastic.data.format import Split
from elastic.data.order import sample_ids
from elastic.data.samples import Sample, Samples, StreamSamples
from elastic.data.shards import Dataset, check_fits, check_not_empty, has_validation, open_dataset
from elastic.ports import DataIdentity


@dataclass(frozen=True)
class Corpus:
    """Prepared data as a run's configuration uses it; made by `open_corpus`."""

    dataset: Dataset
    config: RunConfig

    @property
    def identity(self) -> DataIdentity:
        """What tells this data from any other."""
        return self.dataset.info.identity

    @cached_property
    def train(self) -> Samples:
        """The samples to train on."""
        return self._get_samples("train")

    @cached_property
    def val(self) -> Samples:
        """The samples that are held out."""
        return self._get_samples("val")

    def _get_samples(self, split: Split) -> Samples:
        return StreamSamples(self.dataset, split, self.config.data.seq_len)

    def get_ids(self, step: int) -> npt.NDArray[np.int64]:
        """Return the ids of the samples of one step (counted from 0), over all ranks."""
        train = self.config.train
        return sample_ids(seed=train.seed, step=step, global_batch=train.global_batch, num_samples=len(self.train))

    def read(self, split: Split, sample_id: int) -> Sample:
        """Return one sample."""
        return (self.train if split == "train" else self.val).read(sample_id)

    def get_eval_ids(self) -> npt.NDArray[np.int64]:
        """Return the ids of the validation samples that an evaluation takes: the first, or all."""
        return np.arange(min(self.config.train.eval_samples, len(self.val)))

    @property
    def has_validation(self) -> bool:
        """Whether anything is held out; data may be prepared without."""
        return has_validation(self.dataset)

    def check_not_empty(self, split: Split) -> None:
        """Refuse a split without a full sample.

        Raises:
            DataError: it has none.
        """
        check_not_empty(self.dataset, split, self.config.data.seq_len)

    def check_fits(self) -> None:
        """Refuse data and a configuration that cannot go together, before a GPU is rented.

        Raises:
            DataError: they cannot.
        """
        check_fits(self.dataset, self.config)


def open_corpus(config: RunConfig) -> Corpus:
    """Open what a configuration trains on.

    Raises:
        DataError: not there, not prepared, torn, corrupt, or of another tokenizer.
    """
    return Corpus(open_dataset(config.data.path), config)
