"""One file per place that metric rows go to; a file is its own registration.

Each provides ``build(config, run_dir) -> MetricSink`` and the literal ``OPENED_BY``, the processes that open it. None
imports torch, so that a driver can use them too, nor a package of its own before its rows are wanted.
"""

from typing import Literal

from elastic import plugins
from elastic.config import RunConfig
from elastic.ports import MetricSink
from elastic.records.rundir import RunDir

Opener = Literal["rank0", "driver"]
"""Rank 0 of a run without Ray, or the driver of a run with it, whose rank 0 sees to `metrics.jsonl` itself."""


def open_sinks(config: RunConfig, run_dir: RunDir, *, opener: Opener) -> list[MetricSink]:
    """Open all sinks that this process is to write to.

    Raises:
        StorageError: the run's own rows cannot be written; the troubles of other sinks never end a training.
    """
    kinds = plugins.get_names(__name__)
    wanted = [kind for kind in kinds if opener in plugins.read_constant(__name__, kind, "OPENED_BY")]
    return [plugins.load(__name__, kind, key="sink").build(config, run_dir) for kind in wanted]
