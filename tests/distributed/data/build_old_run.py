"""Build `old_run/`: a run that a commit of the past has left half done, and what the same run did unbroken.

    git worktree add ../old e28d9b6
    python tests/distributed/data/build_old_run.py ../old tests/distributed/data/old_run

Everything that is kept was written by the code in the first folder: a data set of a few kB (`data/`), a run that got a
SIGTERM on its way (`runs/broken/`), and the rows and sample ids of an unbroken one (`unbroken/`). Both ran in one
process of `python -m elastic`, whose configuration is `config.yaml`. Build it again only for another format that old
runs may have, under another name: what is here is the past, and stays.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

STEPS, STOP_AT = 12, 6
CONFIG = f"""strategy: single
device: cpu
precision: fp32
compile: false
model: {{dim: 8, num_layers: 1, num_heads: 2, num_kv_heads: 1, ffn_dim: 16, vocab_size: 300}}
data: {{seq_len: 16, record_samples: true}}
train: {{steps: {STEPS}, global_batch: 4, micro_batch: 2, eval_samples: 4}}
optim: {{lr: 3.0e-3}}
checkpoint: {{every_steps: 3, keep_last: 2}}
wandb: {{mode: disabled}}
"""
PREPARE = "import sys; from elastic.data.preparation.prepare import prepare; from pathlib import Path; " + (
    "prepare([Path(sys.argv[1])], Path(sys.argv[2]), vocab_size=300, val_fraction=0.3)"
)


def call(code: Path, *arguments: str) -> subprocess.Popen[bytes]:
    """Start Python in a folder with code, which it imports."""
    return subprocess.Popen([sys.executable, *arguments], cwd=code, env={**os.environ, "OMP_NUM_THREADS": "1"})


def train(code: Path, work: Path, run: str) -> subprocess.Popen[bytes]:
    """Start the training of a run."""
    where = (f"data.path={work / 'data'}", f"storage={work / 'runs'}", f"run={run}")
    return call(code, "-m", "elastic", str(work / "config.yaml"), *where)


def count_rows(path: Path) -> int:
    """Return how many steps have ended."""
    return len(path.read_text().splitlines()) if path.exists() else 0


def main(code: Path, target: Path) -> None:
    """Build it all."""
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        (work / "config.yaml").write_text(CONFIG)
        lines = [json.dumps({"text": f"In the beginning was the word {n}. " * 2}) for n in range(60)]
        (work / "a.jsonl").write_text("\n".join(lines))
        assert call(code, "-c", PREPARE, str(work / "a.jsonl"), str(work / "data")).wait() == 0
        assert train(code, work, "unbroken").wait() == 0
        metrics = work / "runs" / "broken" / "metrics.jsonl"
        while True:  # steps take milliseconds: try again until the signal came in time
            shutil.rmtree(work / "runs" / "broken", ignore_errors=True)
            process = train(code, work, "broken")
            while count_rows(metrics) < STOP_AT and process.poll() is None:
                time.sleep(0.001)
            process.send_signal(signal.SIGTERM)
            if process.wait() == 3:  # interrupted, resumable
                break
        shutil.rmtree(target, ignore_errors=True)
        shutil.copytree(work / "data", target / "data", ignore=shutil.ignore_patterns(".*"))
        shutil.copytree(work / "runs" / "broken", target / "runs" / "broken")
        leader = target / "runs" / "broken" / "leader.json"
        leader.write_text(json.dumps({**json.loads(leader.read_text()), "host": "old", "machine": "0/0"}))
        shutil.copy(work / "config.yaml", target / "config.yaml")
        (target / "unbroken").mkdir()
        for path in (work / "runs" / "unbroken").glob("*.jsonl"):
            shutil.copy(path, target / "unbroken" / path.name)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve(), Path(sys.argv[2]).resolve())
