"""What elasticity costs while nothing happens: the same training on a cluster, beside one, and without, in turn.

    python -m tests.bench_steady [--nodes N] [--repeat N] [--steps N] [--json FILE]

Without: `torchrun -m elastic`, a rank per node. With: `solvent train` on a local Ray cluster of so many nodes with one
rank each: snapshots in memory, copies for peers, heartbeats, records and watches are on, and the raylets of the nodes
run. Beside: `torchrun` again, while such a cluster is there and has nothing to do. All train the model of
`bench_recovery` on the same batches and save to the disk at the same steps. A step lasts from its row to the next row,
so that what saves and snapshots hold up counts; the rows' own `step_s`, which leaves that out, is shown beside it. The
first steps do not count. Prints medians of each repeat, and that of their ratios to `torchrun` alone.

Here the cluster's own processes (a head, and a raylet per node) take turns with the ranks on the same cores, which no
real node makes them do: "beside" shows what they cost, and with fewer nodes than cores neither does.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from itertools import pairwise
from pathlib import Path
from statistics import median

import yaml

from elastic.data.preparation.prepare import prepare
from elastic.records.rundir import RunDir, parse_utc, read_rows
from tests.bench_recovery import LIMIT_S, MODEL, NUM_NODES, SETTINGS, write_text
from tests.ray._nodes import Nodes, get_env
from tests.ray._runs import TINY, Run

WARM_UP_STEPS = 30
SETTINGS = {**SETTINGS, "checkpoint.every_steps": 50, "strategy": "fsdp2"}


def train_without(folder: Path, *, num_nodes: int, steps: int, number: int, name: str = "without") -> list[dict]:
    """Train without a cluster; return the rows."""
    name = f"{name}-{number}"
    config = folder / "plain.yaml"
    config.write_text(yaml.safe_dump(TINY))
    changes = {**SETTINGS, "run": name, "storage": folder, "data.path": folder / "data", "train.steps": steps}
    changes |= {"cluster.max_workers": num_nodes}
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(num_nodes), "-m", "elastic"]
    subprocess.run(
        [*launch, config, *(f"{key}={value}" for key, value in changes.items())],
        check=True,
        stdout=subprocess.DEVNULL,
        env=get_env(folder),
        timeout=LIMIT_S,
    )
    return list(read_rows(RunDir(folder / name).metrics))


def train_with(folder: Path, *, num_nodes: int, steps: int, number: int) -> list[dict]:
    """Train on a cluster that is there for this run only; return the rows."""
    nodes = Nodes(folder, num_nodes=num_nodes, is_measured=True)
    try:
        settings = {**SETTINGS, "train.steps": steps, "run": f"with-{number}"}
        settings |= {"cluster.min_workers": num_nodes, "cluster.max_workers": num_nodes}
        run = Run(nodes, folder / "data", folder, **settings)
        run.start()
        code = run.wait(timeout_s=LIMIT_S)
        assert code == 0, run.get_output()
        return run.rows()
    finally:
        nodes.close()


def train_beside(folder: Path, *, num_nodes: int, steps: int, number: int) -> list[dict]:
    """Train without a cluster while one is there; return the rows."""
    nodes = Nodes(folder, num_nodes=num_nodes, is_measured=True)
    try:
        return train_without(folder, num_nodes=num_nodes, steps=steps, number=number, name="beside")
    finally:
        nodes.close()


def summarize(rows: list[dict], *, num_nodes: int) -> dict:
    """Return median milliseconds of the steps that count.

    Raises:
        RuntimeError: the world was not the same throughout, so that the numbers are of something else.
    """
    if {(row["attempt"], row["world_size"]) for row in rows} != {(1, num_nodes)}:
        raise RuntimeError(
            f"something happened during the run: {rows[-1]}. Run it again on a machine that is left alone."
        )
    counted = rows[WARM_UP_STEPS:]
    times_s = [parse_utc(row["time_utc"]) for row in counted]
    return {
        "step_ms": round(1e3 * median(b - a for a, b in pairwise(times_s)), 2),
        "row_step_ms": round(1e3 * median(row["step_s"] for row in counted), 2),
        "steps": len(counted),
        "last_loss": rows[-1]["loss"],
    }


WAYS = {"without": train_without, "with": train_with, "beside": train_beside}
RATIOS = [(way, key) for way in ("with", "beside") for key in ("step_ms", "row_step_ms")]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--nodes", type=int, default=NUM_NODES)
    parser.add_argument("--repeat", type=int, default=4)
    parser.add_argument("--steps", type=int, default=180)
    parser.add_argument("--json", type=Path, help="file for the result")
    args = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="s-"))
    repeats = []
    try:
        prepare([write_text(folder)], folder / "data", vocab_size=MODEL["vocab_size"])
        for number in range(args.repeat):
            order = list(WAYS) if number % 2 == 0 else list(reversed(WAYS))  # a machine that slows down favours none
            repeat = {
                way: summarize(
                    WAYS[way](folder, num_nodes=args.nodes, steps=args.steps, number=number), num_nodes=args.nodes
                )
                for way in order
            }
            for way, key in RATIOS:
                repeat[f"{way}_{key}_ratio"] = round(repeat[way][key] / repeat["without"][key], 4)
            repeats.append({"load_average": os.getloadavg()[0], **repeat})
            print(json.dumps(repeats[-1]), flush=True)
    finally:
        shutil.rmtree(folder)
    result = {
        "cores": os.cpu_count(),
        "ranks": args.nodes,
        **{
            f"{way}_{key}_ratio": round(median(repeat[f"{way}_{key}_ratio"] for repeat in repeats), 4)
            for way, key in RATIOS
        },
        "repeats": repeats,
    }
    print(json.dumps({key: value for key, value in result.items() if key != "repeats"}))
    if args.json:
        args.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
