"""What is right and wrong with this machine, before a run finds out. Each check reads one thing and judges it.

The judges are pure: they take what was read, so that a test can have any machine. Nothing secret is ever read into a
text: of a key, only whether there is one.
"""

import importlib.metadata
import json
import netrc
import resource
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from cluster.planner.host_memory import plan_snapshots
from cluster.providers import (
    ALWAYS,
    RAY_DEFAULT_S,
    RAY_SETTING,
    Evidence,
    Feed,
    Machine,
    detect_all,
    get_date_skew_s,
    load,
)
from elastic.checkpoint.staging.host_memory import WAYS, get_available_bytes
from elastic.config import RunConfig
from elastic.errors import NoticeError, SolventError
from elastic.paths import STAND_IN

CORE = ("torch", "ray", "numpy", "pyarrow", "omegaconf", "tokenizers", "wandb")
GIB = 1 << 30
_DEVICES = """
import json, torch
gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
print(json.dumps({"gpus": [[gpu.name, gpu.total_memory] for gpu in gpus], "cuda": torch.version.cuda}))
"""


@dataclass(frozen=True, kw_only=True)
class Check:
    """One line of the report."""

    name: str
    status: Literal["ok", "warn", "fail"]
    text: str
    fix: str = ""
    """What to do about it, unless it is ok."""


def examine(
    machine: Machine,
    *,
    config: RunConfig | None,
    folder: Path,
    subreaper: str,
    token_file: Path,
    find_address: Callable[[], str | None],
) -> list[Check]:
    """Return every check of this machine. It takes seconds: torch and the metadata servers are asked.

    Args:
        config: the run that it is for; None: none in particular.
        folder: where runs would be written.
        subreaper: the variable under which Ray kills what must outlive its workers.
        token_file: where Ray keeps this user's token.
        find_address: returns where a driver would connect; raises if no head answers there.
    """
    evidence, devices = detect_all(machine), _ask_torch()
    snapshots = [check_snapshots(config, _count_gpus(devices), get_available_bytes())] if config else []
    return [
        *check_providers(evidence),
        *check_endpoints(machine, [name for name, found in evidence.items() if found.is_here and name != ALWAYS]),
        check_python(sys.version_info[:3]),
        *check_versions(_get_requirements(), _get_version),
        check_devices(devices),
        *snapshots,
        check_space("/dev/shm", _get_free_bytes(Path("/dev/shm")), warn_bytes=2 * GIB, fail_bytes=GIB // 4),
        check_space(f"disk at {folder}", _get_free_bytes(folder), warn_bytes=20 * GIB, fail_bytes=GIB),
        check_files(resource.getrlimit(resource.RLIMIT_NOFILE)[0]),
        check_home(machine.env),
        *check_token_file(token_file),
        *check_ray_address(machine.env, find_address),
        *check_ray_settings(machine.env, subreaper=subreaper),
        check_wandb(machine.env, has_netrc=_has_netrc(machine)),
    ]


# ---- notices


def check_providers(evidence: Mapping[str, Evidence]) -> list[Check]:
    """Say whose machine this is, and why; several may be right."""
    here = [name for name, found in evidence.items() if found.is_here and name != ALWAYS]
    if here:
        return [Check(name=f"provider {name}", status="ok", text=evidence[name].why) for name in here]
    why = "; ".join(f"{name}: {found.why}" for name, found in evidence.items() if not found.is_here)
    fix = (
        "Set cluster.notices to the provider if this machine is one's, or let a script write the notice file "
        "(cluster/README.md, Notices)."
    )
    return [Check(name="provider", status="warn", text=f"none that is known ({why})", fix=fix)]


def check_endpoints(machine: Machine, names: Iterable[str]) -> list[Check]:
    """Ask every address at which the providers publish notices, and look at its clock."""
    checks: list[Check] = []
    for name in names:
        try:
            feeds = load(name).open_feeds(machine)
        except SolventError as error:
            checks.append(Check(name=f"notices {name}", status="fail", text=str(error), fix="Mend the setting."))
            continue
        checks += [_check_feed(name, feed) for feed in feeds if feed.url]
        checks += [_check_clock(machine, url) for url in sorted({feed.url for feed in feeds if feed.url})[:1]]
        for feed in feeds:
            feed.close()
    return checks


def _check_feed(name: str, feed: Feed) -> Check:
    title = f"notices {name} ({feed.name})"
    try:
        notices = feed.read()
    except NoticeError as error:
        return Check(name=title, status="fail", text=str(error), fix="Without it this node leaves without notice.")
    except OSError as error:
        fix = "Let this machine (or its container: a hop limit of 2) reach it, or set cluster.notices."
        return Check(name=title, status="fail", text=f"{feed.url} does not answer: {error}", fix=fix)
    if notices:
        fix = "This node is about to go: do not start here."
        return Check(name=title, status="warn", text=", ".join(notice.reason for notice in notices), fix=fix)
    return Check(name=title, status="ok", text=f"{feed.url} answers: nothing planned")


def _check_clock(machine: Machine, url: str) -> Check:
    try:
        skew_s = get_date_skew_s(machine.fetch(url))  # any answer has a Date, a refusal too
    except OSError:
        skew_s = None
    return judge_clock(skew_s)


def judge_clock(skew_s: float | None) -> Check:
    """Judge how far the metadata server's clock is ahead of ours, in seconds."""
    if skew_s is None:
        return Check(name="clock", status="warn", text="the metadata server tells no time", fix="Check that NTP runs.")
    text = f"{-skew_s:+.0f} s against the metadata server"
    if abs(skew_s) > 2:
        fix = "Run NTP (chrony): deadlines are set against that clock, but logs and leases are not."
        return Check(name="clock", status="warn", text=text, fix=fix)
    return Check(name="clock", status="ok", text=text)


# ---- software


def check_python(version: Sequence[int]) -> Check:
    """Judge the interpreter."""
    text = ".".join(map(str, version))
    if (3, 11) <= tuple(version[:2]) < (3, 14):
        return Check(name="python", status="ok", text=text)
    return Check(name="python", status="fail", text=text, fix="Use Python 3.11, 3.12 or 3.13.")


def check_versions(requirements: Sequence[str], get_version: Callable[[str], str | None]) -> list[Check]:
    """Judge what is installed by what this distribution requires.

    Args:
        requirements: as in the metadata of the distribution.
        get_version: returns the installed version of a distribution, or None.
    """
    specifiers = {parsed.name: parsed.specifier for parsed in map(Requirement, requirements) if not parsed.marker}
    checks: list[Check] = []
    for name in CORE:
        version, wanted = get_version(name), specifiers.get(name)
        if version is None:
            checks.append(
                Check(name=name, status="fail", text="not installed", fix=f"pip install '{name}{wanted or ''}'")
            )
        elif wanted is not None and not wanted.contains(version, prereleases=True):
            fix = f"pip install '{name}{wanted}': other versions were not checked."
            checks.append(Check(name=name, status="fail", text=version, fix=fix))
        else:
            checks.append(Check(name=name, status="ok", text=version))
    return checks


def _get_requirements() -> list[str]:
    try:
        return importlib.metadata.requires("solvent") or []
    except importlib.metadata.PackageNotFoundError:  # run from its source
        return tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]["dependencies"]


def _get_version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


# ---- the machine


def _ask_torch() -> str:
    """Return what torch says of the devices, as JSON; in a process of its own, as trainers have it."""
    try:
        done = subprocess.run(
            [sys.executable, "-c", _DEVICES], capture_output=True, text=True, timeout=120, check=False
        )
    except subprocess.TimeoutExpired:
        return "torch did not answer within 120 s"
    return done.stdout if done.returncode == 0 else done.stderr.strip().rpartition("\n")[2]


def check_devices(answer: str) -> Check:
    """Judge what torch finds; `answer` is JSON, or the last line of its error."""
    try:
        found = json.loads(answer)
    except ValueError:
        fix = "Mend the installation of torch, or of the driver that it complains about."
        return Check(name="devices", status="fail", text=answer or "torch did not start", fix=fix)
    if found["gpus"]:
        text = ", ".join(f"{name} ({memory / GIB:.0f} GiB)" for name, memory in found["gpus"])
        return Check(name="devices", status="ok", text=f"{text}; CUDA {found['cuda']}")
    if found["cuda"]:
        fix = "If there should be GPUs: look at nvidia-smi, and at the container's device access."
        return Check(name="devices", status="warn", text=f"no GPU, though torch has CUDA {found['cuda']}", fix=fix)
    return Check(name="devices", status="ok", text="CPU only")


def _count_gpus(answer: str) -> int:
    try:
        return len(json.loads(answer)["gpus"])
    except ValueError:  # which `check_devices` tells
        return 0


def check_snapshots(config: RunConfig, num_gpus: int, available_bytes: int | None) -> Check:
    """Judge the host memory that snapshots of a run take on this node while as many ranks train as may.

    Args:
        num_gpus: of this machine.
        available_bytes: what processes here can still take; None: the kernel does not say.
    """
    name = "memory for snapshots"
    if config.checkpoint.memory == "off":
        return Check(name=name, status="ok", text="none: checkpoint.memory=off")
    per_worker, most = config.cluster.gpus_per_worker, config.cluster.max_workers
    here = min(most or num_gpus, int(num_gpus // per_worker)) if per_worker else most or 1
    ranks = max(here, 1)
    world_size = max(most, ranks)
    wanted = plan_snapshots(config, world_size=world_size, ranks_per_node=ranks)
    best, shard_bytes, has_peers = wanted.num_shards, wanted.shard_bytes, wanted.num_copies > 0
    need_gib, free_gib = wanted.num_bytes / GIB, (available_bytes or 0) / GIB
    text = f"{need_gib:.1f} GiB for {ranks} of {world_size} rank(s), {best} shards of {shard_bytes / GIB:.2f} GiB each"
    if available_bytes is None:
        return Check(name=name, status="ok", text=f"{text}; the kernel does not say what is free")
    text = f"{text}; {free_gib:.1f} GiB are free"
    for num_buffers, most_copies in WAYS:
        num_shards = num_buffers + (most_copies if has_peers else 0)
        if ranks * num_shards * shard_bytes + GIB < available_bytes:
            if num_shards == best:
                return Check(name=name, status="ok", text=text)
            without_copies = has_peers and not most_copies
            means = (
                "a lost node falls back on the storage"
                if without_copies and num_buffers > 1
                else "a lost trainer may fall back on the storage"
                if num_buffers == 1
                else "snapshots come less often"
            )
            fix = "Give it more memory, or take more, smaller nodes."
            return Check(name=name, status="warn", text=f"{text}, so {num_shards} are kept: {means}", fix=fix)
    fix = "Give it more memory, take more nodes, or set checkpoint.memory=off."
    return Check(name=name, status="warn", text=f"{text}: none is kept, every loss falls back on the storage", fix=fix)


def _get_free_bytes(path: Path) -> int | None:
    while not path.exists() and path != path.parent:  # it would be made
        path = path.parent
    try:
        return shutil.disk_usage(path).free
    except OSError:
        return None


def check_space(name: str, free_bytes: int | None, *, warn_bytes: int, fail_bytes: int) -> Check:
    """Judge free space; None: there is no such place."""
    if free_bytes is None:
        return Check(name=name, status="fail", text="cannot be read", fix="Mount it, or use another place.")
    text = f"{free_bytes / GIB:.1f} GiB free"
    if free_bytes < warn_bytes:
        fix = "Make room; in a container, give it a larger one (docker --shm-size, a memory-backed emptyDir)."
        return Check(name=name, status="fail" if free_bytes < fail_bytes else "warn", text=text, fix=fix)
    return Check(name=name, status="ok", text=text)


def check_files(limit: int) -> Check:
    """Judge the limit of open files; Ray and the data loader hold many."""
    text = "unlimited" if limit == resource.RLIM_INFINITY else str(limit)
    if limit != resource.RLIM_INFINITY and limit < 65536:
        status = "fail" if limit < 1024 else "warn"
        return Check(name="open files", status=status, text=text, fix="ulimit -n 65536 before Ray starts.")
    return Check(name="open files", status="ok", text=text)


def check_home(env: Mapping[str, str]) -> Check:
    """Judge the home: the command has put one in the place of one that is not there or cannot be written."""
    home = env.get("HOME", "")
    if not Path(home).name.startswith(STAND_IN):
        return Check(name="home", status="ok", text=home)
    fix = "Set HOME to a folder that this user can write, and that stays: logins and Ray's token are looked for there."
    return Check(name="home", status="warn", text=f"none that can be written; {home} takes its place", fix=fix)


def check_token_file(path: Path) -> list[Check]:
    """Judge who may read the token that opens this user's clusters; nothing if there is none."""
    try:
        mode = path.stat().st_mode
    except OSError:
        return []
    if mode & 0o077:
        fix = f"chmod 600 {path}: whoever has it can run anything on the cluster. Ray makes it readable for all."
        return [Check(name="Ray token", status="warn", text=f"{path} can be read by others", fix=fix)]
    return [Check(name="Ray token", status="ok", text=f"{path} is this user's alone")]


def check_ray_address(env: Mapping[str, str], find_address: Callable[[], str | None]) -> list[Check]:
    """Say whether a head answers where RAY_ADDRESS says; nothing if it does not say."""
    name = "RAY_ADDRESS"
    if not env.get(name):
        return []
    try:
        address = find_address()
    except SolventError as error:
        fix = "Correct or unset it: train would not connect."
        return [Check(name=name, status="fail", text=str(error), fix=fix)]
    text = f"a head answers at {address}" if address else "a cluster of its own on this machine"
    return [Check(name=name, status="ok", text=text)]


def check_ray_settings(env: Mapping[str, str], *, subreaper: str) -> list[Check]:
    """Judge the variables with which Ray would be started from here."""
    checks: list[Check] = []
    if env.get(subreaper, "0").lower() in ("1", "true"):
        fix = "Unset it: Ray would kill the hosts of trainers, which must outlive its workers."
        checks.append(Check(name=subreaper, status="fail", text="is set", fix=fix))
    if env.get("RAY_LOG_TO_STDERR", "0") == "1":
        fix = "Unset it: a SIGTERM is found in the raylet's log file, and is otherwise believed to leave 30 s."
        checks.append(Check(name="RAY_LOG_TO_STDERR", status="warn", text="is set", fix=fix))
    text = env.get(RAY_SETTING, "")
    try:
        lead_s = float(text or RAY_DEFAULT_S)
    except ValueError:
        fix = "Set seconds: just less than what the machine grants after SIGTERM."
        return [*checks, Check(name=RAY_SETTING, status="fail", text=f"is {text!r}", fix=fix)]
    if lead_s <= 0:
        fix = "Unset it: a node that gets SIGTERM would end at once, without notice to anybody."
        checks.append(Check(name=RAY_SETTING, status="fail", text=f"is {text}", fix=fix))
    else:
        note = f"after SIGTERM Ray ends in {lead_s:g} s, also where the machine grants more"
        checks.append(Check(name=RAY_SETTING, status="ok", text=note))
    return checks


def _has_netrc(machine: Machine) -> bool:
    path = Path(machine.env.get("NETRC") or Path(machine.env.get("HOME", "/")) / ".netrc")
    host = machine.env.get("WANDB_BASE_URL", "https://api.wandb.ai").partition("://")[2].partition("/")[0]
    try:
        return netrc.netrc(path).authenticators(host.partition(":")[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def check_wandb(env: Mapping[str, str], *, has_netrc: bool) -> Check:
    """Say whether W&B could go online; a run needs that only for wandb.mode=online, or WANDB_MODE=online."""
    if env.get("WANDB_API_KEY"):
        return Check(name="wandb", status="ok", text="logged in by WANDB_API_KEY")
    if has_netrc:
        return Check(name="wandb", status="ok", text="logged in by .netrc")
    fix = "wandb login, if runs shall appear online; offline runs need no account."
    return Check(name="wandb", status="warn", text="not logged in: wandb.mode=online would fail", fix=fix)
