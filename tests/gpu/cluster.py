"""A whole cluster on the GPUs that are there, and what is lost to the changes that befall it.

    python -m tests.gpu.cluster                                     # a node per GPU: kill, drain (20 s), add, remove
    python -m tests.gpu.cluster --events kill drain:5 add remove --model 3b
    python -m tests.gpu.cluster --share                             # two nodes on the first GPU, over gloo; 31 M
    python -m tests.gpu.cluster --random 12 --seed 1 --model 31m --steps 30 --unbroken   # exact over changes by lot?
    python -m tests.gpu.cluster --cpu                               # tries it without GPUs

Head and nodes by `solvent nodes`, training by `solvent train`, all as users start them. Each event comes `--steps`
steps after the world has trained again (a first one like `kill@40` at that step): `kill` a trainer (-9), `drain:S` a
node (SIGTERM, gone in S seconds), `add` a node, `remove` one with all its processes at once, `stop` all at once. Ends
with lines `RESULT {json}`: what each cost, with the phases of the outage, and the steps in between. The last argument
may be overrides of the configuration (`key=value`). Needs Ray.
"""

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from statistics import median

from elastic.data.preparation.prepare import prepare
from elastic.records.attempts import final_rows
from elastic.records.rundir import RunDir, parse_utc, read_rows

PORT = 6399
MARK = "SOLVENT_BENCH_NODE"
"""Names the node that a process belongs to, in its environment."""
SOLVENT = [sys.executable, "-c", "from cluster.cli import enter; enter()"]
DIM = {"dim": 2048, "num_layers": 16, "num_heads": 32, "num_kv_heads": 8, "ffn_dim": 8192, "vocab_size": 128256}
MODELS = {
    "1.5b": DIM,
    "3b": DIM | {"dim": 3072, "num_layers": 28, "num_heads": 24},
    "31m": {"dim": 512, "num_layers": 8, "num_heads": 8, "num_kv_heads": 8, "ffn_dim": 1536, "vocab_size": 8192},
    "tiny": {"dim": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "ffn_dim": 128, "vocab_size": 512},
}
SEEN = re.compile(
    r"restored:|handed over:|left:|ready:|memory of node|not safe|no copy|damaged|Traceback|Error|rehearsed|redone"
)
"""Lines of logs that are shown."""


class Cluster:
    """Head, nodes and a run, as processes of this machine."""

    def __init__(self, folder: Path, args: argparse.Namespace) -> None:
        self.folder, self.args = folder, args
        self.start_s = time.monotonic()
        # short: sockets lie deep below it
        home = Path(tempfile.gettempdir()) / f"sv{os.getpid()}"
        home.mkdir(exist_ok=True)
        self.env = {
            **os.environ,
            "SOLVENT_LOG": "INFO",
            "RAY_TMPDIR": str(home),
            "HOME": str(home),
            "PYTHONUNBUFFERED": "1",
            "RAY_AUTH_MODE": "token",
        }
        self.run = RunDir(folder / "runs" / "g")
        self.nodes: dict[int, subprocess.Popen[bytes]] = {}
        self.head = self._start("head", ["nodes", "head", "--port", str(PORT), "--ip", "127.0.0.1"])
        time.sleep(8)
        self.train: subprocess.Popen[bytes] | None = None

    def say(self, *what: object) -> None:
        print(f"[{time.monotonic() - self.start_s:6.1f}]", *what, flush=True)

    def _start(self, name: str, args: list[str], **env: str) -> "subprocess.Popen[bytes]":
        with (self.folder / f"{name}.log").open("ab") as log:
            command, env = [*SOLVENT, *args], {**self.env, **env}
            return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)

    def add_node(self, index: int, *, grace_s: float) -> None:
        gpu = {} if self.args.cpu else {"CUDA_VISIBLE_DEVICES": "0" if self.args.share else str(index)}
        resources = ["--cpus", "1" if self.args.cpu else "8", "--gpus", "0" if self.args.cpu else "1"]
        join = ["nodes", "join", "--head", f"127.0.0.1:{PORT}", "--ip", "127.0.0.1", "--grace-s", f"{grace_s:g}"]
        self.nodes[index] = self._start(f"node{index}", [*join, *resources], **{MARK: str(index)}, **gpu)

    def start_training(self, config: list[str]) -> None:
        self.train = self._start("train", ["train", *config], RAY_ADDRESS=f"127.0.0.1:{PORT}")

    def get_steps(self) -> list[dict]:
        with suppress(OSError):
            return list(read_rows(self.run.metrics))
        return []

    def get_last(self) -> tuple[int, int]:
        """Return the last step, and how many ranks made it."""
        rows = self.get_steps()
        return (rows[-1]["step"], rows[-1]["world_size"]) if rows else (0, 0)

    def wait_for(self, what: str, condition: Callable[[], bool], limit_s: float) -> None:
        assert self.train
        end_s = time.monotonic() + limit_s
        while not condition():
            if self.train.poll() is not None:
                raise TimeoutError(f"the run ended with {self.train.returncode} before {what}")
            if time.monotonic() > min(end_s, self.start_s + self.args.limit_s):
                raise TimeoutError(f"no {what}; the last step is {self.get_last()}")
            time.sleep(0.1)

    def strike(self, event: str) -> None:
        """Let an event happen; return when the world that it leads to has made a step."""
        kind, _, value = event.partition(":")
        step, size = self.get_last()
        self.say(event, "at step", step)
        index = max(self.nodes)
        attempt = self.get_steps()[-1]["attempt"]
        if kind == "kill":
            if self.args.random:  # in turn: a node whose trainers die three times in a row is left out
                index = sorted(self.nodes)[attempt % len(self.nodes)]
            os.kill(self.find_trainer(index), signal.SIGKILL)
        elif kind == "drain":
            self.nodes.pop(index).send_signal(signal.SIGTERM)
        elif kind == "remove":
            del self.nodes[index]
            for pid in find_processes(index):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        elif kind == "add":
            index = min(set(range(self.args.nodes)) - self.nodes.keys())
            self.add_node(index, grace_s=float(value or self.args.grace_s))
            self.wait_for("a larger world", lambda: self.get_last()[1] > size, 200)
        self.wait_for("another world", lambda: self.get_steps()[-1]["attempt"] > attempt, 150)

    def find_trainer(self, node: int) -> int:
        """Return the process of a node's host that trains: it uses the GPU, or the CPU, more than any other."""
        mine = [pid for pid in find_processes(node) if b"cluster.runtime.node.host" in read(pid, "cmdline")]
        if self.args.cpu:
            trainers = [pid for pid in mine if int(get_stat(pid)[1]) in mine]  # the host is their parent
            return max(trainers, key=lambda pid: sum(map(int, get_stat(pid)[11:13])))
        query = ["nvidia-smi", "--query-compute-apps=used_memory,pid", "--format=csv,noheader,nounits"]
        lines = subprocess.run(query, capture_output=True, text=True, check=True).stdout.splitlines()
        rows = [tuple(int(number) for number in line.split(", ")) for line in lines]
        return max((used, pid) for used, pid in rows if pid in mine)[1]

    def end(self) -> None:
        """End all that was started."""
        if self.train and self.train.poll() is None:
            self.train.send_signal(signal.SIGINT)
            try:
                self.say("the run ended with", self.train.wait(120))
            except subprocess.TimeoutExpired:
                self.say("the run does not end")
        for process in (self.train, *self.nodes.values(), self.head):
            for pid in list_descendants(process.pid) if process else []:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        for node in range(self.args.nodes):
            for pid in find_processes(node):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)


def read(pid: int, name: str) -> bytes:
    """Return a file of a process; nothing once it is gone."""
    try:
        return Path(f"/proc/{pid}/{name}").read_bytes()
    except OSError:
        return b""


def get_stat(pid: int) -> list[bytes]:
    """Return the fields of /proc/<pid>/stat behind the name."""
    return read(pid, "stat").rpartition(b") ")[2].split() or [b"0"] * 50


def list_pids() -> list[int]:
    return [int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()]


def find_processes(node: int) -> list[int]:
    """Return the processes of a node."""
    mark = f"{MARK}={node}".encode()
    return [pid for pid in list_pids() if mark in read(pid, "environ").split(b"\0")]


def list_descendants(pid: int) -> list[int]:
    """Return a process and all that it started."""
    parents = {each: int(get_stat(each)[1]) for each in list_pids()}
    found = [pid]
    for one in found:
        found += [each for each, parent in parents.items() if parent == one]
    return found


def write_data(folder: Path, *, vocab_size: int, num_lines: int) -> Path:
    """Prepare a text with a small vocabulary, which any model can read."""
    lines = [json.dumps({"text": f"In the beginning was the word {n}. " * 8}) for n in range(num_lines)]
    (folder / "a.jsonl").write_text("\n".join(lines))
    prepare([folder / "a.jsonl"], folder / "data", vocab_size=min(300, vocab_size), val_fraction=0.05)
    return folder / "data"


def build_config(args: argparse.Namespace, folder: Path) -> list[str]:
    """Return the configuration's file and overrides."""
    model = MODELS[args.model]
    data = write_data(folder, vocab_size=model["vocab_size"], num_lines=500 if args.cpu else 20_000)
    is_large = args.model in ("1.5b", "3b")
    fields = {
        "run": "g",
        "storage": f"{folder}/runs",
        **{f"model.{name}": value for name, value in model.items()},
        "data.path": data,
        "data.seq_len": 4096 if is_large else 512 if args.model == "31m" else 64,
        "train.steps": 100_000,
        "train.global_batch": 4 if args.model == "3b" else 8,
        "train.micro_batch": 2 if args.model == "3b" else 4,
        "train.eval_every_steps": 100_000,
        "checkpoint.every_steps": args.durable_every,
        "cluster.min_workers": 1,
        "cluster.max_workers": args.nodes,
        "cluster.gpus_per_worker": 0 if args.cpu else 1,
        "cluster.cpus_per_worker": 1 if args.cpu else 4,
        "recompute": "none",
        "precision": "fp32" if args.cpu else "bf16",
        "compile": "false" if args.cpu else "true",
        "wandb.mode": "disabled",
        **({"data.record_samples": "true"} if args.unbroken else {}),
    }
    return ["configs/1.5b-8x24gb-spot.yaml", *(f"{key}={value}" for key, value in fields.items()), *args.overrides]


def draw_events(num_events: int, *, seed: int, num_nodes: int) -> list[str]:
    """Return changes by lot that leave at least one node."""
    lot, here, events = random.Random(seed), num_nodes, list[str]()
    for _ in range(num_events):
        kinds = ["kill", *(["drain:5", "remove"] if here > 1 else []), *(["add"] if here < num_nodes else [])]
        events.append(lot.choice(kinds))
        here += {"add": 1, "drain:5": -1, "remove": -1}.get(events[-1], 0)
    return events


def start_unbroken(cluster: Cluster, config: list[str]) -> "subprocess.Popen[bytes]":
    """Train the same on one device without a cluster, beside it."""
    env = cluster.env | ({} if cluster.args.cpu else {"CUDA_VISIBLE_DEVICES": "0"})
    command = [sys.executable, "-m", "elastic", *config, "run=unbroken"]
    with (cluster.folder / "unbroken.log").open("ab") as log:
        return subprocess.Popen(command, env=env, stdout=log, stderr=subprocess.STDOUT)


def compare(cluster: Cluster, process: "subprocess.Popen[bytes]") -> None:
    """Wait until the run that nothing befalls has come as far, and print how the two differ."""
    last, plain = cluster.get_last()[0], RunDir(cluster.folder / "runs" / "unbroken")
    until_s = cluster.start_s + cluster.args.limit_s
    rows: dict[int, dict] = {}
    while max(rows, default=0) < last and process.poll() is None and time.monotonic() < until_s:
        time.sleep(0.5)
        with suppress(OSError):
            rows = {row["step"]: row for row in read_rows(plain.metrics)}
    process.kill()
    process.wait()
    broken = {row["step"]: row for row in final_rows(cluster.get_steps())}
    steps = sorted(rows.keys() & broken.keys())
    gaps = {step: abs(rows[step]["loss"] - broken[step]["loss"]) for step in steps}
    both = ((plain, rows), (cluster.run, broken))
    consumed = [read_samples(run, {step: of[step]["attempt"] for step in steps}) for run, of in both]
    result = {
        "steps": len(steps),
        "of": last,
        "steps_with_other_samples": sum(consumed[0].get(step) != consumed[1].get(step) for step in steps),
        "samples": sum(len(consumed[1].get(step, ())) for step in steps),
        "largest_gap_of_loss": max(gaps.values(), default=None),
        "at_step": max(gaps, key=gaps.__getitem__, default=None),
        "median_gap": median(gaps.values()) if gaps else None,
        "first_and_last_loss": [rows[step]["loss"] for step in (steps[0], steps[-1])] if steps else [],
    }
    print("RESULT", json.dumps(result))


def read_samples(run: RunDir, attempts: dict[int, int]) -> dict[int, list[int]]:
    """Return the samples of each step, sorted, as the attempt consumed them whose row counts."""
    found: dict[int, list[int]] = {}
    for path in run.root.glob("samples-*.jsonl"):
        attempt = int(path.stem.split("-")[1])
        for row in read_rows(path):
            if attempts.get(row["step"]) == attempt:
                found[row["step"]] = sorted([*found.get(row["step"], []), *row["ids"]])
    return found


def tell(cluster: Cluster, events: list[str]) -> None:
    """Print what happened."""

    def rows(path: Path) -> list[dict]:
        return list(read_rows(path)) if path.exists() else []

    steps = cluster.get_steps()
    for number, incident in enumerate(rows(cluster.run.incidents)):
        event = events[number] if number < len(events) else "?"
        print("RESULT", json.dumps({"event": event, **incident}))
    for size in sorted({row["world_size"] for row in steps}):
        step_s = [row["step_s"] for row in steps if row["world_size"] == size]
        usual = {"ranks": size, "steps": len(step_s), "median_step_s": median(step_s), "longest_step_s": max(step_s)}
        print("RESULT", json.dumps(usual))
    print("RESULT", json.dumps({"ledger_s": sum_states(rows(cluster.run.ledger))}))
    for path in sorted(cluster.folder.glob("*.log")):
        for line in path.read_text(errors="replace").splitlines():
            if SEEN.search(line) or path.name == "train.log":
                print(f"{path.name}: {line[:240]}")


def sum_states(ledger: list[dict]) -> dict[str, float]:
    """Return the seconds that all nodes spent in each state."""
    sums: dict[str, float] = {}
    for row in ledger:
        took_s = parse_utc(row["end_utc"]) - parse_utc(row["start_utc"])
        sums[row["state"]] = round(sums.get(row["state"], 0.0) + took_s, 2)
    return sums


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--events", nargs="*", default=["kill@40", "drain:20", "add", "remove"])
    parser.add_argument("--random", type=int, default=0, help="so many events by lot, in place of --events")
    parser.add_argument("--seed", type=int, default=1, help="of these")
    parser.add_argument("--unbroken", action="store_true", help="compare with a run that nothing befalls")
    parser.add_argument("--steps", type=int, default=60, help="of a world before the next event")
    parser.add_argument("--model", choices=MODELS)
    parser.add_argument("--nodes", type=int, default=2)
    parser.add_argument("--share", action="store_true", help="all nodes on the first GPU")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--durable-every", type=int, default=100, help="steps between two saves to the storage")
    parser.add_argument("--grace-s", type=float, default=20.0, help="of nodes before the first event that names one")
    parser.add_argument("--limit-s", type=float, default=540.0, help="for all of it")
    parser.add_argument("--out", type=Path)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    if args.random:
        args.events = draw_events(args.random, seed=args.seed, num_nodes=args.nodes)
        print("events by lot:", *args.events, flush=True)
    args.model = args.model or ("tiny" if args.cpu else "31m" if args.share else "1.5b")
    folder: Path = args.out or Path(tempfile.mkdtemp(prefix="c-"))
    folder.mkdir(parents=True, exist_ok=True)
    graces = [float(event.partition(":")[2]) for event in args.events if ":" in event]
    cluster = Cluster(folder, args)
    done: list[str] = []
    unbroken: subprocess.Popen[bytes] | None = None
    try:
        for index in range(args.nodes):
            cluster.add_node(index, grace_s=graces[0] if graces else args.grace_s)
        time.sleep(6)
        config = build_config(args, folder)
        cluster.start_training(config)
        unbroken = start_unbroken(cluster, config) if args.unbroken else None
        for planned in args.events:
            event, _, at_step = planned.partition("@")
            first = cluster.get_last()[0]
            until = int(at_step) if at_step else first + args.steps
            cluster.wait_for(f"step {until}", lambda until=until: cluster.get_last()[0] >= until, 330)
            cluster.strike(event)
            done.append(event)
        last = cluster.get_last()[0] + args.steps // 2
        cluster.wait_for(f"step {last}", lambda: cluster.get_last()[0] >= last, 100)
    except TimeoutError as error:
        cluster.say("FAILED:", error)
    finally:
        cluster.end()
        if unbroken:
            compare(cluster, unbroken)
        tell(cluster, done)


if __name__ == "__main__":
    main()
