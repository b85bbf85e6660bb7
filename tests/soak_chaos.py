"""Every fault in every phase, and walks of the world's size by lot, each held against an unbroken run.

    python -m tests.soak_chaos [training] [saving] [starting] [walk-1] [walk-2] ...
    python -m tests.soak_chaos walks --events 200 [--first-seed 1] [--json FILE]

Each scenario is one `solvent chaos` on a cluster of its own; `walk-N` is the walk of seed N, and `walks` are so many of
them that at least `--events` faults strike. Prints what each came to, and ends with 1 unless all finished, every fault
struck where it should, no sample was lost or repeated, losses and final states are those of the unbroken run, and
nothing leaked: no process, shared memory or temporary file is left, and no process that lived through many worlds holds
more descriptors or nameless memory in the last of them than in the first. Three to six minutes each on two cores.
Ctrl-C ends what runs, and sums up what there was.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from elastic.data.preparation.kjv import read_chapters
from elastic.data.preparation.prepare import prepare
from elastic.records.rundir import RunDir
from tests.ray._exact import compare
from tests.ray._leaks import LeakWatch
from tests.ray._struck import MOST_WORKERS, NUM_NODES, find_problems, finish, strike
from tests.ray._traces import assert_nothing_left, find_processes, wait_until
from tests.ray._walks import Row, plan_phase, plan_walk

NUM_CHANGES = 12
DEFAULT = ("training", "saving", "starting", "walk-1", "walk-2")
INTERRUPTED = 130
SHARED_MEMORY = Path("/dev/shm")
GONE_WITHIN_S = 30.0


def plan(name: str, *, num_changes: int = NUM_CHANGES) -> tuple[list[Row], list[int]]:
    """Return the faults of a scenario and the sizes of its world."""
    if name.startswith("walk-"):
        seed = int(name.removeprefix("walk-"))
        return plan_walk(seed, num_changes=num_changes, num_nodes=NUM_NODES, most=MOST_WORKERS)
    return plan_phase(name, num_nodes=NUM_NODES)


def prepare_data(folder: Path) -> Path:
    """Return the first hundred chapters of the King James Bible as token shards."""
    (folder / "kjv").mkdir()
    for number, chapter in enumerate(read_chapters()[:100]):
        (folder / "kjv" / f"{number}.txt").write_text(chapter)
    prepare([folder / "kjv"], folder / "data", vocab_size=512)
    return folder / "data"


def soak(folder: Path, name: str, *, data: Path, num_changes: int) -> dict[str, Any]:
    """Run one scenario, print what it came to and return that."""
    rows, sizes = plan(name, num_changes=num_changes)
    shared_memory = set(SHARED_MEMORY.iterdir())
    temporary = Path(tempfile.mkdtemp(prefix="t-"))  # short: Unix sockets lie deep below it
    print(f"{name}: {len(rows)} faults, worlds of {' '.join(map(str, sizes))}", flush=True)
    try:
        with LeakWatch(temporary, RunDir(folder / "runs" / name).metrics, say=say) as leaks:
            struck = strike(folder, name, rows, data=data, temporary=temporary)
    except BaseException:
        for pid in find_processes(temporary):
            os.kill(pid, signal.SIGKILL)
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    (folder / f"{name}.log").write_text(struck.log)
    left = find_left(temporary, shared_memory)
    difference = compare(*finish(struck, folder, data=data))
    result = struck.result
    summary = {
        "name": name,
        "problems": find_problems(struck, difference, rows, sizes) + left + leaks.find_problems(),
        "events": len(result["faults"]),
        "worlds": result["worlds"],
        "goodput": result["goodput"],
        "losses_differ_by": difference.loss,
        "final_states_differ_by": difference.state,
        "wall_s": round(struck.wall_s, 1),
        "holders": [holder.describe() for holder in leaks.long_lived],
    }
    verdict = "; ".join(summary["problems"]) or "exact, nothing leaked"
    say(f"{name}: {verdict} ({struck.wall_s:.0f} s, {folder / name}.log)")
    say(f"  {summary['events']} faults; worlds {' '.join(map(str, result['worlds']))}; goodput {result['goodput']}")
    say(f"  losses differ by {difference.loss:.1e}, final states by {difference.state:.1e}")
    for holder in summary["holders"]:
        first, last = (" ".join("{}:{}/{}".format(*sample) for sample in holder[part]) for part in ("first", "last"))
        say(f"  {holder['role']} {holder['pid']}, {holder['worlds']} worlds: {first} -> {last}")
    if summary["holders"]:
        say("  (of the first and the last third of its worlds: size:descriptors/nameless memory)")
    for fault in result["faults"]:
        say(f"  {fault['fault']}: at step {fault['step']} ({fault['phase']})")
    for incident in result["incidents"]:
        say("   ".join(["", *(str(incident[key]) for key in ("kind", "world", "step", "outage_s", "lost_steps"))]))
    return summary


def find_left(temporary: Path, shared_memory: set[Path]) -> list[str]:
    """Return what a scenario has left behind, after it had time to go."""
    problems: list[str] = []
    try:
        assert_nothing_left(temporary, timeout_s=GONE_WITHIN_S)
        shutil.rmtree(temporary)
    except AssertionError as error:
        problems.append(str(error))
    try:  # other runs on this machine name theirs for a moment only
        wait_until(
            lambda: set(SHARED_MEMORY.iterdir()) <= shared_memory,
            timeout_s=GONE_WITHIN_S,
            what=lambda: f"left in {SHARED_MEMORY}: {sorted(set(SHARED_MEMORY.iterdir()) - shared_memory)}",
        )
    except AssertionError as error:
        problems.append(str(error))
    return problems


def name_scenarios(names: Sequence[str], *, first_seed: int) -> Iterator[str]:
    """Return the scenarios in order; `walks` never end."""
    for name in names:
        if name == "walks":
            yield from (f"walk-{seed}" for seed in count(first_seed))
        else:
            yield name


def say(text: str) -> None:
    print(text, flush=True)


def main(words: Sequence[str]) -> int:
    """Run the scenarios; return 0 if there is no problem."""
    parser = argparse.ArgumentParser(prog="python -m tests.soak_chaos")
    parser.add_argument("names", metavar="SCENARIO", nargs="*", default=DEFAULT)
    parser.add_argument("--events", metavar="N", type=int, default=200, help="of `walks` (default: 200)")
    parser.add_argument("--changes", metavar="N", type=int, default=NUM_CHANGES, help="of size in a walk (default: 12)")
    parser.add_argument("--first-seed", metavar="N", type=int, default=1, help="of `walks` (default: 1)")
    parser.add_argument("--json", metavar="FILE", type=Path, help="where the summary goes, after each scenario")
    args = parser.parse_args(words)
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    data = prepare_data(folder)
    done: list[dict[str, Any]] = []
    num_events, exit_code = 0, 0
    try:
        for name in name_scenarios(args.names, first_seed=args.first_seed):
            if "walks" in args.names and num_events >= args.events:
                break
            try:
                done.append(soak(folder, name, data=data, num_changes=args.changes))
            except (AssertionError, OSError) as error:  # the next one may tell whether that was bad luck
                say(f"{name}: {error}")
                done.append({"name": name, "problems": [f"it broke off: {error}"], "events": 0})
            num_events += done[-1]["events"]
            exit_code = exit_code or (1 if done[-1]["problems"] else 0)
            say(f"{num_events} faults so far, {sum(bool(each['problems']) for each in done)} scenario(s) with problems")
            write_summary(args.json, done, end="finished so far")
    except KeyboardInterrupt:
        exit_code = INTERRUPTED
    problems = [f"{each['name']}: {problem}" for each in done for problem in each["problems"]]
    if left := find_processes(folder):
        problems.append(f"left: {left}")
    write_summary(args.json, done, end="interrupted" if exit_code == INTERRUPTED else "finished")
    how = "interrupted after" if exit_code == INTERRUPTED else "finished:"
    say(f"{how} {len(done)} scenario(s), {num_events} faults; {'; '.join(problems) or 'all exact, nothing leaked'}")
    return exit_code or (1 if problems else 0)


def write_summary(path: Path | None, done: Sequence[dict[str, Any]], *, end: str) -> None:
    if path is None:
        return
    summary = {
        "end": end,
        "scenarios": len(done),
        "events": sum(each["events"] for each in done),
        "with_problems": sum(bool(each["problems"]) for each in done),
        "walks": list(done),
    }
    path.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
