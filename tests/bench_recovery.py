"""Recovery of Solvent beside that of a plain Ray Train recipe, one after the other on this machine.

    python -m tests.bench_recovery [--peer MEASURE_PY] [--repeat N] [kill agent_kill remove freeze add drain drain_two]

Prints one JSON line per event and a table of medians. `drain_two` gives notice to the node of rank 0 and to another
one at once; the peer, whose script has no such event, is shown with its drain of one node. `agent_kill` kills the
process that Ray Train counts, to the peer its trainer; ours trains on, and its outage is the longest step until Ray has
replaced all agents. `freeze` stops every process of a node, so that no connection ends. Both train a decoder of 0.9
M parameters with FSDP2 in bf16 on three nodes, 12 sequences of 64 tokens a step, and save every ten steps; the peer
sleeps until a step has taken a quarter of a second, which leaves its cores free, and ours trains as fast as it can. An
outage is counted as the peer counts it: from the kill or the removal, or for planned changes from the last step of the
old world, to the first step of the new one.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median

from cluster.chaos.process_tree import find_family
from elastic.data.preparation.kjv import read_chapters
from elastic.data.preparation.prepare import prepare
from elastic.records.rundir import parse_utc, read_rows
from tests.ray._nodes import Nodes
from tests.ray._runs import Run
from tests.ray._traces import find_agents, find_trainers, get_node, get_parent

PEER_EVENTS = {
    **{event: event for event in ("kill", "remove", "add", "drain")},
    "agent_kill": "kill",
    "freeze": None,
    "drain_two": "drain",
}
"""Our events, and what the peer is shown with."""
NOTICE_S = 15.0
NUM_NODES = 3
SETTLE_S = 12.0
LIMIT_S = 240.0
MODEL = {"dim": 128, "num_layers": 4, "num_heads": 4, "num_kv_heads": 4, "ffn_dim": 352, "vocab_size": 512}
SETTINGS = {
    **{f"model.{key}": value for key, value in MODEL.items()},
    "data.seq_len": 64,
    "data.record_samples": False,
    "train.steps": 100_000,
    "train.global_batch": 12,
    "train.micro_batch": 12,
    "precision": "bf16",
    "recompute": "full",
    "checkpoint.every_steps": 10,
    "cluster.max_workers": NUM_NODES + 1,
}


def measure_peer(script: Path, events: list[str]) -> list[dict]:
    """Run the peer's own script and return its lines."""
    lines = subprocess.run(
        [sys.executable, script, *events], check=True, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    ).stdout.splitlines()
    return [json.loads(line) for line in lines if line.startswith("{")]


def measure_ours(events: list[str], *, repeat: int) -> list[dict]:
    """Let the same events happen to a run of ours, several times in turn."""
    folder = Path(tempfile.mkdtemp(prefix="b-"))
    try:
        prepare([write_text(folder)], folder / "data", vocab_size=MODEL["vocab_size"])
        nodes = Nodes(folder, num_nodes=NUM_NODES, is_measured=True)
        run = Run(nodes, folder / "data", folder / "runs", **SETTINGS)
        try:
            run.start()
            run.wait_for_step(25, timeout_s=LIMIT_S)
            measured = []
            for event in events * repeat:
                measured.append(measure_event(event, run, nodes))
                print(json.dumps(measured[-1]), flush=True)
                restore_nodes(run, nodes)
            return measured
        finally:
            run.driver.send_signal(signal.SIGINT)
            run.wait()
            nodes.close()
    finally:
        shutil.rmtree(folder)


def write_text(folder: Path) -> Path:
    """Write the first hundred chapters of the demo's text."""
    text = folder / "text"
    text.mkdir()
    for number, chapter in enumerate(read_chapters()[:100]):
        (text / f"{number}.txt").write_text(chapter)
    return text


def restore_nodes(run: Run, nodes: Nodes) -> None:
    """Bring the world back to its first size and let it settle."""
    while len(nodes.ids) < NUM_NODES:
        nodes.add()
    while len(nodes.ids) > NUM_NODES:
        nodes.remove(nodes.ids[-1])
    run.wait_for_step(0, world_size=NUM_NODES, timeout_s=LIMIT_S)
    time.sleep(SETTLE_S)


def measure_event(event: str, run: Run, nodes: Nodes) -> dict:
    """Let one event happen; return what it cost once training has settled again."""
    before = run.last_row()
    num_incidents = len(list(read_rows(run.dir.incidents)))
    start_s = time.time()
    frozen: list[int] = []
    if event == "agent_kill":
        return measure_agent_kill(run, nodes, usual=before)
    if event == "kill":
        os.kill(find_trainers(nodes.folder)[-1], signal.SIGKILL)
    elif event == "remove":
        nodes.remove(nodes.ids[-1])
    elif event == "freeze":
        frozen = freeze(nodes, nodes.ids[-1])
    elif event == "add":
        nodes.add()
    else:
        victims = sorted(nodes.ids)[: 2 if event == "drain_two" else 1]  # ranks go by node id: rank 0 is among them
        for victim in victims:
            nodes.drain(victim, notice_s=NOTICE_S)
        time.sleep(NOTICE_S)
        for victim in victims:
            nodes.remove(victim)
    run.wait_for(lambda: run.last_row()["attempt"] > before["attempt"], timeout_s=LIMIT_S, what="the next attempt")
    time.sleep(SETTLE_S)
    if frozen:
        for pid in frozen:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)  # it finds out that it is not wanted any more, and ends
        nodes.remove(nodes.ids[-1])
    rows = [row for row in run.rows() if row["attempt"] >= before["attempt"]]
    old = [row for row in rows if row["attempt"] == before["attempt"]]
    new = [row for row in rows if row["attempt"] > before["attempt"]]
    first_s, last_s = parse_utc(new[0]["time_utc"]), parse_utc(old[-1]["time_utc"])
    times_s = [parse_utc(row["time_utc"]) for row in rows]
    return {
        "peer": "solvent",
        "event": event,
        "world": f"{before['world_size']}->{new[0]['world_size']}",
        "outage_s": round(first_s - (start_s if event in ("kill", "remove", "freeze") else last_s), 2),
        "lost_steps": old[-1]["step"] - new[0]["step"] + 1,
        "since_event_s": round(first_s - start_s, 2),
        "longest_gap_s": round(max(b - a for a, b in pairwise(times_s) if b > start_s), 2),
        "num_worlds": len({row["attempt"] for row in new}),
        "phases_s": list(read_rows(run.dir.incidents))[num_incidents]["phases_s"],
        "step_s": round(sorted(row["step_s"] for row in old)[len(old) // 2], 3),
    }


def measure_agent_kill(run: Run, nodes: Nodes, *, usual: dict) -> dict:
    """Kill an agent; return the longest time from step to step until Ray has replaced them all."""
    old, start_s = find_agents(nodes.folder), time.time()
    os.kill(old[-1], signal.SIGKILL)
    run.wait_for(
        lambda: len(new := find_agents(nodes.folder)) == NUM_NODES and not set(new) & set(old),
        timeout_s=LIMIT_S,
        what="new agents",
    )
    time.sleep(SETTLE_S)
    rows = [row for row in run.rows() if row["attempt"] >= usual["attempt"]]
    times_s = [parse_utc(row["time_utc"]) for row in rows]
    before_s = sorted(b - a for a, b in pairwise(times_s) if b <= start_s)[-100:]
    after_s = [b - a for a, b in pairwise(times_s) if b > start_s]
    return {
        "peer": "solvent",
        "event": "agent_kill",
        "world": f"{usual['world_size']}->{rows[-1]['world_size']}",
        "outage_s": round(max(after_s), 2),
        "lost_steps": 0,
        "num_worlds": len({row["attempt"] for row in rows}) - 1,
        "usual_gap_s": round(median(before_s), 3),
        "longest_gaps_s": [round(gap_s, 3) for gap_s in sorted(after_s)[-5:]],
    }


def freeze(nodes: Nodes, node: str) -> list[int]:
    """Stop every process of a node; return them."""
    hosts = {get_parent(trainer) for trainer in find_trainers(nodes.folder) if node.startswith(get_node(trainer))}
    family = find_family([nodes.get_raylet(node), *hosts])
    for pid in family:
        os.kill(pid, signal.SIGSTOP)
    return family


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser()
    parser.add_argument("events", nargs="*", default=list(PEER_EVENTS))
    parser.add_argument("--peer", type=Path, help="its measure.py; left out, only Solvent is measured")
    parser.add_argument("--repeat", type=int, default=1, help="times that each event happens to Solvent")
    args = parser.parse_args()
    print(f"load average {os.getloadavg()} on {os.cpu_count()} cores", flush=True)
    peer_events = list(dict.fromkeys(filter(None, map(PEER_EVENTS.get, args.events))))
    theirs = measure_peer(args.peer, peer_events) if args.peer else []
    print(*map(json.dumps, theirs), sep="\n", flush=True)
    print(f"load average {os.getloadavg()}", flush=True)
    ours = measure_ours(args.events, repeat=args.repeat)
    print(f"load average {os.getloadavg()}\n\n{'event':10}{'Ray Train':>20}{'Solvent':>20}{'worst':>9}")
    for event in args.events:
        peer = [row for row in theirs if row["event"] == PEER_EVENTS[event]]
        own = [row for row in ours if row["event"] == event]
        worst_s = max(row["outage_s"] for row in own)
        print(f"{event:10}{format_cost(peer):>20}{format_cost(own):>20}{worst_s:>7.2f} s")


def format_cost(rows: list[dict]) -> str:
    """Return the medians of outage and steps redone."""
    if not rows:
        return "-"
    outage_s, lost_steps = (median(row[key] for row in rows) for key in ("outage_s", "lost_steps"))
    return f"{outage_s:.2f} s, {lost_steps:g} redone"


if __name__ == "__main__":
    main()
