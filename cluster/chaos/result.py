"""What a run under chaos came to, from the files that it left."""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from cluster.chaos.faults import Fault
from cluster.chaos.injector import Struck
from cluster.chaos.verdict import count_samples, measure_goodput
from cluster.ledger import read_ledger
from elastic.config import RunConfig
from elastic.data.corpus import open_corpus
from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, read_rows


def build_result(
    config: RunConfig, struck: Sequence[Struck], *, missed: Sequence[Fault], exit_code: int
) -> dict[str, Any]:
    """Return what `solvent chaos --json` prints (CONTRACT names the first seven).

    Args:
        missed: faults that have not struck.
        exit_code: the driver's.
    """
    run_dir = RunDir(Path(config.storage) / config.run)
    metrics = list(read_rows(run_dir.metrics))
    rows = final_rows(metrics)
    attempts = list(read_rows(run_dir.attempts))
    corpus = open_corpus(config)
    samples = count_samples(metrics, _read_samples(run_dir, attempts), lambda step: corpus.get_ids(step - 1).tolist())
    ledger = read_ledger(read_rows(run_dir.ledger))
    goodput = measure_goodput(metrics, attempts, ledger, save_every_steps=config.checkpoint.every_steps)
    return {
        "run": str(run_dir.root),
        "finished": exit_code == 0,
        "final_step": rows[-1]["step"] if rows else 0,
        "final_loss": rows[-1]["loss"] if rows else None,
        "samples_lost": samples.lost,
        "samples_repeated": samples.repeated,
        "incidents": list(read_rows(run_dir.incidents)),
        "exit_code": exit_code,
        "faults": [asdict(fault) for fault in struck],
        "faults_missed": [str(fault) for fault in missed],
        "worlds": [row["world_size"] for row in attempts],
        "goodput": asdict(goodput) if goodput else None,
    }


def _read_samples(run_dir: RunDir, attempts: Sequence[dict[str, Any]]) -> dict[int, list[dict[str, Any]]]:
    """Return, by attempt, what its ranks say they consumed."""
    return {
        row["attempt"]: [
            samples
            for rank in range(row["world_size"])
            for samples in read_rows(run_dir.samples(attempt=row["attempt"], rank=rank))
        ]
        for row in attempts
    }
