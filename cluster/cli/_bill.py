"""What a run's plan would have said, beside what came of it; later plans go by the speed that was seen."""

from collections.abc import Iterable
from datetime import date

from elastic.config import RunConfig
from elastic.records.rundir import RunDir, parse_utc, read_rows


def compare_with_plan(config: RunConfig, run_dir: RunDir) -> Iterable[str]:
    """Yield lines: speed, goodput, hours and dollars, predicted and realised. None for a GPU that we know nothing of.

    The prediction is made from the configuration alone, as `solvent plan` makes it: nothing of the run is in it but the
    kind of its GPUs, their number and their price.
    """
    from cluster.catalog.offers import build_offer
    from cluster.ledger import read_ledger
    from cluster.planner.calibration import get_file, keep, load_scales, update
    from cluster.planner.candidates import Evaluator, Known
    from cluster.planner.progress import measure_progress, measure_scales

    attempts = list(read_rows(run_dir.attempts))
    progress = measure_progress(config, read_rows(run_dir.metrics), attempts, read_ledger(read_rows(run_dir.ledger)))
    if not progress.gpus or progress.tokens_per_s is None or not attempts:
        return
    nodes = max(1, *(len(row["nodes"]) for row in attempts))
    gpus = max(1, progress.world_size // nodes)
    scales = load_scales(get_file())
    offer = build_offer(
        provider="this",
        region="here",
        instance="node",
        gpu=progress.gpus[-1],
        gpus=gpus,
        kind="on-demand",
        usd_per_hour=progress.usd_per_hour,
        losses_per_hour=1 / (config.fault.mean_hours_between_losses * nodes),
        source="the run's own ledger",
        date=date.today(),
    )
    predicted = Evaluator(config, Known(scales=scales)).evaluate(offer, max(1, progress.world_size // gpus))
    keep(get_file(), update(scales, measure_scales(config, progress)))
    if predicted.step is None or predicted.goodput is None or predicted.memory is None:
        return
    share = progress.tokens / config.total_tokens
    hours = (parse_utc(attempts[-1]["end_utc"]) - parse_utc(attempts[0]["start_utc"])) / 3600
    yield (
        f"predicted beside realised, on {progress.world_size} x {' or '.join(progress.gpus)}: "
        f"{predicted.tokens_per_s:,.0f} and {progress.tokens_per_s:,.0f} tokens/s; "
        f"goodput {predicted.goodput.share:.1%} and {progress.goodput:.1%}; "
        f"{predicted.hours * share:,.2f} and {hours:,.2f} h; {predicted.usd * share:,.2f} and {progress.usd:,.2f} USD. "
        "Later plans go by the speed that was seen"
    )
