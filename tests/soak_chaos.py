"""Every fault in every phase, and walks of the world's size by lot, each held against an unbroken run.

    python -m tests.soak_chaos [training] [saving] [starting] [walk-1] [walk-2] ...

Each scenario is one `solvent chaos` on a cluster of its own; `walk-N` is the walk of seed N. Prints what each came to,
and ends with 1 unless all finished, every fault struck where it should, no sample was lost or repeated, and losses and
final states are those of the unbroken run. Three to six minutes each on two cores.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from elastic.data.kjv import read_chapters
from elastic.data.prepare import prepare
from tests.ray._exact import compare
from tests.ray._struck import MOST_WORKERS, NUM_NODES, find_problems, finish, strike
from tests.ray._walks import Row, plan_phase, plan_walk

NUM_CHANGES = 12
DEFAULT = ("training", "saving", "starting", "walk-1", "walk-2")


def plan(name: str) -> tuple[list[Row], list[int]]:
    """Return the faults of a scenario and the sizes of its world."""
    if name.startswith("walk-"):
        seed = int(name.removeprefix("walk-"))
        return plan_walk(seed, num_changes=NUM_CHANGES, num_nodes=NUM_NODES, most=MOST_WORKERS)
    return plan_phase(name, num_nodes=NUM_NODES)


def prepare_data(folder: Path) -> Path:
    """Return the first hundred chapters of the King James Bible as token shards."""
    (folder / "kjv").mkdir()
    for number, chapter in enumerate(read_chapters()[:100]):
        (folder / "kjv" / f"{number}.txt").write_text(chapter)
    prepare([folder / "kjv"], folder / "data", vocab_size=512)
    return folder / "data"


def main(names: Sequence[str]) -> int:
    """Run the scenarios; return 0 if there is no problem."""
    folder = Path(tempfile.mkdtemp(prefix="soak-"))
    data = prepare_data(folder)
    num_problems = 0
    for name in names:
        rows, sizes = plan(name)
        struck = strike(folder, name, rows, data=data)
        (folder / f"{name}.log").write_text(struck.log)
        difference = compare(*finish(struck, folder, data=data))
        problems = find_problems(struck, difference, rows, sizes)
        num_problems += len(problems)
        result = struck.result
        print(f"{name}: {'; '.join(problems) or 'exact'} ({struck.wall_s:.0f} s, {folder / name}.log)")
        print(f"  worlds {' '.join(map(str, result['worlds']))}; goodput {result['goodput']}")
        print(f"  losses differ by {difference.loss:.1e}, final states by {difference.state:.1e}")
        for fault in result["faults"]:
            print(f"  {fault['fault']}: at step {fault['step']} ({fault['phase']})")
        for incident in result["incidents"]:
            print("  ", *(incident[key] for key in ("kind", "world", "step", "outage_s", "lost_steps")), flush=True)
    return 1 if num_problems else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or DEFAULT))
