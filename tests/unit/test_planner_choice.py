"""Which offer is chosen, why, what a change would buy, and what to do if there is none."""

import math
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.catalog.load import load_catalog
from cluster.catalog.offers import build_offer
from cluster.planner.calibration import keep, load_scales, update
from cluster.planner.candidates import Evaluator, Known, get_node_counts
from cluster.planner.choice import Limits, choose
from cluster.planner.goodput import estimate_goodput
from cluster.planner.progress import extrapolate, learn, measure_progress, measure_scales
from elastic.config_load import load
from elastic.errors import ConfigError, NoPlanError
from tests.unit._planned import MODELS, plan_config

CONFIGS = Path(__file__).parents[2] / "configs"


def offer(gpu="H100-SXM", gpus=8, usd=2.0, kind="on-demand", **values):
    defaults = {"provider": "p", "region": "r", "instance": f"{gpus}x{gpu}", "source": "s", "date": date(2026, 11, 1)}
    return build_offer(
        **{
            **defaults,
            "gpu": gpu,
            "gpus": gpus,
            "kind": kind,
            "usd_per_hour": usd * gpus,
            "network_gbits": 3200.0,
            **values,
        }
    )


EIGHT_B = plan_config(
    "8B",
    batch=1,
    seq_len=8192,
    world_size=16,
    steps=1000,
    strategy="fsdp2",
    recompute="full",
    cluster={"min_workers": 8},
)


def test_hours_and_dollars_follow_from_tokens_per_second_and_goodput():
    """1,000 steps of 16 x 8192 tokens; price times machines times hours."""
    candidate = Evaluator(EIGHT_B).evaluate(offer(), 2)
    assert candidate.fits
    assert candidate.goodput.losses_per_hour == pytest.approx(2 * offer().losses_per_hour)
    seconds = 1000 * 16 * 8192 / candidate.tokens_per_s / candidate.goodput.share / candidate.goodput.availability
    assert candidate.hours == pytest.approx(seconds / 3600)
    assert candidate.usd == pytest.approx(candidate.hours * 16 * 2.0 * candidate.goodput.availability)
    assert candidate.usd_per_mtoken == pytest.approx(candidate.usd / (1000 * 16 * 8192 / 1e6))


def test_a_gpu_of_which_nothing_is_known_is_refused_not_guessed():
    candidate = Evaluator(EIGHT_B).evaluate(offer(gpu="X1000"), 1)
    assert not candidate.fits
    assert "would be guesses" in candidate.reason


def test_the_cheapest_is_chosen_and_the_fastest_of_about_as_cheap_ones():
    choice = choose(EIGHT_B, [offer(usd=2.0), offer(provider="q", usd=9.0)])
    assert choice.chosen.offer.provider == "p"
    assert choice.chosen.nodes == 2  # half the time for about the same dollars
    assert [candidate.offer.provider for candidate in choice.candidates] == ["p", "q"]


def test_a_deadline_takes_the_dearer_and_faster_offer():
    slow, fast = offer(gpu="A100-80GB-SXM", usd=0.5), offer(usd=9.0)
    hours = {c.offer.gpu: c.hours for c in choose(EIGHT_B, [slow, fast]).candidates}
    between = (hours["A100-80GB-SXM"] + hours["H100-SXM"]) / 2
    assert choose(EIGHT_B, [slow, fast]).chosen.offer == slow
    assert choose(EIGHT_B, [slow, fast], limits=Limits(hours=between)).chosen.offer == fast


@pytest.mark.parametrize("limits", [{"hours": 0.05}, {"usd": 1.0}])
def test_no_plan_says_the_least_that_makes_one(limits):
    offers = [offer()]
    with pytest.raises(NoPlanError) as error:
        choose(EIGHT_B, offers, limits=Limits(**limits))
    assert error.value.exit_code == 4
    flag = "--deadline-h " if "hours" in limits else "--budget-usd "
    least = float(str(error.value).partition(f"makes a plan: {flag}")[2].split(";")[0].rstrip("."))
    key = "hours" if "hours" in limits else "usd"
    choice = choose(EIGHT_B, offers, limits=Limits(**{key: least}))  # what it says does make one
    assert getattr(choice.chosen, key) > limits[key]
    with pytest.raises(NoPlanError):  # and is the least, but for rounding up
        choose(EIGHT_B, offers, limits=Limits(**{key: 0.9 * getattr(choice.chosen, key)}))


def test_what_does_not_fit_is_told_with_the_change_that_makes_it_fit():
    config = plan_config("8B", batch=4, seq_len=8192, world_size=8, strategy="fsdp2", cluster={"min_workers": 8})
    with pytest.raises(NoPlanError, match=r"needs \d+\.\d GiB of each GPU.*train\.micro_batch=") as error:
        choose(config, [offer()])
    size = int(str(error.value).partition("train.micro_batch=")[2].split(";")[0].split(".")[0])
    assert choose(replace(config, train=replace(config.train, micro_batch=size)), [offer()]).chosen.fits


def test_more_workers_are_named_where_they_alone_would_do():
    config = plan_config("8B", batch=1, seq_len=8192, world_size=8, microbatches=8, recompute="full", strategy="fsdp2")
    hours = choose(config, [offer()]).chosen.hours
    with pytest.raises(NoPlanError, match=r"cluster\.max_workers=16"):
        choose(config, [offer()], limits=Limits(hours=0.7 * hours))


def test_a_change_says_what_it_saves():
    config = replace(EIGHT_B, recompute="full")
    choice = choose(config, [offer(gpu="H200")])
    changes = {change.change: change for change in choice.changes}
    assert changes["recompute=selective"].usd_saved > 0.05 * choice.chosen.usd  # a forward less of three
    assert changes["recompute=selective"].usd_saved == pytest.approx(
        choice.chosen.usd - choose(replace(config, recompute="selective"), [offer(gpu="H200")]).chosen.usd
    )


@given(most=st.integers(1, 512), gpus=st.sampled_from([1, 2, 4, 8]), least=st.integers(1, 64))
def test_every_number_of_machines_makes_a_world_that_the_run_takes(most, gpus, least):
    config = plan_config(world_size=most, cluster={"min_workers": min(least, most)})
    counts = get_node_counts(config, offer(gpus=gpus))
    assert all(n * gpus in config.get_world_sizes() for n in counts)
    assert list(counts) == sorted(set(counts), reverse=True)
    assert len(counts) <= 8
    if counts:
        assert counts[0] == most // gpus


def test_machines_that_cannot_make_the_world_are_told():
    choice = choose(plan_config("1B", world_size=1), [offer(gpus=1), offer(gpus=8)])
    assert [c.fits for c in choice.candidates] == [True, False]


@pytest.mark.parametrize("hours", [1e-3, 0.1, 1, 10, 100])
def test_goodput_falls_with_losses_and_rises_with_notice(hours):
    config = plan_config("8B", world_size=64, strategy="fsdp2")

    def share(rate, **values):
        made = offer(kind="spot", losses_per_hour=rate, **values)
        return estimate_goodput(config, made, nodes=8, step_s=1.0, shard_bytes=2**30).share

    assert 0 <= share(1 / hours) <= share(0.5 / hours) <= 1
    assert share(1 / hours) <= share(1 / hours, notice_s=120)


def test_steps_of_a_millisecond_do_not_wait_for_saves_that_are_still_under_way():
    demo = load(CONFIGS / "demo.yaml", [])
    goodput = estimate_goodput(demo, offer(gpus=1), nodes=1, step_s=1e-3, shard_bytes=60e6)
    assert goodput.share > 0.99
    assert goodput.interval_s > 1.0, "every 40 steps would be every 0.04 s"


def test_without_copies_in_memory_a_loss_costs_half_an_interval():
    """100 nodes lost once in 1,000 h: one in 10 h; checkpoints every 50 steps of 10 s: 250 s, and what comes with
    it."""
    config = plan_config("1B", world_size=100)
    config = replace(config, checkpoint=replace(config.checkpoint, memory="off"))
    goodput = estimate_goodput(config, offer(gpus=1, losses_per_hour=1e-3), nodes=100, step_s=10.0, shard_bytes=0.0)
    lost = 1 - goodput.share
    # 0.5 s of 500 per save, 250 s and two outages of 3 s per loss
    assert lost == pytest.approx(0.5 / 500 + (250 + 3 + 3) / 36000, rel=0.05)


def test_70b_over_500_offers_takes_less_than_two_seconds():
    config = load(CONFIGS / "llama2-70b-2t.yaml", [])
    offers = list(load_catalog().offers)
    offers += [replace(o, provider=f"{o.provider}2") for o in offers]
    assert len(offers) > 500
    begin_s = time.perf_counter()
    choice = choose(config, offers)
    assert time.perf_counter() - begin_s < 2
    assert len([c for c in choice.candidates if c.fits]) >= 6


@pytest.mark.parametrize("name", ["llama2-70b-2t", "8b-8xh100-spot", "1.5b-8x24gb-spot", "125m-24gb"])
def test_what_ships_can_be_planned_on_what_its_name_says(name):
    gpu = "RTX4090" if "24gb" in name else "H100-SXM"
    config = load(CONFIGS / f"{name}.yaml", [])
    for workers in {config.cluster.min_workers, config.cluster.max_workers}:
        gpus = math.gcd(workers, 8)
        assert Evaluator(config).evaluate(offer(gpu=gpu, gpus=gpus), workers // gpus).fits


# ---- a run in progress


def rows(config, *, tokens_per_s, steps, mfu=None, world_size=1):
    tokens = config.train.global_batch * config.data.seq_len
    return [
        {"step": n, "tokens": n * tokens, "tokens_per_s": tokens_per_s, "mfu": mfu, "world_size": world_size}
        for n in range(1, steps + 1)
    ]


def test_a_run_in_progress_is_planned_by_its_own_speed():
    """30 of 100 steps at half the estimated speed: the rest takes twice what was estimated for 70 steps."""
    config = plan_config("1.5B", steps=100)
    fresh = Evaluator(config).evaluate(offer(gpu="H200", gpus=1), 1)
    speed = fresh.tokens_per_s / 2
    mfu = speed * config.model.flops_per_token(4096) / 989.4e12
    progress = measure_progress(config, rows(config, tokens_per_s=speed, steps=30, mfu=mfu), [], [])
    assert progress.gpus == ("H100-SXM", "H200")  # of one peak
    known = learn(config, progress, Known())
    assert known.scales["H200"] == pytest.approx(2.0)
    rest = Evaluator(config, known).evaluate(offer(gpu="H200", gpus=1), 1)
    assert rest.hours == pytest.approx(2 * 0.7 * fresh.hours, rel=0.03)


def test_without_a_gpu_a_run_is_extrapolated_as_it_goes():
    from cluster.ledger import LedgerRow

    config = plan_config("125M", batch=1, seq_len=128, steps=100)
    tile = LedgerRow(node="a", start_ms=0, end_ms=3_600_000, state="train", gpus=1, usd=0.5)
    idle = replace(tile, start_ms=3_600_000, end_ms=7_200_000, state="wait")
    progress = measure_progress(
        config,
        rows(config, tokens_per_s=64.0, steps=25),
        [
            {"end": "lost", "start_utc": "2026-01-01T00:00:00Z"},
            {"end": "running", "start_utc": "2026-01-01T01:00:00Z", "outage_s": 40.0},
        ],
        [tile, idle],
    )
    assert measure_scales(config, progress) == {}
    assert (progress.goodput, progress.usd, progress.losses) == (0.5, 1.0, 1)
    rest = extrapolate(config, progress)
    assert rest.hours == pytest.approx(75 * 128 / (64 * 0.5) / 3600)
    assert rest.usd == pytest.approx(3.0)  # a dollar for 25 of 100 steps
    known = learn(config, progress, Known())
    assert (known.losses_per_node_hour, known.outage_s) == (pytest.approx(0.5), 40.0)
    slow, fresh = (Evaluator(config, k).evaluate(offer(kind="spot", gpus=1), 2).goodput for k in (known, Known()))
    assert slow.outage_s == 40.0
    assert slow.share < fresh.share


def test_the_newest_row_of_a_step_counts_and_few_rows_are_no_measurement():
    config = plan_config()
    made = rows(config, tokens_per_s=10.0, steps=3) + rows(config, tokens_per_s=30.0, steps=4)
    assert measure_progress(config, made, [], []).tokens_per_s is None
    made = rows(config, tokens_per_s=10.0, steps=6) + rows(config, tokens_per_s=30.0, steps=6)
    assert measure_progress(config, made, [], []).tokens_per_s == 30.0


def test_speeds_are_kept_from_run_to_run(tmp_path):
    path = tmp_path / "a" / "speeds.json"
    assert load_scales(path) == {}
    keep(path, update(load_scales(path), {"H200": 1.2, "L4": 50.0}))
    keep(path, update(load_scales(path), {"H200": 1.0}))
    assert load_scales(path) == {"H200": 1.1}  # 50 times slower is something else
    path.write_text("[]")
    assert load_scales(path) == {}


def test_the_memory_of_the_70b_example_is_what_its_header_says():
    """16 bytes of state over 64 ranks: 12 of them are weights and moments."""
    config = load(CONFIGS / "llama2-70b-2t.yaml", [])
    candidate = Evaluator(config).evaluate(offer(), 64)
    assert candidate.memory.gib["state"] == pytest.approx(12 * 68_976_648_192 / 64 / 2**30)
    assert MODELS["8B"].num_params < config.model.num_params


def test_a_strategy_that_nobody_has_measured_is_not_planned():
    with pytest.raises(ConfigError, match="strategy=deepspeed cannot be planned"):
        choose(replace(EIGHT_B, strategy="deepspeed", recompute="none", compile=False), [offer()])
