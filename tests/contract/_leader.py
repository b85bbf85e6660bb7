"""A process that keeps a run's rows: it does what its arguments say, one after the other.

`lead`, `row:N`, `sample:N`, `push`, `show` (prints the steps of its rows), `wait` (says so; for a line of input).
It pushes when it is told to, and when it ends in order.
"""

import sys

from elastic.records import spool
from elastic.records.attempts import next_attempt
from elastic.records.leader import lead
from elastic.records.rundir import read_rows


def main(storage: str, run_name: str, *words: str) -> None:
    spool.PUSH_EVERY_S = 3600.0
    with spool.open_run(storage, run_name) as run:
        leader = None
        for word in words:
            match word.split(":"):
                case ["lead"]:
                    leader = lead(run.storage, who="a test", at_least=next_attempt(run.dir))
                    run.lead(leader.check, generation=leader.generation)
                case ["row", step]:
                    run.append(run.dir.metrics, {"step": int(step), "attempt": leader.generation, "time_utc": ""})
                case ["sample", step]:
                    run.append(run.dir.samples(attempt=1, rank=0), {"step": int(step), "ids": [1, 2]})
                case ["push"]:
                    run.push()
                case ["show"]:
                    print(*[row["step"] for row in read_rows(run.dir.metrics)], flush=True)
                case ["wait"]:
                    print("waits", flush=True)
                    sys.stdin.readline()
        run.push()
        if leader:
            leader.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
