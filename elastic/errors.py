"""Every error that a user can cause or must act on.

    SolventError                    exit code 1
    |-- UserError                   exit code 2: the input is wrong; nothing was spent, nothing saved is harmed
    |   |-- ConfigError             a key, a value, or two that contradict each other
    |   |-- DataError               missing, empty, corrupt or mismatched training data
    |   |-- ModelFolderError        a Hugging Face folder that cannot be read or written as asked
    |   `-- StorageError            the run directory cannot be written, is full, or is in use
    |       |-- SavesFailedError    exit code 3: save after save failed; the same command resumes
    |       `-- StaleGenerationError     another process has taken the run over; this one writes nothing more
    |-- NoPlanError                 exit code 4: nothing that can be rented keeps to the limits; the message says what
    would |-- ClusterError                a cluster elsewhere refuses, or cannot be reached
    |-- CheckpointError             a checkpoint is torn, foreign or does not fit the model
    |-- NoticeError                 a provider's notice cannot be understood
    `-- StepError                   too many steps were bad; none of them was applied

A message has three parts: the value found, why it cannot work, what to type instead.
Ends of training that are not mistakes are values (`ports.Outcome`), not exceptions.
"""


class SolventError(Exception):
    """Base of all errors raised on purpose; `exit_code` is what the command line returns for it."""

    exit_code = 1


class UserError(SolventError):
    """The user's input is wrong."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration key or value cannot work."""


class DataError(UserError):
    """Training data is missing, empty, corrupt or does not match its tokenizer."""


class ModelFolderError(UserError):
    """A Hugging Face folder holds what we cannot train, or cannot be written."""


class StorageError(UserError):
    """The run directory cannot be used."""


class SavesFailedError(StorageError):
    """Save after save failed, so training on would only be lost; the same command resumes once storage works."""

    exit_code = 3


class StaleGenerationError(StorageError):
    """The run goes on elsewhere: a newer generation than this process holds was taken."""


class NoPlanError(SolventError):
    """Nothing that can be rented keeps to the limits."""

    exit_code = 4


class ClusterError(SolventError):
    """A cluster elsewhere refuses, or cannot be reached."""


class CheckpointError(SolventError):
    """A checkpoint cannot be trusted or does not fit."""


class NoticeError(SolventError):
    """Where a provider publishes its notices, there is something else."""


class StepError(SolventError):
    """Too many steps had a loss that is not finite or a spike; none of them was applied."""
