"""`solvent submit --to ray`: hand a run to a Ray cluster's job API and follow it."""

import argparse
import os
import secrets
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cluster.cli._finished import find_finished_elsewhere, tell_finished
from cluster.cli._runs import print_json
from elastic.config import RunConfig
from elastic.errors import ClusterError, ConfigError
from elastic.paths import expand_home

if TYPE_CHECKING:
    from cluster.runtime.jobs.job_api import Job, JobServer
    from cluster.runtime.jobs.submission import Submission

OPTIONS = {
    "--address": "address",
    "--working-dir": "working_dir",
    "--exclude": "exclude",
    "--secret": "secret",
    "--env": "env",
    "--supervise": "supervise",
    "--patience-s": "patience_s",
    "--pending-s": "pending_s",
}
_PATIENCE_S = 600.0
_PENDING_S = 300.0
DELETE_S = 330.0
"""A driver that is asked to stop has five minutes to save."""


def add_arguments(parser: Any) -> None:
    """Take what only a Ray cluster needs."""
    parser.add_argument(
        "--address",
        metavar="URL",
        default="",
        help="the dashboard; else RAY_API_SERVER_ADDRESS, RAY_ADDRESS, or http://127.0.0.1:8265 (the end of a tunnel)",
    )
    parser.add_argument(
        "--working-dir", metavar="DIR", default="", help="what is sent (default: here), without what git ignores"
    )
    parser.add_argument("--exclude", metavar="PATTERN", action="append", default=[], help="leave these out, too")
    parser.add_argument(
        "--secret", metavar="NAME", action="append", default=[], help="a variable the head must have; it never travels"
    )
    parser.add_argument(
        "--env", metavar="NAME", action="append", default=[], help="a variable of yours to send along; no secret"
    )
    parser.add_argument(
        "--supervise",
        action="store_true",
        help="submit again after the loss of driver or head, until finished; ends if attempts get nowhere",
    )
    parser.add_argument(
        "--patience-s", metavar="S", type=float, help="wait so long for a cluster that is silent (default: 600)"
    )
    parser.add_argument(
        "--pending-s", metavar="S", type=float, help="withdraw a driver that was not started by then (default: 300)"
    )


def run(args: argparse.Namespace) -> int:
    """Submit and follow, or stop what runs."""
    from cluster.runtime.jobs.job_api import JobServer, ServerLostError, find_address
    from cluster.runtime.ray.ray_token import read_token
    from elastic.config_load import load

    server = JobServer(find_address(args.address, os.environ), token=read_token(os.environ))
    config = load(args.config, args.overrides)
    submission = build(args, config)
    reason = "" if args.delete else find_finished_elsewhere(config, os.environ)
    if reason and not _is_closing(server, submission):
        tell_finished(config, reason, json=args.json)
        return 0
    try:
        return _stop(server, submission) if args.delete else _submit(args, server, submission)
    except ServerLostError as error:
        raise ClusterError(
            f"{error} Start Ray's head there, or open the tunnel (ssh -L 8265:127.0.0.1:8265 HEAD)."
        ) from (error)


def build(args: argparse.Namespace, config: RunConfig) -> "Submission":
    """Return what would be sent."""
    from cluster.cost import load_prices
    from cluster.runtime.jobs.submission import build_submission

    load_prices(config.cost)
    missing = [name for name in args.env if "=" not in name and name not in os.environ]
    if missing:
        raise ConfigError(f"--env {missing[0]}: there is no such variable here. Export it first, or leave it out.")
    return build_submission(
        config,
        folder=Path(args.working_dir or "."),
        excludes=args.exclude,
        prices=Path(expand_home(config.cost.price_file)).read_text() if config.cost.price_file else "",
        secrets=args.secret,
        env={name: os.environ.get(name, "") for name in args.env},
    )


def _submit(args: argparse.Namespace, server: "JobServer", submission: "Submission") -> int:
    from cluster.log_lines import LogLines
    from cluster.runtime.jobs.submitter import Ending, Limits, follow, submit
    from cluster.runtime.jobs.supervise import submit_with_patience, supervise

    limits = Limits(patience_s=args.patience_s or _PATIENCE_S, pending_s=args.pending_s or _PENDING_S)
    lines = LogLines(colors="keep" if sys.stdout.isatty() and not args.json else "strip")

    def show(line: str) -> None:
        for shown in lines.take(line):
            (_say if args.json else _show)(shown)

    if args.detach:
        job = submit(server, submission, nonce=secrets.token_hex(8), say=_say)
        if args.json:
            print_json({"run": submission.run, "job": job})
        return 0
    try:
        if args.supervise:
            ending = supervise(server, submission, say=_say, show=show, limits=limits)
        else:
            job = submit_with_patience(server, submission, say=_say, limits=limits)
            ending = job if isinstance(job, Ending) else follow(server, job, say=_say, show=show, limits=limits)
    except KeyboardInterrupt:
        _say("the run goes on without being watched; the same command follows it again, with --delete it ends")
        raise
    for line in lines.flush():
        (_say if args.json else _show)(line)
    if args.json:
        fields = {"run": submission.run, "end": ending.kind, "reason": ending.reason, "attempts": ending.attempts}
        print_json({**fields, "exit_code": ending.exit_code})
    if ending.kind != "finished":
        _say(f"{submission.run} {ending.kind}: {ending.reason}")
    return ending.exit_code


def _is_closing(server: "JobServer", submission: "Submission") -> bool:
    """Tell whether a job of a run that has all its steps goes on, to bring its last rows: it is followed."""
    from cluster.runtime.jobs.job_api import ServerLostError

    try:
        return bool(_list_running(server, submission))
    except ServerLostError:  # who has finished may have given the cluster back
        return False


def _list_running(server: "JobServer", submission: "Submission") -> "list[Job]":
    from cluster.runtime.jobs.submitter import RUN

    return [job for job in server.list_jobs() if job.metadata.get(RUN) == submission.run and not job.has_ended]


def _stop(server: "JobServer", submission: "Submission") -> int:
    from cluster.runtime.jobs.submitter import stop

    ours = _list_running(server, submission)
    for job in ours:
        _say(f"{job.id} saves and ends")
        left = stop(server, job.id, timeout_s=DELETE_S)
        if left and not left.has_ended:
            raise ClusterError(
                f"{job.id} is still {left.status.lower()} though it was asked to stop. Look at its log and the head's "
                "(ray status), then try again."
            )
        _say(f"{job.id}: {left.status.lower() if left else 'gone'}")
    if not ours:
        _say(f"no job of {submission.run} runs there")
    return 0


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _show(line: str) -> None:
    print(line, flush=True)
