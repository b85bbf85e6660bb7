"""How far off the planner's memory and steps are for rows that its constants were not fitted to.

    python -m tests.cross_check_plans

Fits `cluster.planner.memory.Fitted` anew without each row, and without all rows of each size of model, and predicts
those. What was seen in a row and written into the model as a tensor (that attention in fp32 keeps its weights) stays
known: no fit can forget it. Steps likewise: their five parts (products, attention, memory, collectives, starts) are
scaled anew; what one precision alone reaches of its peak stays as it was.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple

import numpy as np

from cluster.catalog.gpus import get_spec
from cluster.planner.memory import FITTED, Fitted, estimate_memory
from cluster.planner.throughput import estimate_step
from tests.unit._planned import plan_config
from tests.unit.test_planner_memory import MEASURED
from tests.unit.test_planner_throughput import MEASURED as STEPS

Row = tuple[str, int, int, int, dict[str, object], float]
StepRow = tuple[str, str, int, int, int, dict[str, object], float]
GROUPS: Mapping[str, Callable[[Row], object]] = {
    "each row": MEASURED.index,
    "each size of model": lambda row: row[0],
    "each strategy": lambda row: row[4].get("strategy", "auto"),
    "each recomputation": lambda row: row[4].get("recompute", "none"),
    "each precision": lambda row: row[4].get("precision", "bf16"),
}
_ROUNDS = 8
_STEP = 0.02


def get_error(row: Row, fitted: Fitted) -> float:
    """Return predicted over measured, less one."""
    model, batch, seq_len, ranks, options, gib = row
    config = plan_config(model, batch=batch, seq_len=seq_len, world_size=ranks, **options)
    return estimate_memory(config, world_size=ranks, fitted=fitted).shown_gib / gib - 1


def fit(rows: Sequence[Row]) -> Fitted:
    """Return the constants with the least squares of errors over these rows; a row or two leave some as they were."""
    values = np.array([0.0, 2.0, 1.5, 1.0])  # not what was found: the fit must come to it

    def get_errors(values: np.ndarray) -> np.ndarray:
        return np.array([get_error(row, _make(values)) for row in rows])

    for _ in range(_ROUNDS):
        errors = get_errors(values)
        slopes = np.stack(
            [(get_errors(values + step) - errors) / _STEP for step in _STEP * np.eye(len(values))], axis=1
        )
        change = np.linalg.lstsq(np.vstack([slopes, 1e-3 * np.eye(len(values))]), np.append(-errors, 0 * values))[0]
        values = np.maximum(values + np.clip(change, -0.5, 0.5), 0.0)
    return _make(values)


def _make(values: Iterable[float]) -> Fitted:
    workspace_gib, hidden_copies, temporaries, saved_gradients = map(float, values)
    return Fitted(
        workspace_gib=workspace_gib,
        hidden_copies=hidden_copies,
        temporaries=temporaries,
        saved_gradients=saved_gradients,
    )


def leave_out(by: Callable[[Row], object]) -> list[tuple[Row, float]]:
    """Return each row with its error, from constants fitted to the rows of other groups."""
    found: list[tuple[Row, float]] = []
    for group in sorted({str(by(row)) for row in MEASURED}):
        fitted = fit([row for row in MEASURED if str(by(row)) != group])
        found += [(row, get_error(row, fitted)) for row in MEASURED if str(by(row)) == group]
    return found


def leave_out_steps(by: Callable[[StepRow], object]) -> list[tuple[StepRow, float]]:
    """Return each measured step with the error of its time, from parts scaled to the rows of other groups."""
    parts = np.array([_get_parts_ms(row) for row in STEPS])
    measured = np.array([row[-1] for row in STEPS])
    groups = [str(by(row)) for row in STEPS]
    found: list[tuple[StepRow, float]] = []
    for group in sorted(set(groups)):
        others = np.array([other != group for other in groups])
        scales = _fit_scales(parts[others] / measured[others, None])
        errors = parts @ scales / measured - 1
        found += [(row, float(errors[n])) for n, row in enumerate(STEPS) if groups[n] == group]
    return found


def _get_parts_ms(row: StepRow) -> list[float]:
    gpu, model, batch, seq_len, ranks, options, _ = row
    config = plan_config(model, batch=batch, seq_len=seq_len, world_size=ranks, **options)
    step = estimate_step(config, get_spec(gpu), world_size=ranks, gpus_per_node=ranks)
    return [1e3 * s for s in (step.products_s, step.attention_s, step.memory_s, step.exposed_s, step.overhead_s)]


def _fit_scales(shares: np.ndarray) -> np.ndarray:
    """Return what the parts must be multiplied with to be as little as possible beside 1 in all; none below 0."""
    kept = np.ones(shares.shape[1], dtype=bool)
    while True:
        scales = np.zeros(len(kept))
        scales[kept] = np.linalg.lstsq(shares[:, kept], np.ones(len(shares)))[0]
        if (scales >= 0).all():
            return scales
        kept &= scales > 0


def main() -> None:
    """Print all of it."""
    print(f"all {len(MEASURED)} rows: {astuple(fit(MEASURED))}, in use {astuple(FITTED)}")
    for name, by in GROUPS.items():
        rows = leave_out(by)
        errors = [error for _, error in rows]
        print(f"{name} left out: {min(errors):+.1%} to {max(errors):+.1%}, mean of sizes {np.mean(np.abs(errors)):.1%}")
        for row, error in sorted(rows, key=lambda pair: -abs(pair[1]))[:4]:
            print(f"  {error:+.1%}  {row[0]} {row[1]} x {row[2]} on {row[3]} {row[4]}: {row[5]} GiB")
    for name, by_step in (("each step", STEPS.index), ("each size's steps", lambda row: row[1])):
        steps = leave_out_steps(by_step)
        errors = [error for _, error in steps]
        print(f"{name} left out: {min(errors):+.1%} to {max(errors):+.1%}, mean of sizes {np.mean(np.abs(errors)):.1%}")
        for row, error in sorted(steps, key=lambda pair: -abs(pair[1]))[:4]:
            print(f"  {error:+.1%}  {row[0]} {row[1]} {row[2]} x {row[3]} on {row[4]} {row[5]}: {row[6]} ms")


if __name__ == "__main__":
    main()
