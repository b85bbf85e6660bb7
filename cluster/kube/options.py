"""What `--set key=value` can say about where and how a run is placed; the run itself is the configuration's matter."""

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from elastic.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class Options:
    """Knobs of `solvent render` and `solvent submit --to kuberay`."""

    image: str = ""
    """The container image, with a tag (not `latest`) or a digest. k8s/Dockerfile builds one. Needed."""
    namespace: str = "default"
    gpu: str = ""
    """The GPU model, as the profile's node label (or the renting tool) calls it. Empty: any."""
    gpus_per_node: int = 1
    cpus_per_node: int = 0
    """CPU cores that a worker pod asks for. 0: what its trainers need, and two for Ray."""
    memory_gib_per_node: int = 0
    """0: estimated from the model and the least number of workers (see sizing.py)."""
    spot_nodes: int = -1
    """Most spot nodes, those that are leaving included. -1: enough for cluster.max_workers, and for as many that leave:
    the replacement of a node under notice is then asked for at once, and not after its end."""
    on_demand_nodes: int = -1
    """Most on-demand nodes, used when there is no spot. -1: enough for cluster.min_workers."""
    head_cpus: int = 2
    head_memory_gib: int = 8
    claim: str = ""
    """The shared volume with the data: a PersistentVolumeClaim (ReadWriteMany), or a volume of the renting tool."""
    claim_path: str = "/mnt/solvent"
    """Where the shared volume is mounted."""
    secret: str = ""
    """Kubernetes: a Secret whose keys become environment variables (WANDB_API_KEY, AWS_ACCESS_KEY_ID, ...)."""
    secret_env: str = ""
    """Renting tools: comma-separated names of environment variables that the tool passes on from the caller's."""
    auth_secret: str = ""
    """A Secret with Ray's token under `auth_token`. Empty: KubeRay makes one per cluster."""
    service_account: str = ""
    """For the cloud's identity (IRSA, workload identity). It must exist. Empty: KubeRay's own on the head only."""
    node_notices: bool = False
    """Let workers read the labels and taints of their nodes, by which some clouds (CoreWeave) and autoscalers say that
    a node goes before its pods are told. Needs service_account, with the rights that solvent render --rights prints."""
    queue: str = ""
    """Kueue's local queue. Kueue cannot follow an autoscaler, so the number of spot nodes is then fixed."""
    monitor: bool = False
    """Write a PodMonitor for the Prometheus operator."""
    monitor_namespace: str = "monitoring"
    """Where Prometheus runs; it may connect to the metrics port."""
    backoff_limit: int = 20
    """New clusters after a lost head or a failed attempt; each resumes the run. What cannot get better is not tried."""
    pre_running_deadline_s: int = 3600
    """An attempt that has no head and no driver by then fails, and the next one starts."""
    active_deadline_s: int = 14 * 86400
    """The job ends when an attempt has taken so long: KubeRay tries no other then. It bounds what a hang can cost."""
    keep_finished_s: int = 60
    """The cluster of a job that has ended, however it did, is deleted after this; the driver's log stays readable."""

    def __post_init__(self) -> None:
        for name in ("gpus_per_node", "head_cpus", "head_memory_gib", "pre_running_deadline_s", "active_deadline_s"):
            self._require_at_least(1, name)
        for name in ("cpus_per_node", "memory_gib_per_node", "backoff_limit", "keep_finished_s"):
            self._require_at_least(0, name)
        for name in ("spot_nodes", "on_demand_nodes"):
            self._require_at_least(-1, name)
        if not re.fullmatch(r"(/[A-Za-z0-9][A-Za-z0-9._-]*)+", self.claim_path):
            raise ConfigError(
                f"--set claim_path={self.claim_path} is no absolute path of plain names, so nothing can be mounted "
                "there. Try --set claim_path=/mnt/solvent."
            )
        if self.node_notices and not self.service_account:
            raise ConfigError(
                "--set node_notices=true needs a service account that may read nodes, and no pod would have one. Add "
                "--set service_account=NAME, and apply what solvent render ... --rights prints."
            )
        for name in self.secret_names:
            if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
                raise ConfigError(
                    "--set secret_env takes names of environment variables only, separated by commas; a value would "
                    "end up in the file. Try --set secret_env=WANDB_API_KEY."
                )

    def _require_at_least(self, least: int, name: str) -> None:
        value = getattr(self, name)
        if not least <= value < 2**31:
            raise ConfigError(
                f"--set {name}={value} must be between {least} and {2**31 - 1}. Try {name}={max(least, 1)}."
            )

    @property
    def secret_names(self) -> list[str]:
        """The names in `secret_env`."""
        return [name.strip() for name in self.secret_env.split(",") if name.strip()]


def parse_options(settings: Sequence[str]) -> Options:
    """Build options from `key=value` texts; the last of a key wins.

    Raises:
        ConfigError: unknown key, or a value that is not of the key's type.
    """
    fields: dict[str, Any] = {field.name: field.default for field in dataclasses.fields(Options)}
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, text = setting.partition("=")
        if key not in fields:
            near = get_close_matches(key, fields, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Keys are: {', '.join(fields)}."
            raise ConfigError(f"--set {setting}: there is no option {key!r}. {hint}")
        if not equals:
            raise ConfigError(f"--set {setting} has no value. Type --set {key}=VALUE.")
        values[key] = _parse_value(key, text, fields[key])
    return Options(**values)


def _parse_value(key: str, text: str, default: object) -> object:
    if isinstance(default, bool):
        if text not in ("true", "false"):
            raise ConfigError(f"--set {key}={text} must be true or false. Type --set {key}=true.")
        return text == "true"
    if isinstance(default, int):
        try:
            return int(text)
        except ValueError:
            raise ConfigError(
                f"--set {key}={text} must be a whole number. Type --set {key}={max(default, 1)}, for example."
            ) from None
    return text
