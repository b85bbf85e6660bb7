"""Train through Ray Train, on the cluster at RAY_ADDRESS or else on this machine.

CONFIG is a YAML file; key=value overrides its keys. Training again under the same run name resumes the run.
"""

import argparse
import logging
import sys
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.cli._bill import compare_with_plan
from cluster.cli._finished import tell_finished
from cluster.cli._runs import add_json, print_json, text_on_stderr
from cluster.cost import load_prices
from elastic.config import RunConfig
from elastic.errors import ConfigError
from elastic.records.rundir import RunDir
from elastic.storage import is_url, join_url

if TYPE_CHECKING:
    from cluster.runtime.jobs.retries import RetriedDriver
    from elastic.checkpoint.restore.past import Past

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take a configuration."""
    parser.add_argument("config", metavar="CONFIG")
    parser.add_argument("overrides", metavar="key=value", nargs="*")
    parser.add_argument(
        "--stop-retries",
        action="store_true",
        help="as the entrypoint of a Ray job that is tried again (KubeRay): end it for good where that cannot help",
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Train, and return 0 finished, 2 wrong input, 3 interrupted and resumable, 1 anything else."""
    if not args.stop_retries:
        return _train(args, None)
    from cluster.runtime.jobs.retries import stop_retries

    return stop_retries(lambda driver: _train(args, driver))


def _train(args: argparse.Namespace, driver: "RetriedDriver | None") -> int:
    from elastic.checkpoint.restore.past import describe_finished, look_back
    from elastic.config_load import load_here

    config = load_here(args.config, args.overrides)
    past = look_back(config)
    if driver:
        driver.begin(config, past)
    if reason := describe_finished(config, past):
        tell_finished(config, reason, json=args.json)
        return 0
    if epochs := check_before_paying(config, past):
        print(f"data: {epochs}", file=sys.stderr if args.json else sys.stdout)

    from cluster.runtime.driver import find_address, train
    from cluster.runtime.view import View
    from elastic.records.spool import open_folder
    from elastic.sinks import open_sinks

    address = find_address()
    with (
        text_on_stderr() if args.json else nullcontext(),
        open_folder(config.storage, config.run) as run_dir,
        View(config, partial(open_sinks, config, run_dir, opener="driver")) as view,
    ):
        ending = train(config, address=address, on_update=view.update)
        view.end(ending)
        for line in compare_with_plan(config, run_dir):
            view.say(line)
    if driver:
        driver.take(kind=ending.kind, reason=ending.reason, exit_code=ending.exit_code)
    if args.json:
        print_json(
            {"run": join_url(config.storage, config.run), "end": ending.kind, "reason": ending.reason, **ending.summary}
        )
    return ending.exit_code


def get_run_dir(config: RunConfig) -> RunDir:
    """Return the run's directory, where the storage is a path."""
    return RunDir(Path(config.storage) / config.run)


def check_is_path(storage: str, *, key: str = "storage", why: str) -> None:
    """Refuse an object store where a verb works on a run's files themselves.

    Raises:
        ConfigError: it is one.
    """
    if is_url(storage):
        raise ConfigError(f"{key}={storage}: {why}. Set {key} to a path; train and submit take URLs, too.")


def check_before_paying(config: RunConfig, past: "Past | None" = None) -> str:
    """Find what is wrong with sizes, prices, provider, data, storage and the run to resume before a node is claimed.

    Storage that is full makes a run that has trained wait for a while, and refuses a new one at once.

    Args:
        past: what the run has, if that was asked for.

    Returns:
        How often the whole run reads each source, if there are several or one is read more than once; else nothing.

    Raises:
        UserError: one of these cannot be used, or the run cannot go on under this configuration.
        CheckpointError: another version of Solvent wrote its checkpoints.
    """
    from cluster.providers import check_choice
    from elastic.checkpoint.durable.storage_errors import (
        PATIENCE_S,
        check_space,
        check_writable,
        estimate_checkpoint_bytes,
        explain_unreadable,
        keep_trying,
    )
    from elastic.checkpoint.format.compat import check_resume
    from elastic.checkpoint.format.manifest import read_manifest
    from elastic.checkpoint.restore.first_weights import check_first_weights
    from elastic.checkpoint.restore.past import look_back
    from elastic.data.corpus import describe_epochs, open_corpus
    from elastic.data.kept import share_indices
    from elastic.records.leader import was_led

    load_prices(config.cost)
    check_choice(config.cluster.notices)
    config.get_world_sizes()
    corpus = open_corpus(config)
    corpus.check_fits()
    past = past or look_back(config)
    storage = past.storage

    def look() -> None:
        check_writable(storage)
        check_space(storage, estimate_checkpoint_bytes(config.num_trained_params))

    try:
        if past.error:
            raise past.error
        has_trained = bool(past.committed) or was_led(storage)
    except OSError:  # of a URL, any part may be wrong
        has_trained = not is_url(storage.url)
    keep_trying(look, patience_s=PATIENCE_S if has_trained else 0.0)
    try:
        if past.error:  # it works by now
            past = look_back(config)
        if past.error:
            raise past.error
        check_first_weights(storage, past.committed)
        for newest in past.committed[-1:]:
            for remark in check_resume(config, read_manifest(storage, newest), data=corpus.identity):
                log.warning("%s", remark)
        share_indices(storage, corpus, role="keeps")
    except OSError as error:
        raise explain_unreadable(error, storage.url) from error
    plan = corpus.plan_epochs()
    return describe_epochs(plan) if len(plan) > 1 or any(one.epochs > 1 for one in plan) else ""
