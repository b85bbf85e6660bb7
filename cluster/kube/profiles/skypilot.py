"""A task for SkyPilot's command line: `sky jobs launch --secret RAY_AUTH_TOKEN task.yaml`.

Source: docs.skypilot.co/en/stable/reference/yaml-spec.html (read 2026-11). SkyPilot is never imported: its needs and
ours do not fit into one environment.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, NotRequired, TypedDict, cast

from cluster.kube.manifests import EnvName, Manifest, Positive
from cluster.kube.names import get_job_name
from cluster.kube.options import Options
from cluster.kube.schema import Pattern, Range
from cluster.kube.tasks import RAY_TOKEN, build_script, check_task, get_offer, plan_task
from elastic.config import RunConfig
from elastic.errors import ConfigError

_DockerImage = Annotated[
    str, Pattern(r"docker:[a-z0-9][a-z0-9._/:-]*(@sha256:[0-9a-f]{64}|:(?!latest$)[A-Za-z0-9_][\w.-]*)")
]
_AtLeast = Annotated[str, Pattern(r"[0-9]+\+")]


class Market(TypedDict):
    """Spot or not."""

    use_spot: bool


class JobRecovery(TypedDict):
    """What a managed job does when a node is lost, or the script fails."""

    strategy: Literal["FAILOVER", "EAGER_NEXT_REGION"]
    max_restarts_on_errors: Annotated[int, Range(0, 2**31 - 1)]


class Resources(TypedDict):
    """Of each node."""

    cpus: _AtLeast
    memory: _AtLeast
    image_id: _DockerImage
    accelerators: NotRequired[Annotated[str, Pattern(r"[A-Za-z0-9._-]+:[1-9][0-9]*")]]
    job_recovery: JobRecovery
    ordered: list[Market]


class Bucket(TypedDict):
    """A mounted bucket."""

    source: Annotated[str, Pattern(r"[a-z0-9]+://.+")]
    mode: Literal["MOUNT", "MOUNT_CACHED", "COPY"]


class Task(TypedDict):
    """A SkyPilot task."""

    name: str
    num_nodes: Positive
    resources: Resources
    file_mounts: NotRequired[dict[str, Bucket]]
    volumes: NotRequired[dict[str, str]]
    secrets: dict[EnvName, None]
    run: str


def render(config: RunConfig, options: Options, files: Mapping[str, str]) -> list[Manifest]:
    """Return the one document."""
    sizes, nodes = plan_task(config, options)
    resources: Resources = {
        "cpus": f"{sizes.cpus}+",
        "memory": f"{sizes.memory_gib}+",
        "image_id": f"docker:{options.image}",
        "job_recovery": {"strategy": "EAGER_NEXT_REGION", "max_restarts_on_errors": options.backoff_limit},
        "ordered": [{"use_spot": True}, {"use_spot": False}],
    }
    if sizes.uses_gpus:
        if not options.gpu:
            raise ConfigError("SkyPilot must know which GPU to rent. Say it: --set gpu=H100, for example.")
        resources["accelerators"] = f"{options.gpu}:{options.gpus_per_node}"
    # Without a value here, SkyPilot asks for one from the caller's environment (--secret NAME).
    task: Task = {
        "name": get_job_name(config.run),
        "num_nodes": nodes,
        "resources": resources,
        "secrets": dict.fromkeys([RAY_TOKEN, *options.secret_names]),
        "run": build_script(
            config,
            options,
            sizes,
            files,
            head_ip='$(echo "$SKYPILOT_NODE_IPS" | head -n 1)',
            rank="$SKYPILOT_NODE_RANK",
            offer=get_offer("skypilot", options),
        ),
    }
    if "://" in options.claim:
        task["file_mounts"] = {options.claim_path: {"source": options.claim, "mode": "MOUNT"}}
    elif options.claim:
        task["volumes"] = {options.claim_path: options.claim}
    check_task(task, Task)
    return [cast(Manifest, task)]
