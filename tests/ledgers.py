"""Every run that a test leaves is paid to the millisecond and the cent, whatever happened to it."""

from pathlib import Path

from cluster.ledger import check_dollars, check_tiling, read_ledger
from elastic.records.rundir import read_rows


def check_ledgers(folder: Path) -> int:
    """Return how many runs are below a folder; fail if the tiles of one do not meet, or its dollars do not add up."""
    paths = sorted(folder.rglob("ledger.jsonl"))
    for path in paths:
        rows = read_ledger(read_rows(path))
        if problems := [*check_tiling(rows), *check_dollars(rows)]:
            raise AssertionError(f"{path}: {'; '.join(problems)}")
    return len(paths)
