"""Weights & Biases: one run over all attempts, offline unless asked; `_wandb_choice` says what its environment decides.

Traps that shaped this file (measured with wandb 0.31):
- `step=` is never passed: after a rewind the server drops rows of a step it has seen. The x axis is `train/tokens`.
- What wandb has not flushed (offline) or sent (online) is lost in a kill -9; it does either every 15 s unless told.
- Offline, each process writes a directory of its own; `wandb sync` merges directories of one id in start order.
- Without a server `login` and `init` raise after 10 to 16 s: the rows then go to an offline run of the same id.
"""

import hashlib
import logging
import os
from collections.abc import Mapping
from dataclasses import asdict
from typing import TYPE_CHECKING

from elastic.config import RunConfig
from elastic.paths import resolve_path
from elastic.ports import MetricSink
from elastic.records.rundir import RunDir
from elastic.redact import redact
from elastic.sinks._wandb_choice import Choice, Mode, choose

if TYPE_CHECKING:
    import wandb

log = logging.getLogger(__name__)

OPENED_BY = ("rank0", "driver")

KEYS = {
    "step": "train/step",
    "tokens": "train/tokens",
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "lr": "train/lr",
    "step_s": "train/step_s",
    "tokens_per_s": "train/tokens_per_s",
    "mfu": "train/mfu",
    "val_loss": "eval/loss",
    "memory_gib": "memory/peak_gib",
    "world_size": "world/size",
    "attempt": "world/attempt",
    "usd": "cost/usd",
    "usd_per_mtoken": "cost/usd_per_mtoken",
    "goodput": "cost/goodput",
    "available_goodput": "cost/available_goodput",
    "usd_wasted": "cost/wasted_usd",
    **{
        f"usd_wasted_{cause}": f"cost/wasted/{cause}"
        for cause in ("redo", "recovery", "saving", "waiting", "starting", "data", "evaluation")
    },
}
"""Column of a row -> W&B key; other columns stay in `metrics.jsonl`."""


def get_run_id(config: RunConfig) -> str:
    """Return the id that all attempts of a run share: a function of where it is stored and of its name."""
    place = resolve_path(config.storage)
    return hashlib.sha256(f"{place}\n{config.run}".encode()).hexdigest()[:16]


def build(config: RunConfig, run_dir: RunDir) -> MetricSink:
    """Open the run's W&B run; never raises for wandb's own troubles.

    Call it where the rows of all attempts come together: the driver, or rank 0 under torchrun.
    """
    choice = choose(config, os.environ, folder=str(run_dir.root))
    if choice.overruled:
        log.warning("W&B's environment is not followed in: %s", ", ".join(choice.overruled))
    if choice.mode == "disabled":
        return WandbSink(None)
    import wandb  # noqa: PLC0415 (a second of imports, and an optional package where there is no Ray)

    mode = choice.mode
    try:
        if mode == "online" and not wandb.login(prompt=False):
            log.warning("W&B is to be online, but no API key is set; it goes on offline. Run `wandb login`.")
            mode = "offline"
        return WandbSink(_open(config, choice, mode))
    except Exception as error:  # whatever W&B cannot do, training goes on
        log.warning("W&B could not start (%s); it goes on offline. `wandb sync` uploads the run later.", error)
    try:
        return WandbSink(_open(config, choice, "offline"))
    except Exception as error:  # as above
        log.warning("W&B could not start offline either (%s); metrics.jsonl has all rows.", error)
        return WandbSink(None)


def _open(config: RunConfig, choice: Choice, mode: Mode) -> "wandb.Run":
    import wandb  # noqa: PLC0415 (as above)

    run = wandb.init(
        project=choice.project,
        entity=choice.entity,
        dir=choice.dir,
        id=get_run_id(config),
        name=choice.name,
        resume="allow",
        mode=mode,
        config=redact(asdict(config)),
        settings=wandb.Settings(
            x_transaction_log_flush_interval=0.5,
            x_file_stream_transmit_interval=5.0,
            init_timeout=30,
            finish_timeout=60,
            console="off",
            silent=True,
            disable_code=True,
            x_disable_meta=True,  # the command line may hold what the config redacts
            x_disable_stats=True,  # of this machine, which need not be one that trains
        ),
    )
    run.define_metric("train/tokens", hidden=True)
    run.define_metric("*", step_metric="train/tokens")
    return run


class WandbSink:
    """Hands rows to a W&B run, or drops them when there is none."""

    def __init__(self, run: "wandb.Run | None") -> None:
        self._run = run

    def write(self, row: Mapping[str, object]) -> None:
        """Log the columns of `KEYS` that the row has."""
        if self._run is None:
            return
        values = {KEYS[name]: value for name, value in row.items() if name in KEYS and value is not None}
        try:
            self._run.log(values)
        except Exception as error:  # whatever W&B cannot do, training goes on
            log.warning("W&B stopped taking rows (%s); metrics.jsonl goes on having all of them.", error)
            self._run = None

    def close(self) -> None:
        """Upload what is left, for a minute at most, and mark this process's part as ended."""
        if self._run is None:
            return
        try:
            self._run.finish()
        except Exception as error:  # as above
            log.warning("W&B could not finish (%s); `wandb sync` uploads what is left.", error)
        self._run = None
