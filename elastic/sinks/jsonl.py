"""`metrics.jsonl`: the truth about a run, one flushed line per row."""

from collections.abc import Mapping

from elastic.config import RunConfig
from elastic.errors import StorageError
from elastic.records.rundir import RunDir, append_row, end_torn_line

OPENED_BY = ("rank0",)  # on a cluster, the trainers have it opened or relayed


def build(config: RunConfig, run_dir: RunDir) -> "JsonlSink":  # noqa: ARG001 - the signature of all sinks
    """Return a sink that appends to the run's `metrics.jsonl`.

    Raises:
        StorageError: the run directory cannot be written.
    """
    try:
        run_dir.root.mkdir(parents=True, exist_ok=True)
        end_torn_line(run_dir.metrics)
        run_dir.metrics.touch()
    except OSError as error:
        raise StorageError(
            f"{run_dir.metrics} cannot be written ({error.strerror}), but a run without its rows could not be resumed "
            "or explained. Free or unlock it, or set storage to another place."
        ) from error
    return JsonlSink(run_dir)


class JsonlSink:
    """Appends rows as they come; nothing is buffered, so a killed process loses no row it has told of.

    The one sink whose faults end a training: the run could not be explained without it.
    """

    def __init__(self, run_dir: RunDir) -> None:
        self._path = run_dir.metrics

    def write(self, row: Mapping[str, object]) -> None:
        """Append one row.

        Raises:
            StorageError: it cannot be written.
        """
        append_row(self._path, row)

    def close(self) -> None:
        """Do nothing: each row was flushed as it was written."""
