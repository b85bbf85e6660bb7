"""What tasks for tools that rent nodes have in common: a fixed number of nodes, one of them the head, and a script.

Such a tool starts all nodes together and, when one is lost, all of them anew; the entrypoint then resumes the run. A
world that shrinks and grows while it trains needs nodes that join one by one, or Kubernetes.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from cluster.kube.options import Options
from cluster.kube.pod_files import check_placement
from cluster.kube.schema import find_problems
from cluster.kube.sizing import OBJECT_STORE_BYTES, Sizes, plan_sizes
from cluster.types import RAY_HEAD_ENV
from elastic.config import RunConfig
from elastic.errors import ConfigError

RAY_TOKEN = "RAY_AUTH_TOKEN"
_FOLDER = "/tmp/solvent-config"
_KUBERNETES_ONLY = ("secret", "auth_secret", "service_account", "node_notices", "queue", "monitor")


def plan_task(config: RunConfig, options: Options) -> tuple[Sizes, int]:
    """Return the sizes of a node, and how many nodes the task has.

    Raises:
        ConfigError: the run or the options do not fit such a task.
    """
    for name in _KUBERNETES_ONLY:
        if getattr(options, name):
            raise ConfigError(
                f"--set {name}={getattr(options, name)} is read by Kubernetes profiles only. Drop it; secrets are "
                "named with --set secret_env=NAME here."
            )
    check_placement(config, options)
    sizes = plan_sizes(config, options)
    nodes = sizes.most_nodes if options.spot_nodes < 0 else options.spot_nodes
    if nodes < sizes.least_nodes:
        raise ConfigError(
            f"--set spot_nodes={nodes} is fewer than the {sizes.least_nodes} node(s) that cluster.min_workers needs: "
            "training would never start. Raise it, or lower cluster.min_workers."
        )
    return sizes, nodes


def build_script(
    config: RunConfig, options: Options, sizes: Sizes, files: Mapping[str, str], *, head_ip: str, rank: str, offer: str
) -> str:
    """Return the bash script that every node runs: the first is Ray's head and the driver, and trains, too.

    It never says `ray stop`, which would also end the Ray that SkyPilot itself runs on. Ray listens on the address by
    which the nodes know each other, with a token; the dashboard on the loop-back interface only.

    Args:
        head_ip: shell expression for the first node's address.
        rank: shell expression for this node's number.
        offer: what was rented, for the prices in cost.price_file.
    """
    workers = sizes.workers_per_node
    gpus = options.gpus_per_node if sizes.uses_gpus else 0
    params = f"--num-cpus={workers * config.cluster.cpus_per_worker} --num-gpus={gpus}"
    params += f" --object-store-memory={OBJECT_STORE_BYTES} --labels=solvent-offer={offer}"
    settings = " ".join(f"{name}={value}" for name, value in RAY_HEAD_ENV.items())
    written = "".join(f"cat > {_FOLDER}/{name} <<'END-OF-FILE'\n{text}END-OF-FILE\n" for name, text in files.items())
    return f"""\
set -euo pipefail
: "${{{RAY_TOKEN}:?set it to the same long random text on all nodes}}"
export RAY_AUTH_MODE=token
head="{head_ip}"
if [ "{rank}" != 0 ]; then
  until ray health-check --address "$head:6379" >/dev/null 2>&1; do sleep 2; done
  ray start --block --address="$head:6379" {params} || true  # it ends with its head
  exit 0
fi
mkdir -p {_FOLDER}
{written}\
{settings} ray start --head --block --node-ip-address="$head" --port=6379 --dashboard-host=127.0.0.1 {params} &
ray_pid=$!
trap 'kill $ray_pid 2>/dev/null; wait $ray_pid || true' EXIT
until ray health-check --address "$head:6379" >/dev/null 2>&1; do sleep 1; done
RAY_ADDRESS="$head:6379" solvent train {_FOLDER}/config.yaml
"""


def get_offer(profile: str, options: Options) -> str:
    """Return the value of the nodes' `solvent-offer` label."""
    return "-".join(part for part in (profile, options.gpu.replace(":", "-")) if part)


def check_task(task: object, kind: Any) -> None:
    """Check a task against its type.

    Raises:
        ConfigError: it would be refused.
    """
    problems: Iterator[str] = find_problems(task, kind)
    for problem in problems:
        raise ConfigError(problem)
