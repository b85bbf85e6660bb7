"""The report as a person sees it: a real browser draws it, offline, and complains about nothing."""

import math
import os
import random
import re
import shutil
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest

from cluster.ledger import Ledger
from cluster.report.page import build_report
from elastic.records.attempts import History, build_row
from elastic.records.rundir import RunDir, append_row, format_utc

ORIGIN_S = 1_795_000_000.0
SCRIPT = "<script>document.title='broken in'</script>"


def spend(ledger, nodes, phase, start_s, length_s):
    for node in nodes:
        ledger.report(node, phase, start_s, start_s + length_s)
    return start_s + length_s


def write_run(run_dir, *, steps=1200, num_nodes=6):
    """A spot run of some 25 minutes: nodes come and go, half of the losses without notice, 8 GPUs each."""
    rng = random.Random(4)
    run_dir.root.mkdir(parents=True, exist_ok=True)
    run_dir.config.write_text(
        f"run: {run_dir.root.name}\nstrategy: fsdp2\nprecision: bf16\ntrain: {{steps: {steps}, note: {SCRIPT!r}}}\n"
        "model: {kind: llama, num_layers: 16, dim: 2048}\nwandb: {api_key: hunter2}\n"
    )
    ledger, now_s, step, saved, best, attempt, last_step_s = Ledger(), ORIGIN_S, 0, 0, 0, 0, None
    live, born = [], 0
    while step < steps:
        while len(live) < num_nodes - (attempt % 3 == 1):
            born += 1
            live.append(f"aws-g5-{born:02d}" if born != 3 else f"node-3{SCRIPT}")
            ledger.join(live[-1], now_s - rng.uniform(20, 60) * (attempt > 0), gpus=8, usd_per_gpu_hour=0.43)
        attempt += 1
        history = History(attempt=attempt - 1, step=best, last_step_s=last_step_s)
        start_s = now_s
        for phase, length_s in (("reconfigure", rng.uniform(2, 6)), ("load", rng.uniform(4, 12))):
            now_s = spend(ledger, live, phase, now_s, length_s)
        resumed, first_step_s = step, None
        goal = min(steps, step + rng.randint(90, 260))
        while step < goal:
            step += 1
            step_s = 8.0 / len(live) * rng.uniform(0.95, 1.05) + 0.4 * (rng.random() < 0.01)
            now_s = spend(ledger, live, "train" if step > best else "redo", now_s, step_s)
            first_step_s = first_step_s or now_s
            row = {
                "step": step,
                "tokens": step * 524_288,
                "loss": 2.1 + 8.2 * math.exp(-step / 90) + 0.9 * math.exp(-step / 900) + rng.gauss(0, 0.04),
                "grad_norm": 1.0,
                "lr": 3e-4,
                "step_s": step_s,
                "tokens_per_s": 524_288 / step_s,
                "mfu": 0.41,
                "world_size": 8 * len(live),
                "attempt": attempt,
                "time_utc": format_utc(now_s),
                "memory_gib": 19.2,
            }
            if step % 200 == 0 or step == steps:
                now_s = spend(ledger, live, "eval", now_s, 5.0)
                row["val_loss"] = row["loss"] + 0.06
            append_row(run_dir.metrics, row)
            if step % 50 == 0:
                now_s, saved = spend(ledger, live, "save", now_s, 1.5), step
        last_step_s, best, done = now_s, max(best, step), step == steps
        reason = (
            "all steps are done" if done else rng.choice(["drained: aws imds notice", "peer gone: connection reset"])
        )
        attempt_row = build_row(
            history,
            attempt=attempt,
            world_size=8 * len(live),
            nodes=live,
            start_s=start_s,
            end_s=now_s,
            end="finished" if done else "interrupted" if "notice" in reason else "lost",
            reason=reason,
            resumed_from="scratch" if attempt == 1 else rng.choice(["memory", "peer", "disk"]),
            resumed_step=resumed,
            last_step=step,
            first_step_s=first_step_s,
        )
        append_row(run_dir.attempts, asdict(attempt_row))
        if done:
            break
        gone = live.pop(rng.randrange(len(live)))
        if "peer" in reason:
            step = saved
        ledger.leave(gone, now_s)
        incident = {"kind": "notice" if "notice" in reason else "lost", "node": gone, "noticed_s": now_s}
        append_row(run_dir.incidents, {**incident, "outage_s": 14.2, "lost_steps": best - step, "resumed_from": "peer"})
        for node in live:
            ledger.switch(node, "wait", now_s)
        now_s += rng.uniform(3, 15)
    for node in live:
        ledger.switch(node, "idle", now_s)
    for row in ledger.flush(now_s + 4):
        append_row(run_dir.ledger, row.to_row())
    return now_s


def find_chromium():
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


def browse(page, profile, *options):
    browser = find_chromium()
    if browser is None:
        pytest.skip("no chromium is installed (apt-get install chromium)")
    quiet = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    quiet += " --disable-component-update --disable-sync --hide-scrollbars --enable-logging=stderr"
    return subprocess.run(
        [browser, *quiet.split(), f"--user-data-dir={profile}", *options, page.as_uri()],
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    run_dir = RunDir(tmp_path_factory.mktemp("runs") / "spot-1b")
    return build_report(run_dir, now_s=write_run(run_dir) + 5)


def test_a_browser_draws_every_curve_and_runs_no_string_of_the_run(page, tmp_path):
    seen = browse(page, tmp_path, "--dump-dom", "--virtual-time-budget=3000", "--window-size=1100,2000")
    assert "CONSOLE" not in seen.stderr  # errors of the script
    assert "<title>spot-1b - Solvent</title>" in seen.stdout
    figures = dict(re.findall(r'<figure id="(\w+)">(.*?)</figure>', seen.stdout, re.DOTALL))
    for name in ("loss", "speed"):
        assert re.search(r'class="smooth"[^>]* d="M[\d.]+,[\d.]+L', figures[name]), name
    assert figures["world"].count('class="block"') > 3
    assert figures["nodes"].count("<rect") > 50
    assert "NaN" not in seen.stdout.split('id="data"')[0]


def test_pointing_at_a_node_tells_its_state(page, tmp_path):
    point = """<script>setTimeout(() => {
      const bar = document.querySelectorAll("#nodes rect")[2], box = bar.getBoundingClientRect();
      bar.dispatchEvent(new PointerEvent("pointermove",
        { bubbles: true, clientX: box.left + box.width / 2, clientY: box.top + 3 }));
    }, 500)</script>"""
    pointed = tmp_path / "pointed.html"
    pointed.write_text(page.read_text().replace("</body>", point + "</body>"))
    seen = browse(pointed, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=3000", "--window-size=1100,2000")
    tip = re.search(r'<div id="tip"[^>]*>(.*?)</div>', seen.stdout, re.DOTALL)[1]
    assert "attempt 1, 48 ranks" in tip
    assert "aws-g5-01: train for" in tip


def test_the_page_is_small_and_asks_nobody(page):
    text = page.read_text()
    assert len(text) < 300_000
    assert not re.findall(r"(?:src|href)=|@import|url\(|fetch\(", text)
    assert SCRIPT not in text
    assert "hunter2" not in text


def test_a_run_that_left_nothing_still_gets_a_page(tmp_path):
    (tmp_path / "empty").mkdir()
    page = build_report(RunDir(tmp_path / "empty"), now_s=ORIGIN_S)
    seen = browse(page, tmp_path / "profile", "--dump-dom", "--virtual-time-budget=3000")
    assert "CONSOLE" not in seen.stderr
    assert "No step has been finished yet." in seen.stdout


if __name__ == "__main__":  # python tests/browser/test_report_in_a_browser.py OUT: a page and pictures to look at
    out = RunDir(Path(sys.argv[1]).resolve() / "spot-1b")
    os.environ.pop("DISPLAY", None)
    shot = build_report(out, now_s=write_run(out) + 5)
    for name, size, more in (
        ("wide", "1200,3000", ()),
        ("dark", "1200,1200", ("--blink-settings=preferredColorScheme=0",)),
        ("phone", "500,3000", ()),
    ):
        picture = out.root / f"{name}.png"
        browse(
            shot,
            out.root / "profile",
            f"--screenshot={picture}",
            f"--window-size={size}",
            "--virtual-time-budget=3000",
            *more,
        )
