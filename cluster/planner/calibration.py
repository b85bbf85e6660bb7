"""What steps took on GPUs that we have seen, as a multiple of what was estimated; kept from run to run."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from elastic.paths import expand_home

_WEIGHT = 0.5
"""Of the newest run; those before it count for less and less."""
_PLAUSIBLE = (0.3, 10.0)
"""Outside of it something else was measured."""


def get_file(home: str | None = None) -> Path:
    """Return where they are kept."""
    base = home or os.environ.get("XDG_CACHE_HOME") or expand_home("~/.cache")
    return Path(base) / "solvent" / "speeds.json"


def load_scales(path: Path) -> dict[str, float]:
    """Return the multiples by GPU; none if nothing usable is there."""
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
        return {str(gpu): float(scale) for gpu, scale in content.items() if _is_plausible(float(scale))}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}  # a cache: without it all is estimated


def _is_plausible(scale: float) -> bool:
    return _PLAUSIBLE[0] < scale < _PLAUSIBLE[1]


def update(known: Mapping[str, float], measured: Mapping[str, float]) -> dict[str, float]:
    """Return the multiples after one more run."""
    mixed = dict(known)
    for gpu, scale in measured.items():
        if _is_plausible(scale):
            mixed[gpu] = round(_WEIGHT * scale + (1 - _WEIGHT) * known.get(gpu, scale), 4)
    return mixed


def keep(path: Path, scales: Mapping[str, float]) -> None:
    """Keep them for later plans, as far as that is possible."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(dict(scales), indent=1, sort_keys=True), encoding="utf-8")
    except OSError:
        return  # a cache
