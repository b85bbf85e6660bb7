"""A task for dstack's command line: `dstack apply -f run.dstack.yml`.

Source: dstack.ai/docs/reference/dstack.yml/task (read 2026-11). dstack is never imported.
"""

from collections.abc import Mapping
from typing import Annotated, Literal, NotRequired, TypedDict, cast

from cluster.kube.manifests import Manifest, PinnedImage, Positive
from cluster.kube.names import get_job_name
from cluster.kube.options import Options
from cluster.kube.schema import Pattern
from cluster.kube.tasks import RAY_TOKEN, build_script, check_task, get_offer, plan_task
from elastic.config import RunConfig

_Size = Annotated[str, Pattern(r"[0-9]+GB(\.\.)?")]


class Resources(TypedDict):
    """Of each node."""

    cpu: Annotated[str, Pattern(r"[0-9]+\.\.")]
    memory: _Size
    shm_size: _Size
    gpu: NotRequired[Annotated[str, Pattern(r"([A-Za-z0-9._-]+:)?[1-9][0-9]*")]]


class Retry(TypedDict):
    """When the whole task starts anew."""

    on_events: list[Literal["no-capacity", "interruption", "error"]]
    duration: Annotated[str, Pattern(r"[0-9]+[smhdw]")]


class Mount(TypedDict):
    """A network volume."""

    name: Annotated[str, Pattern(r"[a-z0-9][a-z0-9-]*")]
    path: str


class Task(TypedDict):
    """A dstack task."""

    type: Literal["task"]
    name: str
    nodes: Positive
    image: PinnedImage
    shell: Literal["bash"]
    env: list[Annotated[str, Pattern(r"[A-Za-z_][A-Za-z0-9_]*")]]
    commands: list[str]
    resources: Resources
    spot_policy: Literal["spot", "on-demand", "auto"]
    retry: Retry
    max_duration: Annotated[str, Pattern(r"[0-9]+[smhdw]")]
    volumes: NotRequired[list[Mount]]


def render(config: RunConfig, options: Options, files: Mapping[str, str]) -> list[Manifest]:
    """Return the one document."""
    sizes, nodes = plan_task(config, options)
    resources: Resources = {
        "cpu": f"{sizes.cpus}..",
        "memory": f"{sizes.memory_gib}GB..",
        "shm_size": f"{-(-sizes.shm_mib // 1024)}GB",
    }
    if sizes.uses_gpus:
        resources["gpu"] = f"{options.gpu}:{options.gpus_per_node}" if options.gpu else str(options.gpus_per_node)
    duration = f"{options.active_deadline_s}s"
    task: Task = {
        "type": "task",
        "name": get_job_name(config.run),
        "nodes": nodes,
        "image": options.image,
        "shell": "bash",
        "env": [RAY_TOKEN, *options.secret_names],  # without values: dstack takes them from the caller's environment
        "commands": [
            build_script(
                config,
                options,
                sizes,
                files,
                head_ip="$DSTACK_MASTER_NODE_IP",
                rank="$DSTACK_NODE_RANK",
                offer=get_offer("dstack", options),
            )
        ],
        "resources": resources,
        "spot_policy": "auto",
        "retry": {"on_events": ["no-capacity", "interruption", "error"], "duration": duration},
        "max_duration": duration,
    }
    if options.claim:
        task["volumes"] = [{"name": options.claim, "path": options.claim_path}]
    check_task(task, Task)
    return [cast(Manifest, task)]
