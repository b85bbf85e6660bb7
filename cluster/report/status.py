"""The live state of a run, from its files alone: it answers while the cluster is busy, stuck or gone."""

from cluster.controller.failures import read_failures
from cluster.cost import get_usd_per_mtoken
from cluster.report.story import read_story
from cluster.waste import split_dollars
from elastic.records.rundir import RunDir


def get_status(run_dir: RunDir, *, now_s: float) -> dict[str, object]:
    """Return what `solvent status` shows; None stands for what the files do not tell (yet).

    `state` is `starting`, `running`, `silent` (no sign of life for 2 minutes and 10 steps), or how the newest attempt
    ended: `finished`, `interrupted`, `lost`, `failed`. `redo_steps_*`: how many steps would be made again if a trainer,
    and if a node were lost now.
    """
    story = read_story(run_dir)
    state = story.get_state(now_s)
    last = story.rows[-1] if story.rows else {}
    tokens = last.get("tokens", 0)
    usd = story.totals.usd if story.tiles else None
    # Of all submissions together: a crash loop's budget does not start anew with the next driver.
    failures = read_failures(story.attempts)
    budget = story.config.get("fault", {}).get("max_failures_without_progress")
    eta_s = None
    if state == "running" and story.total_steps and story.step_s:
        eta_s = max(0, story.total_steps - last["step"]) * story.step_s
    return {
        "run": story.name,
        "state": state,
        "step": last.get("step", 0),
        "total_steps": story.total_steps,
        "tokens": tokens,
        "loss": last.get("loss"),
        "val_loss": story.get_last("val_loss"),
        "tokens_per_s": last.get("tokens_per_s"),
        "mfu": last.get("mfu"),
        "world_size": last.get("world_size"),
        "attempt": max([row["attempt"] for row in [*story.all_rows[-1:], *story.attempts[-1:]]], default=0),
        "redo_steps_trainer_lost": last.get("redo_steps_trainer_lost"),
        "redo_steps_node_lost": last.get("redo_steps_node_lost"),
        "incidents": len(story.incidents),
        "bad_steps": len(story.bad_steps),
        "failures_without_progress": failures.without_progress,
        "failures_left": None if budget is None else max(0, budget - failures.without_progress),
        "denied_nodes": sorted(failures.denied),
        "usd": usd,
        "usd_per_mtoken": None if usd is None else get_usd_per_mtoken(usd, tokens),
        "goodput": story.totals.goodput if story.tiles else None,
        "available_goodput": story.totals.available_goodput if story.tiles else None,
        "usd_by_state": dict(story.totals.usd_by_state),
        "usd_wasted": story.totals.usd_by_cause if story.tiles else {},
        "usd_by_incident": [
            {"kind": share.kind, "node": share.node, "step": share.step, "usd": share.usd}
            for share in split_dollars(story.tiles, story.incidents).incidents
        ],
        "eta_s": eta_s,
        "last_update_age_s": None if story.last_update_s is None else max(0.0, now_s - story.last_update_s),
    }
