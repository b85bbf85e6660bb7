"""How far off the planner's memory is for rows that its constants were not fitted to.

    python -m tests.cross_check_memory

Fits `cluster.planner.memory.Fitted` anew without each row, and without all rows of each size of model, and predicts
those. What was seen in a row and written into the model as a tensor (that attention in fp32 keeps its weights) stays
known: no fit can forget it.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import astuple

import numpy as np

from cluster.planner.memory import FITTED, Fitted, estimate_memory
from tests.unit._planned import plan_config
from tests.unit.test_planner_memory import MEASURED

Row = tuple[str, int, int, int, dict[str, object], float]
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


def main() -> None:
    """Print all of it."""
    print(f"all {len(MEASURED)} rows: {astuple(fit(MEASURED))}, in use {astuple(FITTED)}")
    for name, by in GROUPS.items():
        rows = leave_out(by)
        errors = [error for _, error in rows]
        print(f"{name} left out: {min(errors):+.1%} to {max(errors):+.1%}, mean of sizes {np.mean(np.abs(errors)):.1%}")
        for row, error in sorted(rows, key=lambda pair: -abs(pair[1]))[:4]:
            print(f"  {error:+.1%}  {row[0]} {row[1]} x {row[2]} on {row[3]} {row[4]}: {row[5]} GiB")


if __name__ == "__main__":
    main()
