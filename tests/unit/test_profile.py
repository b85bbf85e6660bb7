"""Where a step's time went adds up to all of it."""

import gzip
import json

import pytest
import torch

from elastic.training.profile import Profiler, format_table, summarize


def event(start_us, end_us, name, cat="kernel"):
    return {"ts": start_us, "dur": end_us - start_us, "name": name, "cat": cat}


def test_every_microsecond_is_in_one_line():
    events = [
        event(0, 40, "nvjet_sm90_tst_256x128"),
        event(0, 100, "not work of the device", cat="cpu_op"),
        event(50, 70, "triton_poi_fused_mul_silu"),
        event(60, 90, "ncclDevKernel_AllReduce"),  # began last until 65, and is alone again from 80
        event(65, 80, "Memcpy DtoH", cat="gpu_memcpy"),
        {"name": "an instant", "cat": "kernel", "ts": 5},
        event(90, 100, "flash_fwd_kernel"),
    ]
    spent = summarize(events, kind="kernel")
    assert spent == {
        "products": 0.04,
        "elementwise and other": 0.01,
        "communication": 0.015,
        "copies": 0.015,
        "idle": 0.01,
        "attention": 0.01,
    }
    assert format_table(spent, num_steps=2).splitlines()[-1].split() == ["a", "step", "0.05", "ms", "100.0%"]


def test_nothing_recorded_is_an_empty_table():
    assert format_table(summarize([], kind="kernel"), num_steps=1) == ""


def test_the_wanted_steps_are_recorded_and_no_others(tmp_path):
    path = tmp_path / "profile-1-0.json.gz"
    profiler = Profiler(at_step=2, num_steps=2, device=torch.device("cpu"), path=path)
    for step in range(6):
        profiler.advance(step)
        with torch.profiler.record_function(f"step {step}"):
            torch.ones(64, 64) @ torch.ones(64, 64)
        assert path.exists() == (step >= 4)
    profiler.close()
    with gzip.open(path) as file:
        names = {e.get("name") for e in json.load(file)["traceEvents"]}
    assert {f"step {step}" for step in range(6)} & names == {"step 2", "step 3"}
    assert {entry.name for entry in tmp_path.iterdir()} == {path.name, "profile-1-0.txt"}
    lines = (tmp_path / "profile-1-0.txt").read_text().splitlines()
    assert any(line.startswith("products") for line in lines)
    shares = [float(line.split()[-1].rstrip("%")) for line in lines]
    assert sum(shares[:-1]) == pytest.approx(shares[-1], abs=0.05 * len(shares))


@pytest.mark.parametrize("last", [2, 3])
def test_a_run_that_ends_while_it_is_recorded_leaves_its_trace(tmp_path, last):
    path = tmp_path / "p.json.gz"
    profiler = Profiler(at_step=2, num_steps=5, device=torch.device("cpu"), path=path)
    for step in range(last + 1):
        profiler.advance(step)
        torch.ones(2) + 1
    profiler.close()
    assert path.exists()
