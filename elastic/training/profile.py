"""A trace of some steps on request, and a table of where their time went that adds up to all of it."""

import gzip
import json
import logging
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

logger = logging.getLogger(__name__)

_KINDS = (
    ("communication", r"nccl|gloo|all_reduce|all_gather|reduce_scatter"),
    ("attention", r"flash|sdpa|fmha|attention"),
    ("update", r"adam|foreach|multi_tensor_apply"),
    ("loss", r"cross_entropy|log_softmax|nll_loss"),
    ("products", r"gemm|nvjet|cutlass|aten::(mm|addmm|bmm|_scaled_mm|linear)\b|mkldnn"),
    ("copies", r"^memcpy|^memset|aten::(copy_|fill_|zero_)|direct_copy|FillFunctor"),
)
"""The first that fits a kernel's name (on a CPU: an operator's) has its time; all else is norms, rotations, SwiGLU."""
_OTHER, _IDLE = "elementwise and other", "idle"


class Profiler:
    """Watches the loop: call `advance` at the start of each step."""

    def __init__(self, *, at_step: int, num_steps: int, device: torch.device, path: Path) -> None:
        """Record `num_steps` steps from `at_step` on (0: never); leave the trace at `path` and the table beside it."""
        self._steps = range(at_step, at_step + num_steps) if at_step else range(0)
        self._device, self._path = device, path
        self._profile: profile | None = None

    def advance(self, step: int) -> None:
        """Begin to record before the first wanted step; stop and write when the step after the last begins."""
        if self._profile is None and step in self._steps:
            activities = [ProfilerActivity.CPU]
            self._profile = profile(
                activities=[*activities, ProfilerActivity.CUDA] if self._device.type == "cuda" else activities
            )
            self._wait()
            self._profile.start()
        elif self._profile is not None and step not in self._steps:
            self.close()

    def close(self) -> None:
        """Write what was recorded, if anything."""
        if self._profile is None:
            return
        self._wait()
        self._profile.stop()
        plain = self._path.with_suffix("")
        self._profile.export_chrome_trace(str(plain))
        text = plain.read_bytes()
        with gzip.open(self._path, "wb", compresslevel=3) as file:
            file.write(text)
        plain.unlink()
        table = summarize(json.loads(text)["traceEvents"], kind="kernel" if self._device.type == "cuda" else "cpu_op")
        lines = format_table(table, num_steps=len(self._steps))
        plain.with_suffix(".txt").write_text(lines + "\n", encoding="ascii")
        logger.info("%s\n%s", self._path, lines)
        self._profile, self._steps = None, range(0)

    def _wait(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)


def summarize(events: Iterable[Mapping[str, Any]], *, kind: str) -> dict[str, float]:
    """Return milliseconds by what they were spent on, `idle` included: together they are the whole time recorded.

    Where several things ran at once, the one that began last has the time: of operators, the innermost.

    Args:
        events: of a Chrome trace.
        kind: the category that does the work: `kernel` on a GPU, `cpu_op` on a CPU.
    """
    wanted = {kind, "gpu_memcpy", "gpu_memset"}
    work = sorted((e["ts"], -e["dur"], e["name"]) for e in events if e.get("cat") in wanted and "dur" in e)
    spent_us: dict[str, float] = defaultdict(float)
    running: list[tuple[float, str]] = []  # (end, kind), the one that began last at the end
    now_us = work[0][0] if work else 0.0
    for start_us, negative_us, name in [*work, (math.inf, 0.0, "")]:
        while now_us < start_us and (running or name):
            end_us, what = running[-1] if running else (start_us, _IDLE)
            until_us = max(now_us, min(end_us, start_us))
            spent_us[what] += until_us - now_us
            now_us = until_us
            if running and end_us <= now_us:
                running.pop()
        running.append((start_us - negative_us, _get_kind(name)))
    return {what: us / 1e3 for what, us in sorted(spent_us.items(), key=lambda item: -item[1]) if us}


def _get_kind(name: str) -> str:
    return next((kind for kind, pattern in _KINDS if re.search(pattern, name, re.IGNORECASE)), _OTHER)


def format_table(spent_ms: Mapping[str, float], *, num_steps: int) -> str:
    """Return lines of milliseconds per step and shares."""
    total_ms = sum(spent_ms.values())
    line: Callable[[str, float], str] = lambda what, ms: f"{what:24}{ms / num_steps:10.2f} ms {ms / total_ms:6.1%}"  # noqa: E731
    return "\n".join([line(what, ms) for what, ms in spent_ms.items()] + [line("a step", total_ms)]) if total_ms else ""
